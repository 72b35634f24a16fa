"""Settings of a fit, plain values, its options, objects from Python, and the arguments of a trainer, checked."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.augmentation import AugmentName
from modelpatch.errors import TrainingError
from modelpatch.tasks.kind import kind_of
from modelpatch.text import nearest

OptimizerLike = Optimizer | Callable[[Any], Optimizer]
SchedulerLike = LRScheduler | Callable[[Optimizer], LRScheduler]
Every = Literal["step", "epoch"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
# settings of steps, which a head that is solved does not take
STEPWISE = ("schedule", "drops", "warmup", "clip", "sampling", "mixup", "cutmix", "drop_path", "layer_decay", "swa")


def _split_names(given: Any) -> Any:
    """`a,b` as the names it spells, as a command line gives them."""
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
PositiveFiniteFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFiniteFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Settings of a training run, whatever the method.

    `image_size` in pixels (None: the backbone's). `views` augmented views of each image are cached where a prefix is
    cached; `cache=False` computes the prefix in every epoch. `memory` is the budget in bytes for decoded images and for
    cached activations each; what exceeds it goes to a temporary file. `validation` is the share of training images held
    out for `early_stopping`, the number of epochs without improvement after which the best epoch's patch is returned.
    `framing` says how images become squares: cropped, stretched, or (auto) cropped for classification and stretched for dense
    tasks, which answer for the whole image. `decoder` names the head of a dense task, `taps` the segments whose outputs it
    reads. Dense tasks see a new view of every image in every epoch, without a cache.
    `loss` names one of the kind's losses, such as `asymmetric` or `focal(gamma=3)` (see `modelpatch.tasks.losses`).
    `warmup` is the share of all steps with a rising learning rate. `class_weights` are one positive number a class, or
    "balanced": the inverse of their frequency. `precision` is that of the forward pass; `auto` is bfloat16 on GPUs that have
    it. `sampling="balanced"` draws images with replacement so that all classes are drawn alike. `mixup` and `cutmix` are the α
    of these mixtures of images, 0 for none, which need every epoch's images and set `cache` to false. `drop_path` is the share
    of images whose path is dropped in the last residual block, `layer_decay` the factor of learning rates by block before the
    head, `swa` the number of last epochs whose weights are averaged. `dtype` is how the patch stores numbers (see
    `Patch.astype`; `int8` leaves vectors float32); what it costs is measured and kept in the patch's metrics.
    """

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 32
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    image_size: PositiveInt | None = None
    augment: AugmentName = "auto"
    framing: Literal["auto", "crop", "stretch"] = "auto"
    decoder: str | None = None
    taps: Names = ()
    views: PositiveInt = 4
    cache: bool = True
    memory: PositiveInt = 2 * 2**30
    schedule: Literal["cosine", "step", "exponential", "constant"] = "cosine"
    drops: tuple[Share, ...] = (2 / 3, 5 / 6)
    warmup: Share = 0.05
    loss: str = "auto"
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] | tuple[PositiveFiniteFloat, ...] = "none"
    validation: Share = 0.0
    early_stopping: NonNegativeInt = 0
    clip: NonNegativeFloat = 0.0
    sampling: Literal["plain", "balanced"] = "plain"
    mixup: NonNegativeFiniteFloat = 0.0
    cutmix: NonNegativeFiniteFloat = 0.0
    drop_path: Share = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    swa: NonNegativeInt = 0
    precision: Precision = "auto"
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"

    def __post_init__(self) -> None:
        if self.mixes:
            object.__setattr__(self, "cache", False)

    @property
    def mixes(self) -> bool:
        """True where images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def rules_steps(self) -> bool:
        """True where a setting says how steps are taken, so that they are."""
        return any(getattr(self, name) != FitSettings.__dataclass_fields__[name].default for name in STEPWISE)

    def seen(self, preprocessing: Preprocessing, kind: str) -> Preprocessing:
        """Return the preprocessing of a task's images: the backbone's own, at the size and in the framing that are set."""
        framing = self.framing if self.framing != "auto" else kind_of(kind).framing
        seen = preprocessing.with_image_size(self.image_size)
        return seen if framing is None else seen.model_copy(update={"framing": framing})

    def factor(self, step: int, total: int) -> float:
        """Return the factor of the learning rates at a step: a linear warm-up, then the schedule.

        `step` drops to a tenth after each share of the steps in `drops`; `exponential` to 0.98 every 2.5 epochs.
        """
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(total - warm, 1)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return 10.0 ** -sum(done >= drop for drop in self.drops)
        if self.schedule == "exponential":
            return 0.98 ** (done * self.epochs / 2.5)
        return 1.0


PLAIN_OPTIONS = (
    "accumulate",
    "monitor",
    "ema",
    "checkpoint_activations",
)  # those of `FitOptions` that are plain values


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of `fit` that stand in place of a setting, or add to it (see `fit`)."""

    optimizer: Callable[..., Optimizer] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    schedule_every: Every | None = None
    loss: Callable[..., Any] | None = None
    transform: Callable[..., Any] | None = None
    accumulate: int = 1
    monitor: str | None = None
    ema: float | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("optimizer", "scheduler", "loss", "transform"):
            given = getattr(self, name)
            if isinstance(given, Optimizer | LRScheduler):
                raise TrainingError(
                    f"{name} is an instance of {type(given).__name__}, but fit builds the model whose parameters it would "
                    "hold. Give its class or a function, or train with modelpatch.train.Trainer."
                )
            if given is not None and not callable(given):
                hint = " A method's own is set by name: ScaleBias(optimizer='sgd')." if name == "optimizer" else ""
                raise TrainingError(f"{name} is {given!r}; expected a function or class.{hint}")
        check_limits(accumulate=self.accumulate)
        if self.ema is not None and not (isinstance(self.ema, int | float) and 0 < self.ema < 1):
            raise TrainingError(f"ema = {self.ema!r} is not valid; expected a number between 0 and 1.")
        if not isinstance(self.monitor, str | None):
            raise TrainingError(f"monitor = {self.monitor!r} is not valid; expected a figure such as validation_loss.")
        if not isinstance(self.checkpoint_activations, bool):
            given = self.checkpoint_activations
            raise TrainingError(f"checkpoint_activations = {given!r} is not valid; expected true or false.")

    @property
    def rules_steps(self) -> bool:
        """True where an option says how steps are taken, so that they are."""
        return replace(self, transform=None) != FitOptions()

    @property
    def described(self) -> dict[str, Any]:
        """Plain values of the options that are set, for the identity of a run."""
        changed = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        plain = {n: v if isinstance(v, bool | int | float | str) else name_of(v) for n, v in changed.items()}
        return {"options": plain} if plain else {}


