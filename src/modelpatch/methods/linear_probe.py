"""Linear probe: logits = W f(x) + b with the backbone f frozen. The baseline every patch has to beat."""

from typing import Literal

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint


class HeadMethod(Method):
    """A method that trains a head alone, at `head_lr`. It has no body that `lr` could be for."""

    trains_head_alone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr != Method.lr:
            raise MethodError(f"{self.name} trains a head alone: give head_lr={self.lr} instead of lr.")

    def changes(self, backbone: Backbone) -> Blueprint:
        return Blueprint()


@register_method
class LinearProbe(HeadMethod):
    """Trains the head alone, on features computed once.

    It is solved to convergence, with a penalty that held-out training images choose, whatever the epochs. With
    `solver="steps"` it is trained by steps as other methods are; so it is where something is said about steps: `head_lr`,
    `weight_decay` or `optimizer` here, a schedule, an optimizer or callbacks of the fit.
    """

    name = "linear-probe"
    paper = "Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016"
    order = 0
    compared = ("linear-probe",)
    searched = ("linear-probe",)

    solver: Literal["auto", "steps"] = "auto"

    @property
    def solves_head(self) -> bool:
        said = any(getattr(self, name) != getattr(Method, name) for name in ("head_lr", "weight_decay", "optimizer"))
        return self.solver == "auto" and not (said or self.all_hooks())
