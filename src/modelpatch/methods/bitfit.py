"""BitFit: a task's own biases over shared weights.

    y = W x + b_t        b_t for task t; W and every other weight stay frozen

Ben Zaken, Ravfogel, Goldberg: *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models*
(ACL 2022), section 3. The shift of a normalisation layer is a bias too. A ViT-B/16 has 102,912 biases.
"""

from pydantic import PositiveFloat
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import name_tensors
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint


@register_method
class BitFit(Method):
    """Trains every bias vector (of linear layers, convolutions, normalisation layers and attention) and the head."""

    name = "bitfit"
    paper = "Ben Zaken et al., BitFit, ACL 2022"
    order = 13
    shares_across_tasks = True

    lr: PositiveFloat = 1e-2

    def changes(self, backbone: Backbone) -> Blueprint:
        owned = name_tensors(backbone.chain, bias_names)
        if not owned:
            raise MethodNotApplicableError(
                f"bitfit: {backbone.spec} has no biases. Try `scale-bias(layers=channel)`, which adds some, or `subset`."
            )
        return Blueprint(owned=owned)


def bias_names(module: nn.Module) -> list[str]:
    """Names of a module's own bias vectors: `bias`, `in_proj_bias`, `q_bias`; not tables of position biases."""
    own = module.named_parameters(recurse=False)
    return [name for name, one in own if one.ndim == 1 and (name == "bias" or name.endswith("_bias"))]
