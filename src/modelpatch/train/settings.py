"""The settings of a fit, plain values, and its options, objects from Python; both are checked wherever they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.augmentation import AugmentName
from modelpatch.errors import TrainingError
from modelpatch.tasks.kind import kind_of
from modelpatch.train.arguments import Every, Precision, check_limits, name_of


def _split_names(given: Any) -> Any:
    """`a,b` as the names it spells, as a command line gives them."""
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
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
    `warmup` is the share of all steps with a rising learning rate. `class_weights="balanced"` weighs classes by the
    inverse of their frequency. `precision` is that of the forward pass; `auto` is bfloat16 on GPUs that have it. `dtype` is
    how the patch stores numbers (see `Patch.astype`; `int8` leaves vectors float32); what it costs is measured and kept
    in the patch's metrics.
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
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    validation: Share = 0.0
    early_stopping: NonNegativeInt = 0
    clip: NonNegativeFloat = 0.0
    precision: Precision = "auto"
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"

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
        """Raises `TrainingError` for an option that cannot be used."""
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
        if self.ema is not None and not 0 < self.ema < 1:
            raise TrainingError(f"ema = {self.ema!r} is not valid; expected a number between 0 and 1.")

    @property
    def described(self) -> dict[str, Any]:
        """Plain values of the options that are set, for the identity of a run."""
        changed = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        plain = {n: v if isinstance(v, bool | int | float | str) else name_of(v) for n, v in changed.items()}
        return {"options": plain} if plain else {}


def check_settings(values: dict[str, Any]) -> FitSettings:
    """Settings given by name, checked. Raises `TrainingError` for an unknown one or a value that makes no sense."""
    if unknown := sorted(values.keys() - FitSettings.__dataclass_fields__.keys()):
        raise TrainingError(
            f"fit has no setting {unknown[0]!r}. It has: {', '.join(FitSettings.__dataclass_fields__)}."
        )
    try:
        return TypeAdapter(FitSettings).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise TrainingError(f"{first['loc'][0]} = {first['input']!r} is not valid: {first['msg']}.") from error
