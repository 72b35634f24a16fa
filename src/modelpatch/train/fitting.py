"""Train a patch: one loop for every method.

    images -> [frozen prefix, cached] -> patched spans and frozen rest -> head -> the loss of the task's kind

The backbone is hashed before and after; a fit that would move it fails. Every random choice follows `seed`, and each
batch's order and augmentation follow (seed, epoch, step) alone, so that a run killed at any moment resumes from its last
checkpoint to the very same patch.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modelpatch
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.augmentation import Augmentation, choose_augmentation
from modelpatch.data.images import pieces
from modelpatch.data.task import Task
from modelpatch.errors import (
    CheckpointMismatchError,
    DataError,
    DivergedError,
    MethodError,
    TrainingError,
    TrainingWarning,
)
from modelpatch.methods.method import Batch, Method
from modelpatch.methods.registry import make_method
from modelpatch.patch.contents import Patch
from modelpatch.patch.header import BackboneRecord
from modelpatch.tasks.kind import Result, balance, kind_of
from modelpatch.train.cache import PlainInputs
from modelpatch.train.checkpoint import Checkpoint, restore_random
from modelpatch.train.distributed import ALONE, Team
from modelpatch.train.evaluation import store_as
from modelpatch.train.inputs import Inputs, InputSource, OwnInputs
from modelpatch.train.lean import EagerSteps, RemadeWeights
from modelpatch.train.logs import RunLog
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitSettings, check_settings

__all__ = ["Fit", "FitSettings", "check_settings", "fit"]


def fit(
    backbone: Backbone,
    data: Task,
    method: Method | str,
    *,
    out: str | Path | None = None,
    reuse: bool = False,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Patch:
    """Train a patch of `method` (or of its spelling, see `make_method`) for the task and measure it on the test images.

    `settings` are the fields of `FitSettings`. `out` names the patch's file; with `reuse` a file that the very same run
    wrote earlier is read instead. `checkpoint` names a folder in which training state is kept every minute and every
    epoch and from which an interrupted run resumes exactly; it is emptied once the patch is made and its file, if any,
    written. `log` names a folder for `metrics.csv` and, where TensorBoard is installed, its event file. `progress` draws a
    bar on a terminal. Where `torch.distributed` was started, its processes cut every batch among them and all return the
    patch that one alone would have trained, but for rounding; the first writes the files.

    Returns the patch with its measured test accuracy in `metrics`. Raises `MethodError`, `MethodNotApplicableError`,
    `DataError`, `CheckpointMismatchError` for a checkpoint or a reused file of another run, `DivergedError` for a loss
    that is not finite, other `TrainingError`s, and `BackboneChangedError` if anything wrote to the frozen tensors.
    """
    chosen = check_settings(settings)
    if not isinstance(backbone, Backbone):
        raise TrainingError(f"{backbone!r} is not a backbone. Load it first: mp.load_backbone(...).")
    if not isinstance(data, Task):
        raise DataError(f"{data!r} is not a task's data. Load it first: mp.load_task(...).")
    if isinstance(method, str):
        method = make_method(method)
    if not isinstance(method, Method):
        raise MethodError(f"{method!r} is not a method. Expected one like ScaleBias(lr=0.003), or its spelling.")
    team = Team.everyone()
    bar = Progress(f"{method.name} on {data.task.name}") if progress and team.leads else quiet_progress()
    with bar, RunLog(log if team.leads else None) as run_log:
        run = Fit(backbone, data, method, chosen, bar, run_log, checkpoint, team=team)
        if out is not None and team.follow(reuse and Path(out).exists()):
            return run.finished(Path(out))
        patch = run.run()
        if chosen.dtype != "float32":
            patch = store_as(backbone, patch, data, chosen.dtype)
        if team.leads:
            if out is not None:
                patch.save(out)
            run.finish()
        team.follow(None)  # nobody goes on before the files are as they will be
    return patch


@dataclass
class State:
    """Where the loop stands: steps done, the best epoch so far and the history of epochs."""

    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    loss_sum: float = 0.0


class Fit:
    """One run of `fit`, in the order in which things happen.

    `eager` runs may use gradients before all of them are complete.
    """

    eager = True

    def __init__(
        self,
        backbone: Backbone,
        data: Task,
        method: Method,
        settings: FitSettings,
        bar: Progress,
        log: RunLog,
        checkpoint: str | Path | None,
        source: InputSource | None = None,
        team: Team = ALONE,
    ) -> None:
        self.backbone, self.method, self.settings, self.bar, self.log = backbone, method, settings, bar, log
        self.team = team
        if settings.early_stopping and data.validation is None and not settings.validation:
            self.settings = settings = replace(settings, validation=0.1)
        self.data = data.with_validation(settings.validation, settings.seed) if settings.validation else data
        self.kind = kind_of(data.task.kind)
        self.kind.check_libraries()
        self.kind.check_loss(settings.class_weights != "none", settings.label_smoothing)
        self.preprocessing = settings.seen(backbone.preprocessing, data.task.kind)
        backbone.check_image_size(self.preprocessing.image_size)
        self.augmentation: Augmentation = choose_augmentation(settings.augment, self.data.train)
        self.record = BackboneRecord.of(backbone)
        self.identity = self._identity()
        self.digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.checkpoint = Checkpoint(checkpoint, self.identity) if checkpoint else None
        self.device = backbone.device
        self.source = source or self._own_inputs()

    def run(self, start: Mapping[str, Tensor] | None = None) -> Patch:
        """Train from the base, or from what `start` holds of the model's state (see `PatchedModel.start_from`)."""
        patch = self._make_patch(self.train(start))
        self.backbone.verify()
        return patch

    def train(self, start: Mapping[str, Tensor] | None = None) -> float:
        """Train the model, or go on from the checkpoint, until all epochs are done. Returns the seconds it took."""
        began = time.perf_counter()
        saved = self.team.follow(self.checkpoint.load() if self.checkpoint and self.team.leads else None)
        self.begin(saved, start)
        if saved is not None:
            restore_random(saved)
        self._train()
        return time.perf_counter() - began

    def begin(self, saved: Mapping[str, Any] | None = None, start: Mapping[str, Tensor] | None = None) -> None:
        """Everything before the first step, or before the next one of a run whose `snapshot` was `saved`."""
        self.draft(start)
        self.optimizer = self.method.make_optimizer(self.model, self.backbone)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype() == torch.float16)
        whole = self.settings.clip or self.scaler.is_enabled() or not self.team.alone  # needs all gradients at once
        if self.eager and not whole:
            EagerSteps(self.optimizer)
        self.state = State()
        if saved is None:
            self.log.begin()
            self.method.prepare(self.model, self._plain_batches)
        else:
            self._restore(saved)
        self.open_inputs()

    def draft(self, start: Mapping[str, Tensor] | None = None) -> None:
        """The model before the first step; all that is random in it follows the seed."""
        torch.manual_seed(self.settings.seed)
        settings, classes = self.settings, len(self.data.classes)
        decoder = self.kind.make_head(
            self.backbone, classes, self.preprocessing.image_size, settings.decoder, settings.taps
        )
        self.model = self.method.draft(self.backbone, classes, decoder).to(self.device)
        self.source.lend(self.model)
        if start is not None:
            self.model.start_from(start)
        self.remade = RemadeWeights(self.model)

    def open_inputs(self) -> None:
        """What the model is trained on, and what is held out for it."""
        self.labels = self.source.labels("train")
        self.inputs = self.source.inputs(self.model, "train", augmented=True)
        self._held = self._held_out()

    def finished(self, path: Path) -> Patch:
        """The patch of this run from its file. Raises `CheckpointMismatchError` for one of another run."""
        patch = Patch.load(path)
        if patch.created.get("run") != self.digest:
            raise CheckpointMismatchError(
                f"{path} is of a run with another backbone, method, settings or images. Name another "
                "place, or replace it: --force, or --restart for what an interrupted run left."
            )
        return patch

    def finish(self) -> None:
        """Forget the training state: the patch is where it should be."""
        if self.checkpoint:
            self.checkpoint.clear()

    # inputs -------------------------------------------------------------------------------------------------

    def _own_inputs(self) -> OwnInputs:
        settings = self.settings
        return OwnInputs(
            self.backbone,
            self.data,
            self.preprocessing,
            self.augmentation,
            views=min(settings.views, settings.epochs),
            seed=settings.seed,
            memory=settings.memory,
            cache=settings.cache,
            bar=self.bar,
        )

    def _plain_batches(self) -> Iterator[Tensor]:
        order = self._order(0)
        for rows in order.split(max(self.settings.batch_size, 64)):
            yield self._to_device(self.source.plain("train", rows))

    def _held_out(self) -> tuple[Inputs, Tensor] | None:
        if self.data.validation is None or not (self.settings.early_stopping or self.settings.validation):
            return None
        return self.source.inputs(self.model, "validation", augmented=False), self.source.labels("validation")

    def _batches(self, epoch: int) -> list[Tensor]:
        """The epoch's rows, batch by batch; a last image of its own joins the batch before, for layers that need two."""
        order, size = self._order(epoch), self.settings.batch_size
        batches = list(order.split(size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [order[-size - 1 :]]
        return batches

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data.train), generator=generator)

    def _to_device(self, x: Tensor) -> Tensor:
        x = x.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    # the loop -----------------------------------------------------------------------------------------------

    def _train(self) -> None:
        total = self.per_epoch * self.settings.epochs
        with self.bar.task("training", total, self.state.step) as advance:
            for _ in self.steps(total):
                advance(1)

    @property
    def per_epoch(self) -> int:
        """The number of batches in an epoch."""
        return len(self._batches(0))

    def steps(self, total: int) -> Iterator[None]:
        """Takes the steps up to `total`, or until stopped early: yields after each of them, with its epoch ended if it was
        the last."""
        per_epoch, weights = self.per_epoch, self._class_weights()
        if warning := self.method.warn(sum(self.settings.factor(step, total) for step in range(total))):
            warnings.warn(f"{self.method.name}: {warning}", TrainingWarning, stacklevel=6)
        if self.method.head_lr > self.kind.head_rate:
            rate = f"head_lr={self.method.head_lr:g}, the rate for linear heads. Set head_lr=0.001"
            text = f"the head of a {self.kind.name} task learns little at {rate}."
            warnings.warn(text, TrainingWarning, stacklevel=6)
        patience = self.settings.early_stopping or total
        batches: list[Tensor] = []
        while self.state.step < total and self.state.stale < patience:
            epoch, number = divmod(self.state.step, per_epoch)
            if not batches:
                batches = self._batches(epoch)
                self.train_mode()
                self._check_parts()
            self._step(batches[number], epoch, number, total, weights)
            if number + 1 == per_epoch or self.state.step == total:
                self._end_epoch(epoch, number + 1)
                batches = []
            elif self.checkpoint and self.checkpoint.due():
                self._save()
            yield

    def _step(self, rows: Tensor, epoch: int, number: int, total: int, weights: Tensor | None) -> None:
        self.method.before_step(self.model, self.state.step, total)
        factor = self.settings.factor(self.state.step, total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        targets = self._targets(self.inputs, self.labels, rows, epoch, number)
        loss = self._backward(rows, self.inputs.batch(rows, epoch, number), targets, weights)
        self.team.add_up_gradients((p for group in self.optimizer.param_groups for p in group["params"]), loss)
        if self.settings.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.state.loss_sum += loss.item()
        self.state.step += 1

    def train_mode(self) -> None:
        """Put what the patch trains into train mode, everything frozen into eval mode."""
        self.model.train()

    def _backward(self, rows: Tensor, inputs: Tensor, targets: Any, weights: Tensor | None) -> Tensor:
        """Gradients of this process's part of the batch, and its loss, both times the part's share of the batch."""
        part = self.team.part(len(rows))
        targets = self.kind.move(targets, self.device)
        counts = self.kind.weigh_images(targets, weights)
        share = float(counts[part].sum() / counts.sum().clamp(min=1e-12))
        if not share:
            return torch.zeros((), device=self.device)
        x, own = self._to_device(inputs[part]), targets[part]
        answers = self._forward(x, own)
        loss = self.kind.loss(answers, own, weights, self.settings.label_smoothing)
        added = self.method.added_loss(self.model, Batch(x, self.inputs.start, answers, own))
        self.scaler.scale(share * (loss + added)).backward()
        return share * loss.detach()

    def _check_parts(self) -> None:
        if not self.team.alone and self.model.uses_batch_statistics:
            raise TrainingError(
                f"{self.method.name} learns batch statistics, and those of {len(self.team.ranks)} parts of a batch are not "
                "the batch's. Set statistics='frozen' or 'recomputed', or start no more processes than tasks."
            )

    def _forward(self, inputs: Tensor, targets: Any) -> Any:
        try:
            with self._autocast(), self.remade() if self.model.reweighted else nullcontext():
                read = self.model.head_input(inputs, self.inputs.start)
                return self.kind.run_head(self.model.head, read, targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"batch statistics cannot be learned from a batch of {len(inputs)} at {self.preprocessing.image_size} px: a "
                "layer has one value a channel. Raise batch_size or image_size, or freeze the statistics."
            ) from error

    def _end_epoch(self, epoch: int, steps: int) -> None:
        row = {"epoch": epoch + 1, "loss": self.state.loss_sum / steps, "lr": self.optimizer.param_groups[0]["lr"]}
        if not torch.isfinite(torch.tensor(row["loss"])):
            raise DivergedError(
                f"the loss is {row['loss']} in epoch {epoch + 1} at lr {self.method.lr}, head_lr {self.method.head_lr}. "
                "Lower them, or set clip=1."
            )
        self.state.loss_sum = 0.0
        if self._held is not None:
            row[f"validation_{self.data.task.metric}"] = score = self._score(*self._held)
            if score > self.state.best_score:
                self.state.best_score, self.state.stale = score, 0
                self.state.best = {name: tensor.clone() for name, tensor in self.model.state().items()}
            else:
                self.state.stale += 1
        self.state.history.append(row)
        self.log.write(row)
        self.bar.note("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        self._save()

    def _score(self, inputs: Inputs, labels: Tensor) -> float:
        return self._evaluate(inputs, labels).score

    def _evaluate(self, inputs: Inputs, labels: Tensor) -> Result:
        found = self._answers(inputs, len(labels))
        batches = ((answers, self._targets(inputs, labels, rows, 0, step)) for rows, step, answers in found)
        return self.kind.measure(self.data.classes, batches)

    @torch.no_grad()
    def _answers(self, inputs: Inputs, count: int) -> Iterator[tuple[Tensor, int, Tensor]]:
        """The model's answers for plain images, batch by batch, on the CPU."""
        self.model.eval()
        for step, rows in enumerate(torch.arange(count).split(64)):
            x = self._to_device(inputs.batch(rows, 0, step))
            parts = pieces(x) if inputs.start == 0 else (x,)
            yield rows, step, torch.cat([self.model.run_from(part, inputs.start).float().cpu() for part in parts])

    def logits(self, split: str) -> Tensor:
        """The trained model's logits (N, K) for a split's plain images, on the CPU."""
        inputs = self.source.inputs(self.model, split, augmented=False)
        return torch.cat([answers for *_, answers in self._answers(inputs, len(self.source.labels(split)))])

    def _class_weights(self) -> Tensor | None:
        if self.settings.class_weights == "none":
            return None
        counts = torch.zeros(len(self.data.classes), dtype=torch.long)
        for rows in torch.arange(len(self.labels)).split(64):
            counts += self.kind.count_classes(self._targets(self.inputs, self.labels, rows), len(counts))
        return balance(counts).to(self.device)

    def _targets(self, inputs: Inputs, labels: Tensor, rows: Tensor, *view: int) -> Any:
        """The targets of the batch that `inputs.batch` gives for a view, or of plain images without one."""
        if not (self.kind.dense and isinstance(inputs, PlainInputs)):
            return labels[rows]
        return inputs.targets(rows, *view) if view else inputs.plain_targets(rows)

    def _dtype(self) -> torch.dtype:
        if self.settings.precision != "auto":
            return getattr(torch, self.settings.precision)
        fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._dtype()
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    # state --------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued, or a patch's file to be of this run."""
        return {
            "backbone": self.backbone.fingerprint,
            "task": self.data.task.model_dump(mode="json"),
            "images": self.data.train.digest,
            "validation": self.data.validation.digest if self.data.validation is not None else None,
            "method": self.method.name,
            "hyperparameters": self.method.hyperparameters(),
            "settings": asdict(self.settings),
        }

    def snapshot(self) -> dict[str, Any]:
        """What an interrupted run goes on from, but for torch's random state."""
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {"model": self.model.state(), **parts, "state": asdict(self.state)}

    def _save(self) -> None:
        if self.checkpoint and self.team.leads:
            self.checkpoint.save(self.snapshot())

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.state = State(**saved["state"])

    def _make_patch(self, seconds: float) -> Patch:
        if self.state.best:
            self.model.load_state(self.state.best)
        patch = self.make_patch(self.record, seconds)
        result = self._evaluate(self.source.inputs(self.model, "test", augmented=False), self.source.labels("test"))
        metrics: dict[str, Any] = {f"test_{name}": value for name, value in result.figures.items()}
        if self.state.best:
            metrics[f"validation_{self.data.task.metric}"] = self.state.best_score
        return patch.with_metrics(**metrics)

    def make_patch(self, backbone: BackboneRecord, seconds: float) -> Patch:
        """What the model has become as a patch of this backbone, not measured."""
        patch = self.model.to_patch(
            self.data.task, preprocessing=self.preprocessing, method=self.method, created=self._facts(seconds)
        )
        return replace(patch, backbone=backbone)

    def _facts(self, seconds: float) -> dict[str, Any]:
        return {
            "modelpatch": modelpatch.__version__,
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(seconds, 2),
            "device": self.device.type,
            "train_images": len(self.data.train),
            "trainable_parameters": self.method.count_parameters(self.backbone),
            "augmentation": self.augmentation.name,
            "settings": asdict(self.settings),
            "data": dict(self.data.facts),
            "run": self.digest,
        }
