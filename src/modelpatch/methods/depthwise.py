"""Depthwise patches: a task's own spatial filters over shared pointwise convolutions.

    y_c = k_c,t * x_c        k_c,t the depthwise kernel of channel c for task t

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning*
(ICLR 2019), section 3. With normalisation layers as well: `ScaleBias() + Depthwise()`.
"""

from pydantic import PositiveFloat
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import name_tensors
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint


@register_method
class Depthwise(Method):
    """Trains the kernels of every depthwise convolution (one group per input channel) and the head."""

    name = "depthwise"
    paper = "Mudrakarta et al., K for the Price of 1, ICLR 2019"
    order = 3
    compared = ("depthwise", "scale-bias+depthwise")
    shares_across_tasks = True

    lr: PositiveFloat = 3e-3

    def changes(self, backbone: Backbone) -> Blueprint:
        owned = name_tensors(backbone.chain, lambda module: ["weight"] if is_depthwise(module) else [])
        if not owned:
            raise MethodNotApplicableError(
                f"{backbone.spec} has no depthwise convolution. Try `scale-bias`, which patches normalisation layers, or "
                "`subset`, which fine-tunes blocks."
            )
        return Blueprint(owned=owned)


def is_depthwise(module: nn.Module) -> bool:
    """True for a convolution that filters every input channel by itself."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
