"""Linear probe: logits = W f(x) + b with the backbone f frozen. The baseline every patch has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.method import Method
from modelpatch.patch.blueprint import Blueprint


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Trains the head alone, on features computed once: at `head_lr`, and there is no body that `lr` could be for."""

    name: ClassVar[str] = "linear-probe"
    paper: ClassVar[str] = "Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016"

    def __post_init__(self) -> None:
        """Raises `MethodError` for an `lr`, too."""
        super().__post_init__()
        if self.lr != Method.lr:
            raise MethodError(f"{self.name} trains a head alone: give head_lr={self.lr} instead of lr.")

    def blueprint(self, backbone: Backbone) -> Blueprint:
        """Nothing is owned: the patch is its head."""
        return Blueprint()
