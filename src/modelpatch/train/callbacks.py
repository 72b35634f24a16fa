"""Callbacks of the training loop: early stopping, an average of the weights, a log, checkpoints, a progress bar.

    trainer = Trainer(model, loader, validation=held_out, callbacks=[EarlyStopping(patience=3), MetricLogger("log/")])

One of your own overrides the events of `Callback` that it needs, and reads the trainer: `model`, `optimizer`, `epoch`, `step`,
`history` and `row`, the figures of the epoch that ended. `trainer.stop()` ends the run after the epoch.
"""

import csv
import importlib.util
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from modelpatch.atomic import check_place, write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.computation import Computation
from modelpatch.errors import CheckpointMismatchError, MethodError, ModelpatchError, TrainingError, warn_caller
from modelpatch.methods.method import Method
from modelpatch.patch.model import PatchedModel
from modelpatch.text import digest_of
from modelpatch.train.progress import Progress
from modelpatch.train.settings import check_limits, name_of
from modelpatch.train.trainer import Callback, Trainer, get_state, load_state

EVERY_SECONDS = 60.0  # between checkpoints
SHARE = 32  # an eager step is taken with at least this part of all gradients
LEAST = 2**20  # and these bytes
RISE, FALL = 1.25, 0.9  # a loss has risen that is so many times the lowest, and not lower than this share of the first


class EarlyStopping(Callback):
    """Keep the weights of the best epoch, and stop after `patience` epochs without a better one (None: never).

    `monitor` names a figure of the epochs, the trainer's `monitor` by default; `mode` says which is better, where "auto" is
    "min" for losses and "max" for others. The best weights are restored at the end.
    """

    keeps: ClassVar[tuple[str, ...]] = ("best", "best_value", "stale")

    def __init__(
        self, patience: int | None = None, monitor: str | None = None, mode: Literal["auto", "min", "max"] = "auto"
    ) -> None:
        check_limits(patience=patience)
        if mode not in ("auto", "min", "max"):
            raise TrainingError(f"mode = {mode!r} is not valid; expected auto, min or max.")
        self.patience, self.monitor, self.mode = patience, monitor, mode
        self.best: dict[str, Tensor] = {}
        self.best_value, self.stale = float("nan"), 0

    def on_train_begin(self, trainer: Trainer) -> None:
        """Choose the figure. Raises `TrainingError` for one of images that are not given."""
        self.monitor = self.monitor or trainer.monitor
        if self.monitor.startswith("validation_") and trainer.validation is None:
            raise TrainingError(f"{self.monitor} cannot be monitored without validation images. Give validation=.")
        if self.mode == "auto":
            self.mode = "min" if "loss" in self.monitor else "max"

    def on_epoch_end(self, trainer: Trainer) -> None:
        value = trainer.figure(self.monitor)
        if not self.best or (value < self.best_value if self.mode == "min" else value > self.best_value):
            self.best_value, self.stale = value, 0
            self.best = copy_state(trainer.model)
        else:
            self.stale += 1
        if self.patience is not None and self.stale >= self.patience:
            trainer.stop()

    def on_train_end(self, trainer: Trainer) -> None:
        if self.best:
            load_state(trainer.model, self.best)


class WeightAverage(Callback):
    """An exponential moving average (EMA) of the weights: evaluated in their place, and what the model has in the end.

    average <- decay average + (1 - decay) weights         after every step
    """

    order: ClassVar[int] = 1
    keeps: ClassVar[tuple[str, ...]] = ("average",)

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise TrainingError(f"the decay of a weight average is {decay!r}; expected a number between 0 and 1.")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}

    def on_train_begin(self, trainer: Trainer) -> None:
        self.average = self.average or copy_state(trainer.model)

    @torch.no_grad()
    def on_step_end(self, trainer: Trainer) -> None:
        state = get_state(trainer.model)
        moving = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in moving], [state[n] for n in moving], 1 - self.decay)
        for name in state.keys() - set(moving):
            self.average[name].copy_(state[name])  # integers

    def on_validation_begin(self, trainer: Trainer) -> None:
        self._trained = copy_state(trainer.model)
        load_state(trainer.model, self.average)

    def on_epoch_end(self, trainer: Trainer) -> None:
        if self._trained:
            load_state(trainer.model, self._trained)
        self._trained = {}

    def on_train_end(self, trainer: Trainer) -> None:
        load_state(trainer.model, self.average)


