"""The training loop: a model, batches, a loss, an optimizer; everything else is a callback.

    for each step      loss = train_step(batch), backward, for each of `accumulate` batches; clip; optimizer; scheduler
    for each epoch     evaluate `validation`, append a row to `history`

Override `train_step` for another loss. The order of batches follows the seed (see `batches.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from operator import length_hint
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from modelpatch.errors import DataError, DivergedError, TrainingError
from modelpatch.patch.model import PatchedModel, has_batch_statistics
from modelpatch.train.batches import BatchSource, Minibatch, as_source
from modelpatch.train.distributed import ALONE, Team
from modelpatch.train.settings import (
    Every,
    OptimizerLike,
    Precision,
    SchedulerLike,
    check_callbacks,
    check_limits,
    check_model,
    choose_dtype,
    make_optimizer,
    make_scheduler,
)

Figures = dict[str, float]
STATE = ("step", "epoch", "step_of_epoch", "loss_sum", "seconds", "stopping", "history")


class Callback:
    """Events of a run, in the order in which they happen; each does nothing unless overridden.

    Callbacks are called by ascending `order`, then as given; `on_train_end` in reverse, as contexts are left.
    """

    order: ClassVar[int] = 0
    keeps: ClassVar[tuple[str, ...]] = ()  # attributes that a checkpoint holds, tensors and plain values

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step, or before the next one of a resumed run."""

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Before an epoch's first step; the model is in train mode."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before a step's first batch."""

    def on_gradients(self, trainer: Trainer) -> None:
        """After the backward passes of a step, before its gradients are clipped and used."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After a step of the optimizer."""

    def on_validation_begin(self, trainer: Trainer) -> None:
        """Before the validation images are evaluated."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch; `trainer.row` holds its figures."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def on_exception(self, trainer: Trainer) -> None:
        """When an exception ends the run."""

    def saved_state(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """The state from which the run resumes (see `Trainer.state_dict`), if this callback has one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The attributes that a checkpoint holds."""
        return {name: getattr(self, name) for name in self.keeps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        vars(self).update(state)


class Trainer:
    """Train `model` on `data`, an iterable of (images, targets) such as a `DataLoader`, for `epochs` or a number of `steps`.

    `optimizer` is an instance, a class or a function from parameter groups to an instance. The groups are `groups`, by
    default one of all parameters that require gradients, with `lr`. `scheduler` is an instance or a function from the
    optimizer to one, stepped every `schedule_every`: "epoch" or "step". A step adds up the gradients of `accumulate` batches
    as if they were one, and scales gradients whose norm exceeds `clip`. `validation` is evaluated after each epoch: its loss
    and `metrics`, functions of (outputs, targets) whose means are reported, or objects with torchmetrics' `update`, `compute`
    and `reset`. `monitor` names the figure for callbacks and `ReduceLROnPlateau`. `precision="auto"` is bfloat16 on GPUs that
    have it. `checkpoint_activations` computes activations of a `PatchedModel` again in the backward pass instead of keeping
    them. In a `team` of processes each gives the same batches and computes its part of them.
    """

    def __init__(
        self,
        model: nn.Module,
        data: BatchSource | Iterable[Any],
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
        *,
        optimizer: OptimizerLike = torch.optim.AdamW,
        lr: float | None = None,
        groups: list[dict[str, Any]] | None = None,
        scheduler: SchedulerLike | None = None,
        schedule_every: Every | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        accumulate: int = 1,
        clip: float = 0.0,
        validation: BatchSource | Iterable[Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        monitor: str | None = None,
        precision: Precision = "auto",
        checkpoint_activations: bool = False,
        device: torch.device | str | None = None,
        seed: int = 0,
        callbacks: Iterable[Callback] = (),
        team: Team = ALONE,
    ) -> None:
        check_model(model, loss)
        check_limits(epochs=epochs, steps=steps, accumulate=accumulate)
        self.model, self.loss, self.team, self.seed = model, loss, team, seed
        self.device = torch.device(device) if device else next(model.parameters()).device
        model.to(self.device)
        self.data = as_source(data, seed)
        self.validation = None if validation is None else as_source(validation, seed, "validation")
        self.accumulate, self.clip, self.metrics = accumulate, clip, dict(metrics or {})
        self.monitor = monitor or ("loss" if validation is None else "validation_loss")
        self.per_epoch = -(-length_hint(self.data) // accumulate) or None  # where the number of batches is known
        self.epochs = epochs or (None if steps else 10)
        self.total = steps or (self.per_epoch * self.epochs if self.per_epoch and self.epochs else None)
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = groups or [{"params": params} | ({} if lr is None else {"lr": lr})]
        self.optimizer = make_optimizer(optimizer, groups, model)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scheduler, self.schedule_every = make_scheduler(scheduler, self.optimizer, schedule_every)
        self.dtype = choose_dtype(precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.callbacks: list[Callback] = check_callbacks(callbacks, Callback)
        if checkpoint_activations:
            if not isinstance(model, PatchedModel):
                raise TrainingError(
                    f"checkpoint_activations takes the segments of a PatchedModel; the model is a {type(model).__name__}. "
                    "Leave it out and use torch.utils.checkpoint in the model."
                )
            model.gradient_checkpointing = True
        self.step = self.epoch = self.step_of_epoch = 0
        self.lr: float = self.optimizer.param_groups[0]["lr"]
        self.begun = self.resumed = self.stopping = False
        self.loss_sum, self.seconds, self.clock = 0.0, 0.0, time.perf_counter()
        self.history: list[Figures] = []
        self.row: Figures = {}

    # the parts that may be overridden -------------------------------------------------------------------------

    def train_step(self, batch: Minibatch) -> Tensor:
        """Return the mean loss of a batch, with its graph."""
        return self.loss(self.forward(batch), batch.targets)

    def validation_step(self, batch: Minibatch) -> tuple[Tensor, Tensor | None]:
        """Return the outputs for a batch and its mean loss, if there is one."""
        outputs = self.forward(batch)
        return outputs, self.loss(outputs, batch.targets)

    def forward(self, batch: Minibatch) -> Any:
        """Return the model's outputs in float32; in train mode it computes in the chosen precision."""
        model: Any = self.model
        with self.autocast():
            outputs = model.run_from(batch.inputs, batch.start) if batch.start else model(batch.inputs)
        return outputs.float() if isinstance(outputs, Tensor) else outputs

    def weigh(self, batch: Minibatch) -> Tensor:
        """Return how much (B,) each image counts in the mean loss of a batch."""
        return torch.ones(len(batch))

    def measure(self, answers: Iterable[tuple[Tensor, Any]]) -> Figures:
        """Return the metrics of batches of outputs and targets: means of functions, and what objects compute."""
        sums, count = dict.fromkeys(self.metrics, 0.0), 0
        meters = {name: metric for name, metric in self.metrics.items() if hasattr(metric, "update")}
        for outputs, targets in answers:
            count += len(outputs)
            for name, metric in self.metrics.items():
                if name in meters:
                    metric.update(outputs, targets)
                else:
                    sums[name] += float(metric(outputs, targets)) * len(outputs)
        figures = {name: total / max(count, 1) for name, total in sums.items()}
        for name, meter in meters.items():
            figures[name] = float(meter.compute())
            meter.reset()
        return figures

    # the loop -------------------------------------------------------------------------------------------------

    def train(self) -> list[Figures]:
        """Train until the last step, or until a callback stops. Returns `history`, one row of figures an epoch.

        Raises `DivergedError` for a loss that is not finite.
        """
        for _ in self.steps():
            pass
        return self.history

    def steps(self) -> Iterator[None]:
        """Train step by step: yields after each one, and after the end of its epoch if it was the last one of it."""
        try:
            self.begin()
            while not self.finished:
                self.model.train()
                self.notify("on_epoch_begin")
                if not self.team.alone and has_batch_statistics(self.model):
                    raise TrainingError(
                        f"the model learns batch statistics, and those of {len(self.team.ranks)} parts of a batch are not "
                        "the batch's. Set statistics='frozen' or 'recomputed', or start one process."
                    )
                self.clock = time.perf_counter() - self.seconds
                batches = self.data.batches(self.epoch, self.step_of_epoch * self.accumulate)
                group = list(islice(batches, self.accumulate))
                if not group and not self.step_of_epoch:
                    raise DataError(f"the data has no batches in epoch {self.epoch + 1}; expected at least one.")
                while group:
                    self._step(group)
                    group = [] if self.step == self.total else list(islice(batches, self.accumulate))
                    if group:
                        yield
                self._end_epoch()
                yield
            self.notify("on_train_end")
        except BaseException:
            self.notify("on_exception")
            raise

    def begin(self, saved: Mapping[str, Any] | None = None) -> None:
        """Seed the random numbers and resume from `saved`, or from what a callback has saved, if anything."""
        if self.begun:
            return
        self.begun = True
        torch.manual_seed(self.seed)
        states = [callback.saved_state(self) for callback in self.callbacks]
        saved = saved or next(filter(None, states), None)
        self.resumed = bool(saved)
        if saved:
            self.load_state_dict(saved)
        self.notify("on_train_begin")
        if saved:  # callbacks may draw numbers
            torch.set_rng_state(saved["random"])
            if len(saved["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(saved["cuda"])

    def stop(self) -> None:
        """End the run after this epoch."""
        self.stopping = True

    @property
    def finished(self) -> bool:
        """True after the last step."""
        return self.stopping or (self.epoch == self.epochs if self.total is None else self.step >= self.total)

    def _step(self, group: list[Minibatch]) -> None:
        self.notify("on_step_begin")
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward([batch.to(self.device) for batch in group])
        self.team.add_up_gradients(self.trained, loss)
        self.notify("on_gradients")
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr = self.optimizer.param_groups[0]["lr"]
        if self.schedule_every == "step" and self.scheduler is not None:
            self.scheduler.step()
        self.loss_sum += loss.item()
        self.step += 1
        self.step_of_epoch += 1
        self.notify("on_step_end")

    def _backward(self, group: list[Minibatch]) -> Tensor:
        """Add up the gradients of this process's part of some batches, as if they were one. Returns its part of the loss."""
        weights = [float(self.weigh(batch).sum()) for batch in group]
        whole, total = sum(weights), torch.zeros((), device=self.device)
        for batch, weight in zip(group, weights, strict=True):
            if not self.team.alone:
                batch = batch.part(self.team.part(len(batch)))
                weight = float(self.weigh(batch).sum())
            if weight:
                loss = self.train_step(batch)
                loss = loss if weight == whole else weight / whole * loss
                self.scaler.scale(loss).backward()
                total += loss.detach()
        return total

    def _end_epoch(self) -> None:
        row = {"epoch": self.epoch + 1, "loss": self.loss_sum / max(self.step_of_epoch, 1)}
        if not math.isfinite(row["loss"]):
            rates = dict.fromkeys(group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups)
            raise DivergedError(
                f"the loss is {row['loss']} in epoch {self.epoch + 1} at lr {', '.join(f'{rate:g}' for rate in rates)}. Lower "
                "it, or set clip=1."
            )
        if self.validation is not None:
            self.notify("on_validation_begin")
            row |= {f"validation_{name}": value for name, value in self.evaluate(self.validation).items()}
        self.row = row | {"lr": self.lr, "seconds": time.perf_counter() - self.clock}
        self.history.append(self.row)
        if self.schedule_every == "epoch" and self.scheduler is not None:
            self.scheduler.step(*([self.figure()] if isinstance(self.scheduler, ReduceLROnPlateau) else []))
        self.epoch += 1
        self.step_of_epoch, self.loss_sum, self.seconds = 0, 0.0, 0.0
        self.notify("on_epoch_end")

    # evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, data: BatchSource | Iterable[Any]) -> Figures:
        """Return the mean `loss`, where there is one, and the metrics of some data; the model is in eval mode."""
        losses: list[tuple[float, float]] = []

        def answer() -> Iterator[tuple[Tensor, Any]]:
            for batch in as_source(data, self.seed).batches(0):
                held = batch.to(self.device)
                outputs, loss = self.validation_step(held)
                if loss is not None:
                    losses.append((float(loss), float(self.weigh(held).sum())))
                yield outputs.cpu(), batch.targets

        self.model.eval()
        figures = self.measure(answer())
        weight = sum(count for _, count in losses)
        return ({"loss": sum(loss * count for loss, count in losses) / weight} if weight else {}) | figures

    def figure(self, name: str | None = None) -> float:
        """Return a figure of the last epoch, the one that is monitored by default. Raises `TrainingError` for another name."""
        name = name or self.monitor
        if name not in self.row:
            raise TrainingError(f"there is no figure {name!r} to monitor. An epoch's figures: {', '.join(self.row)}.")
        return self.row[name]

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which the model computes in the chosen precision, if it is in train mode."""
        if self.dtype == torch.float32 or not self.model.training:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    # state ----------------------------------------------------------------------------------------------------

    def notify(self, event: str) -> None:
        """Call an event of all callbacks."""
        for callback in reversed(self.callbacks) if event == "on_train_end" else self.callbacks:
            getattr(callback, event)(self)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an interrupted run resumes from, as tensors and plain values."""
        self.seconds = time.perf_counter() - self.clock if self.step_of_epoch else 0.0
        return {
            "model": get_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "scaler": self.scaler.state_dict(),
            "callbacks": [(type(one).__name__, state) for one in self.callbacks if (state := one.state_dict())],
            "state": {name: getattr(self, name) for name in STATE},
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, but for the random numbers, which `begin` restores."""
        load_state(self.model, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        waiting = list(saved["callbacks"])
        for callback in self.callbacks:
            found = next((one for one in waiting if one[0] == type(callback).__name__), None)
            if found is not None:
                waiting.remove(found)
                callback.load_state_dict(found[1])
        vars(self).update(saved["state"])


def get_state(model: Any) -> dict[str, Tensor]:
    """Return all that training may change: the patch's own tensors of a `PatchedModel`, the `state_dict` of others."""
    return model.state() if hasattr(model, "load_state") else model.state_dict()


def load_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """Continue from what `get_state` gave."""
    if hasattr(model, "load_state"):
        model.load_state(state)
    else:
        model.load_state_dict(state)