def check_settings(values: dict[str, Any]) -> FitSettings:
    """Settings given by name, checked. Raises `TrainingError` for an unknown one or a value that makes no sense."""
    known = FitSettings.__dataclass_fields__
    if unknown := sorted(values.keys() - known.keys()):
        near = nearest(unknown[0], known)
        raise TrainingError(f"fit has no setting {unknown[0]!r}.{near} It has: {', '.join(known)}.")
    try:
        return TypeAdapter(FitSettings).validate_python(values)
    except ValidationError as error:
        errors = error.errors()
        name = errors[0]["loc"][0]
        problems = dict.fromkeys(one["msg"] for one in errors if one["loc"][0] == name)  # one for each type it may have
        raise TrainingError(f"{name} = {values[str(name)]!r} is not valid: {'; or: '.join(problems)}.") from error


# arguments of a trainer --------------------------------------------------------------------------------------


def make(given: Any, kind: type, name: str, source: str, argument: Any, example: str) -> Any:
    """Return `given`, an instance of a `kind`, or what it makes of its one argument. Raises `TrainingError` for others."""
    expected = f"Expected a torch.optim {kind.__name__}, its class, or a function from {source} to one: {example}."
    if isinstance(given, kind):
        return given
    if not callable(given):
        raise TrainingError(f"the {name} is {given!r}. {expected}")
    what = f"the {name} {name_of(given)}"
    try:
        made = given(argument)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{what} cannot be made from {source} alone ({error}). {expected}") from error
    if not isinstance(made, kind):
        raise TrainingError(f"{what} made a {type(made).__name__}. {expected}")
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
        raise TrainingError(f"the model is {str(model)[:100]!r}. Expected an nn.Module: method.build(backbone, task).")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            f"no parameter of the {type(model).__name__} requires gradients. Call requires_grad_() on what is to be trained."
        )
    if not callable(loss):
        raise TrainingError(f"the loss is {loss!r}. Expected a function of (outputs, targets) such as F.cross_entropy.")


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
        raise TrainingError(f"{precision = } is not valid; expected one of {', '.join(get_args(Precision))}.")
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, precision)
