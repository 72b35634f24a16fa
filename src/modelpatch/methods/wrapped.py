"""A method around another: everything is the inner method's own, but for what a wrapper changes.

`confined.py` changes where the method works, `added.py` what is added to its loss.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.method import Batch, Batches, Method, Trainable
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.model import PatchedModel


@dataclass(frozen=True, kw_only=True)
class Wrapped(Method):
    """`method`, rates and training state included."""

    method: Method

    def __post_init__(self) -> None:
        """Nothing to check: the method did."""

    @staticmethod
    def common(method: Method) -> dict[str, Any]:
        """What a wrapper takes over from the method: the hyperparameters that all methods have."""
        return {field.name: getattr(method, field.name) for field in fields(Method)}

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.name

    @property
    def paper(self) -> str:  # type: ignore[override]
        return self.method.paper

    @property
    def statistics(self) -> str | None:
        """What the method does with the statistics of BatchNorm, if it has a choice."""
        return getattr(self.method, "statistics", None)

    @property
    def learns_statistics(self) -> bool:
        return self.method.learns_statistics

    def hyperparameters(self) -> dict[str, Any]:
        return self.method.hyperparameters()

    def blueprint(self, backbone: Backbone) -> Blueprint:
        return self.method.blueprint(backbone)

    def reweighted(self, backbone: Backbone) -> tuple[str, ...]:
        return self.method.reweighted(backbone)

    def reweightings(self, backbone: Backbone) -> dict[str, Reweighting]:
        return self.method.reweightings(backbone)

    @property
    def has_own_head(self) -> bool:
        return self.method.has_own_head

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        return self.method.make_head(backbone, classes)

    def check_decoder(self) -> None:
        super().check_decoder()
        self.method.check_decoder()

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        self.method.initialise(model, backbone)

    def penalty(self, model: PatchedModel) -> Tensor | float:
        return self.method.penalty(model)

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        return self.method.added_loss(model, batch)

    def prepare(self, model: PatchedModel, batches: Batches) -> None:
        self.method.prepare(model, batches)

    def before_step(self, model: PatchedModel, step: int, total: int) -> None:
        self.method.before_step(model, step, total)

    def warn(self, reach: float) -> str | None:
        return self.method.warn(reach)

    def rate(self, name: str) -> float:
        return self.method.rate(name)

    def decay(self, name: str, parameter: nn.Parameter) -> float:
        return self.method.decay(name, parameter)

    def parameter_groups(self, model: Trainable, backbone: Backbone) -> list[dict[str, Any]]:
        return self.method.parameter_groups(model, backbone)
