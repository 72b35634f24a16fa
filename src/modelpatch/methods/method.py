"""What every method is: a dataclass of hyperparameters that says what a patch owns and how it is trained.

    blueprint(backbone)   which tensors the patch owns, which modules it adds        -> patch.Blueprint
    draft(...)            the model to train: the frozen chain, variants and a head  -> patch.PatchedModel
    prepare(model, ...)   work before the first step (recomputing statistics)
    parameter_groups(...) learning rates and weight decay

A new method is one file and its line in `methods/registry.py`; whatever it makes is an ordinary patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, get_type_hints

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.heads.base import Decoder, LinearHead, SiameseHead
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.model import PatchedModel

Batches = Callable[[], Iterable[Tensor]]
Head = Literal["trained", "random", "siamese"]
Optimizer = Literal["adamw", "adam", "sgd", "rmsprop"]


@dataclass(frozen=True)
class Batch:
    """What one training step sees: the inputs (B, ...) of segment `start` (0: normalised images), logits (B, K) and classes
    (B,) int64."""

    inputs: Tensor
    start: int
    logits: Tensor
    labels: Tensor


class Trainable(Protocol):
    """What an optimizer is made for, a `PatchedModel` for one."""

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their names in a patch file."""

    @property
    def origins(self) -> Mapping[str, Graft]:
        """By name, the graft that added a tensor."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyperparameters common to all methods.

    `lr` is the patch's learning rate and `head_lr` the head's. `head="random"` leaves the head as it was initialised;
    `head="siamese"` trains one that reads the base's features beside the patch's (SubTuning, section 4.1).
    Weight decay is never applied to vectors (norm parameters, biases). `a + b` combines methods in one patch.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    lists: ClassVar[frozenset[str]] = frozenset()  # hyperparameters that hold several names

    lr: PositiveFloat = 1e-3
    head_lr: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Optimizer = "adamw"
    head: Head = "trained"

    def __post_init__(self) -> None:
        """Check and convert every hyperparameter; strings may stand for what they spell. Raises `MethodError`."""
        for name, adapter in _adapters(type(self)).items():
            value = getattr(self, name)
            if name in self.lists and isinstance(value, str):
                value = tuple(part.strip() for part in value.split(","))
            try:
                object.__setattr__(self, name, adapter.validate_python(value))
            except ValidationError as error:
                first = error.errors()[0]
                raise MethodError(f"{self.name}: {name} = {first['input']!r} is not valid: {first['msg']}.") from error

    @abstractmethod
    def blueprint(self, backbone: Backbone) -> Blueprint:
        """What a patch of this method owns and adds. Raises `MethodNotApplicableError` where there is nothing."""

    def reweighted(self, backbone: Backbone) -> tuple[str, ...]:
        """The owned weights that are not replaced but made from the frozen ones: the names of `reweightings`."""
        return ()

    def reweightings(self, backbone: Backbone) -> dict[str, Reweighting]:
        """What makes owned weights from the frozen ones while they are trained, by the backbone's names of the weights."""
        return {}

    def draft(self, backbone: Backbone, classes: int, decoder: Decoder | None = None) -> PatchedModel:
        """The model to train, with a `decoder`, or a fresh head for `classes` outputs that follows torch's random state."""
        if decoder is not None:
            self.check_decoder()
        head: nn.Module = self.make_head(backbone, classes) if decoder is None else decoder
        head.requires_grad_(self.head != "random")
        blueprint = self.blueprint(backbone)
        if self.head == "siamese" and not getattr(head, "reads_base", False):
            raise MethodError(f"{self.name} brings a head of its own, which cannot be siamese. Set head='trained'.")
        if self.head == "siamese" and not blueprint.owned and not blueprint.grafts:
            raise MethodError(f"{self.name} changes no features: a siamese head would read the base's twice.")
        model = PatchedModel.draft(backbone, blueprint, head, self.reweightings(backbone))
        model.learned_statistics = self.learns_statistics
        self.initialise(model, backbone)
        return model

    def check_decoder(self) -> None:
        """Raises `MethodError` for a method that cannot have a dense task's decoder as its head."""
        if self.head == "siamese":
            raise MethodError(f"{self.name}: a siamese head reads features of whole images. Set head='trained'.")

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        """Where what the method trains starts, if not as it was built."""
        return

    @property
    def learns_statistics(self) -> bool:
        """Whether BatchNorm layers of the patch's own learn their running statistics in train mode."""
        return getattr(self, "statistics", None) == "learned"

    @property
    def has_own_head(self) -> bool:
        """Whether the method brings another head than a linear or siamese one."""
        return type(self).make_head is not Method.make_head

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        """A fresh head for `classes` outputs."""
        if self.head == "siamese":
            return SiameseHead(2 * backbone.chain.feature_dim, classes)
        return LinearHead(backbone.chain.feature_dim, classes)

    def penalty(self, model: PatchedModel) -> Tensor | float:
        """What is added to the loss for the weights alone."""
        return 0.0

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        """What is added to the cross entropy of a batch; by default the penalty."""
        return self.penalty(model)

    def count_parameters(self, backbone: Backbone) -> int:
        """Trainable parameters without the head."""
        model = self.draft(backbone, 1)
        return sum(p.numel() for name, p in model.trainable() if not name.startswith("head."))

    def prepare(self, model: PatchedModel, batches: Batches) -> None:
        """Work on the model before the first step; `batches()` yields normalised training images in random order."""
        return

    def before_step(self, model: PatchedModel, step: int, total: int) -> None:
        """Work on the model before step `step` of `total`, such as pruning once. Must depend on nothing else."""
        return

    def warn(self, reach: float) -> str | None:
        """What the user should know before a run whose steps' learning rates add up to `reach` times the full ones."""
        return None

    def rate(self, name: str) -> float:
        """The learning rate of a tensor by its name in the patch file."""
        return self.head_lr if name.startswith("head.") else self.lr

    def decay(self, name: str, parameter: nn.Parameter) -> float:
        """The weight decay of a tensor by its name in the patch file: none for vectors and masks."""
        return self.weight_decay if parameter.ndim > 1 and not name.startswith("mask/") else 0.0

    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter as plain values."""
        return asdict(self)

    def __add__(self, other: Method) -> Method:
        """Both methods in one patch. Raises `MethodError` for methods that exclude each other."""
        from modelpatch.methods.composite import Composite

        if not isinstance(other, Method):
            return NotImplemented
        return Composite.of(self, other)

    def parameter_groups(self, model: Trainable, backbone: Backbone) -> list[dict[str, Any]]:
        """Optimizer groups: one for every learning rate and weight decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.trainable():
            groups.setdefault((self.rate(name), self.decay(name, parameter)), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def make_optimizer(self, model: Trainable, backbone: Backbone) -> torch.optim.Optimizer:
        """The method's optimizer over its parameter groups. Adam and AdamW use PyTorch's other defaults, `sgd` Nesterov's
        momentum of 0.9, `rmsprop` the constants that TF-slim trains MobileNets with (decay and momentum 0.9, epsilon 1).

        Raises `MethodError` if there is nothing to train.
        """
        groups = self.parameter_groups(model, backbone)
        if not groups:
            raise MethodError(f"{self.name} trains nothing with head={self.head!r}. Set head='trained'.")
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        if self.optimizer == "rmsprop":
            return torch.optim.RMSprop(groups, lr=self.lr, alpha=0.9, momentum=0.9, eps=1.0)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=self.lr, fused=True)


@cache
def _adapters(kind: type[Method]) -> dict[str, TypeAdapter[Any]]:
    """What checks each hyperparameter of a kind of method, by its name."""
    hints = get_type_hints(kind, include_extras=True)
    loose = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    return {field.name: TypeAdapter(hints[field.name], config=loose) for field in fields(kind)}
