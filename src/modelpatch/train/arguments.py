"""The arguments of a trainer as users give them, checked: optimizers, schedulers, callbacks, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from modelpatch.errors import TrainingError
from modelpatch.patch.model import PatchedModel

OptimizerLike = Optimizer | Callable[[Any], Optimizer]
SchedulerLike = LRScheduler | Callable[[Optimizer], LRScheduler]
Every = Literal["step", "epoch"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


def make(given: Any, kind: type, name: str, source: str, argument: Any, example: str) -> Any:
    """Return `given`, an instance of a `kind`, or what it makes of its one argument. Raises `TrainingError` for others."""
    expected = f"Expected a torch.optim {kind.__name__}, its class, or a function from {source} to one: {example}."
    if isinstance(given, kind):
        return given
    if not callable(given):
        raise TrainingError(f"the {name} is {given!r}. {expected}")
    try:
        made = given(argument)
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"the {name} {name_of(given)} cannot be made from {source} alone ({error}). {expected}"
        ) from error
    if not isinstance(made, kind):
        raise TrainingError(f"the {name} {name_of(given)} made a {type(made).__name__}. {expected}")
    return made


def make_optimizer(given: Any, groups: list[dict[str, Any]], model: nn.Module) -> Optimizer:
    """Return the optimizer: `given` itself, or what it makes of parameter groups.

    Raises `TrainingError` where it is none, or holds other parameters than those of the model that require gradients.
    """
    example = "optimizer=torch.optim.SGD with lr=0.1, or functools.partial(torch.optim.SGD, lr=0.1)"
    made = make(given, Optimizer, "optimizer", "parameter groups", groups, example)
    ours = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if foreign := [p for group in made.param_groups for p in group["params"] if id(p) not in ours]:
        raise TrainingError(
            f"the optimizer holds {len(foreign)} parameters that are not the model's or require no gradients. Expected those "
            "of [p for p in model.parameters() if p.requires_grad]."
        )
    return made


def make_scheduler(given: Any, optimizer: Optimizer, every: Every | None) -> tuple[Any, Every]:
    """Return the scheduler, `given` itself, what it makes of the optimizer, or None, and how often it steps.

    That is as told, else every step for those whose documentation says so, else every epoch. Raises `TrainingError` for
    another scheduler, or one that cannot step so.
    """
    example = "functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10)"
    made = given if given is None else make(given, LRScheduler, "scheduler", "an optimizer", optimizer, example)
    if made is not None and made.optimizer is not optimizer:
        raise TrainingError(f"the scheduler {type(made).__name__} belongs to another optimizer. Give one: {example}.")
    if every not in (None, "step", "epoch"):
        raise TrainingError(f"schedule_every is {every!r}; expected 'step' or 'epoch'.")
    if isinstance(made, ReduceLROnPlateau) and every == "step":
        raise TrainingError("ReduceLROnPlateau reads a figure of an epoch. Set schedule_every='epoch'.")
    return made, every or ("step" if isinstance(made, OneCycleLR | CyclicLR) else "epoch")


def name_of(given: Any) -> str:
    """Return a name of a class, function, partial or object that is the same in another process."""
    if isinstance(given, partial):
        options = [*map(name_of, given.args), *(f"{key}={name_of(value)}" for key, value in given.keywords.items())]
        return f"{name_of(given.func)}({', '.join(options)})"
    text = getattr(given, "__qualname__", None) or repr(given)
    return type(given).__qualname__ if " at 0x" in text else text


def check_model(model: Any, loss: Any) -> None:
    """Raises `TrainingError` for a model without parameters to train, or a loss that cannot be called."""
    if not isinstance(model, nn.Module):
        raise TrainingError(
            f"the model is {str(model)[:100]!r}. Expected an nn.Module, such as method.build(backbone, task)."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            f"no parameter of the {type(model).__name__} requires gradients. Call requires_grad_() on what is to be trained."
        )
    if not callable(loss):
        raise TrainingError(
            f"the loss is {loss!r}. Expected a function of (outputs, targets), such as F.cross_entropy."
        )


def recompute_activations(model: nn.Module) -> None:
    """Have a patched model compute activations again in the backward pass. Raises `TrainingError` for another model."""
    if not isinstance(model, PatchedModel):
        raise TrainingError(
            f"checkpoint_activations takes the segments of a PatchedModel; the model is a {type(model).__name__}. Leave it "
            "out and use torch.utils.checkpoint in the model."
        )
    model.gradient_checkpointing = True


def check_limits(**limits: Any) -> None:
    """Raises `TrainingError` for a number of epochs, steps or batches below 1; None stands for no limit."""
    for name, value in limits.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise TrainingError(f"{name} = {value!r} is not valid; expected a whole number from 1 on.")


def check_callbacks(given: Any, kind: type) -> list[Any]:
    """Return the callbacks in the order in which they are called. Raises `TrainingError` for other things."""
    expected = "Expected a list of modelpatch.train.Callback instances"
    if isinstance(given, kind) or not isinstance(given, Iterable):
        raise TrainingError(f"callbacks is {given!r}. {expected}: callbacks=[EarlyStopping(...)].")
    callbacks = list(given)
    for one in callbacks:
        if isinstance(one, type):
            raise TrainingError(f"the callback {one.__name__} is a class. {expected}: {one.__name__}(...).")
        if not isinstance(one, kind):
            raise TrainingError(f"the callback {one!r} is a {type(one).__name__}. {expected}.")
    return sorted(callbacks, key=lambda one: one.order)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of the forward pass; `auto` is bfloat16 on GPUs that have it. Raises `TrainingError` for others."""
    if precision not in get_args(Precision):
        raise TrainingError(
            f"precision = {precision!r} is not valid; expected one of {', '.join(get_args(Precision))}."
        )
    if precision != "auto":
        return getattr(torch, precision)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