class LastEpochsAverage(WeightAverage):
    """Stochastic weight averaging (SWA): the mean of the weights at the end of each of the last `epochs`, in their place."""

    keeps: ClassVar[tuple[str, ...]] = ("average", "count")

    def __init__(self, epochs: int) -> None:
        check_limits(epochs=epochs)
        self.epochs, self.count = epochs, 0
        super().__init__()

    def on_train_begin(self, trainer: Trainer) -> None:
        """Check that the trainer counts epochs. Raises `TrainingError` where it does not, or has fewer."""
        if not trainer.per_epoch or (trainer.epochs or 0) < self.epochs:
            raise TrainingError(f"swa={self.epochs} averages more epochs than the run's {trainer.epochs}. Lower it.")

    @torch.no_grad()
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_of_epoch == trainer.per_epoch and trainer.epoch >= (trainer.epochs or 0) - self.epochs:
            self.count += 1
            self.decay = 1 - 1 / self.count
            self.average = self.average or copy_state(trainer.model)
            super().on_step_end(trainer)

    def on_validation_begin(self, trainer: Trainer) -> None:
        if self.average:
            super().on_validation_begin(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self.average:
            super().on_train_end(trainer)


def averages(ema: float | None, swa: int) -> list[Callback]:
    """Return the callbacks of these averages, those that are set."""
    given = [WeightAverage(ema)] if ema is not None else []
    return [*given, *([LastEpochsAverage(swa)] if swa else [])]


class RisingLoss(Callback):
    """Warn at the end of a run whose loss rose well above its lowest, to about where it began: its rate is too high."""

    def on_train_end(self, trainer: Trainer) -> None:
        losses = [row["loss"] for row in trainer.history]
        low = min(losses, default=0.0)
        if losses and losses[-1] > max(RISE * low, FALL * losses[0]):
            rates = dict.fromkeys(group.get("initial_lr", group["lr"]) for group in trainer.optimizer.param_groups)
            warn_caller(
                f"the loss rose from {low:.3g} in epoch {losses.index(low) + 1} to {losses[-1]:.3g} in epoch {len(losses)}: "
                f"lr {', '.join(f'{rate:g}' for rate in rates)} is too high. Lower it, raise warmup, or set clip=1."
            )


class EagerSteps(Callback):
    """Take the optimizer's steps within the backward pass, whenever enough gradients are complete, and free these.

    The usual step after it uses the rest. For optimizers that treat every tensor on its own, as those of methods do.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        if not trainer.scaler.is_enabled():
            self.watch(trainer.optimizer)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Register a hook for every gradient of an optimizer."""
        self.optimizer, self._pending = optimizer, 0
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.limit = max(LEAST, sum(parameter.nbytes for parameter in parameters) // SHARE)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, parameter: Tensor) -> None:
        self._pending += parameter.nbytes
        if self._pending >= self.limit:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._pending = 0


class Checkpoint:
    """The state of one run in a folder. `identity` must be equal for the run to be continued, and so must be what the frozen
    `backbone` computes."""

    def __init__(self, folder: str | Path, identity: dict[str, Any], backbone: Backbone | None = None) -> None:
        self.folder, self.identity, self.backbone = Path(folder), identity, backbone
        self.file = self.folder / "state.pt"
        self._saved = time.monotonic()

    def due(self) -> bool:
        """True when a minute has passed since the last save."""
        return time.monotonic() - self._saved >= EVERY_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        make_folder(self.folder, "checkpoint")
        buffer = io.BytesIO()
        facts: dict[str, Any] = {"identity": self.identity}
        if self.backbone is not None:
            facts["computation"] = self.backbone.computing.record.model_dump_json()
        torch.save({**facts, **state}, buffer)
        write_bytes(self.file, buffer.getvalue())
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, if any. Raises `CheckpointMismatchError` for the state of a run with other settings."""
        if not self.file.exists():
            return None
        try:
            saved = torch.load(self.file, weights_only=True)
            identity, described = saved["identity"], saved.pop("computation", None)
            recorded = None if described is None else Computation.model_validate_json(described)
        except Exception as error:
            raise TrainingError(f"{self.file} cannot be read ({error}). Remove {self.folder} to start anew.") from error
        if identity != self.identity:
            raise CheckpointMismatchError(
                f"{self.folder} holds an unfinished run with {', '.join(differences(identity, self.identity))}. Finish it "
                "with its own settings, or start anew: give --restart, name another checkpoint folder, or remove this one."
            )
        if recorded and self.backbone and (changed := self.backbone.computing.difference(recorded)):
            raise CheckpointMismatchError(
                f"{self.folder} holds an unfinished run on a backbone that has the tensors of {self.backbone.spec} but "
                f"computes something else: {changed}. Load the backbone as it was then, or start anew: give --restart, name "
                "another checkpoint folder, or remove this one."
            )
        return saved

    def clear(self) -> None:
        """Remove the folder's state: the run is finished."""
        self.file.unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            shutil.rmtree(self.folder)


class CheckpointSaver(Checkpoint, Callback):
    """Save the training state in `folder` after every epoch and every minute, and resume from it where it is found.

    The run then continues exactly. `identity` is what must be equal, by default the shapes of the model's parameters and the
    trainer's arguments. The state of a run that ended stays until `clear()`.
    """

    order: ClassVar[int] = 2

    def __init__(self, folder: str | Path, identity: dict[str, Any] | None = None) -> None:
        super().__init__(folder, identity or {})
        self._described = identity is None

    def saved_state(self, trainer: Trainer) -> Mapping[str, Any] | None:
        self.identity = describe_run(trainer) if self._described else self.identity
        found = getattr(trainer.model, "backbone", None)
        self.backbone = found if isinstance(found, Backbone) else None
        return trainer.team.follow(self.load() if trainer.team.leads else None)

    def on_step_end(self, trainer: Trainer) -> None:
        if self.due():
            self.on_epoch_end(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        if trainer.team.leads:
            self.save(trainer.state_dict())


class MetricLogger(Callback):
    """Write each epoch's figures to `metrics.csv` in a folder, and to TensorBoard where it is installed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.file = Path(folder), Path(folder) / "metrics.csv"
        self._events: Any = None
        make_folder(self.folder, "log")

    def on_train_begin(self, trainer: Trainer) -> None:
        self.file.unlink(missing_ok=True)
        self.write(trainer.history)  # the epochs that are done, if the run was interrupted
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder))

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.write(trainer.history)
        if self._events is not None:
            for name, value in trainer.row.items():
                self._events.add_scalar(name, value, int(trainer.row["epoch"]))

    def write(self, history: list[dict[str, float]]) -> None:
        """Write the figures of all epochs, or of all that was tried."""
        if history:
            with self.file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(history[0]))
                writer.writeheader()
                writer.writerows(history)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    on_exception = on_train_end


class ProgressBar(Callback):
    """A bar on a terminal with the figures of the last epoch below it; `progress` shares the bars of a longer run."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress, self._stack, self._shared = progress or Progress("training"), ExitStack(), progress is not None

    def on_train_begin(self, trainer: Trainer) -> None:
        if not self._shared:
            self._stack.enter_context(self.progress)
        self._advance = self._stack.enter_context(self.progress.task("training", trainer.total or 0, trainer.step))

    def on_step_end(self, trainer: Trainer) -> None:
        self._advance(1)

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.progress.note("  ".join(f"{name} {value:.4g}" for name, value in trainer.row.items()))

    def on_train_end(self, trainer: Trainer) -> None:
        self._stack.close()

    on_exception = on_train_end


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Return what must be equal for a trainer to resume from another one's state."""
    shapes = {name: list(tensor.shape) for name, tensor in get_state(trainer.model).items()}
    parts = {name: type(getattr(trainer, name)).__name__ for name in ("model", "optimizer", "scheduler")}
    numbers = {n: getattr(trainer, n) for n in ("epochs", "total", "per_epoch", "accumulate", "clip", "seed")}
    return {**parts, **numbers, "loss": name_of(trainer.loss), "tensors": digest_of(shapes)}


def copy_state(model: Any) -> dict[str, Tensor]:
    """Return copies of all that training may change."""
    return {name: tensor.detach().clone() for name, tensor in get_state(model).items()}


def make_folder(folder: Path, purpose: str) -> None:
    """Make a folder where there is none. Raises `TrainingError` where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the {purpose} folder {folder}: {error.strerror}.") from error


def check_folder(folder: Path, purpose: str) -> None:
    """Check that a folder can be made and written to. Raises `TrainingError` where that is impossible."""
    try:
        check_place(folder / "state", makes_folder=True)
    except ModelpatchError as error:
        raise TrainingError(f"cannot make the {purpose} folder {folder}: {error}") from error


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """List the differences between two identities in words: `other images`, `epochs = 10 instead of 3`."""
    words = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            words += differences(before, now)
        elif before != now:
            plain = isinstance(before, str | int | float) and len(str(before)) <= 40
            words.append(f"{key} = {before!r} instead of {now!r}" if plain else f"other {key}")
    return words


class MethodEvents(Callback):
    """The work of a method on its models, each with a function that yields batches of plain training images."""

    def __init__(self, method: Method, models: Sequence[tuple[PatchedModel, Any]]) -> None:
        self.method, self.models = method, models

    def on_train_begin(self, trainer: Trainer) -> None:
        """Prepare the models of a run that begins. Raises `MethodError` for an added loss that has not seen it begin."""
        if self.method.losses and (trainer.resumed or len(self.models) > 1):
            raise MethodError(
                f"{self.method.name} with {type(self.method.losses[0]).__name__} cannot go on from a checkpoint, which does "
                "not hold what the added loss has seen, nor train several models. Give --restart, or remove the checkpoint."
            )
        for model, batches in () if trainer.resumed else self.models:
            for hook in self.method.all_hooks():
                hook.begin(model, batches)

    def on_step_begin(self, trainer: Trainer) -> None:
        for model, _ in self.models:
            for hook in self.method.all_hooks():
                hook.step(model, trainer.step, trainer.total or 0)
