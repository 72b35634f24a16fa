"""Linear probe: logits = W f(x) + b with the backbone f frozen. The baseline every patch has to beat."""

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint


@register_method
class LinearProbe(Method):
    """Trains the head alone, on features computed once, at `head_lr`. It has no body that `lr` could be for."""

    name = "linear-probe"
    paper = "Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016"
    order = 0
    compared = ("linear-probe",)
    searched = ("linear-probe",)
    trains_head_alone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr != Method.lr:
            raise MethodError(f"{self.name} trains a head alone: give head_lr={self.lr} instead of lr.")

    def changes(self, backbone: Backbone) -> Blueprint:
        return Blueprint()
