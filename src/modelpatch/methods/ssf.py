"""SSF: scale and shift the output of every operation.

    y = γ ⊙ f(x) + β        f a linear layer, convolution or normalisation layer; γ, β per output channel
    γ (W x + b) + β = (γ W) x + (γ b + β)

Lian, Zhou, Feng, Wang: *Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning* (NeurIPS 2022), section
3.2. After a normalisation layer both are its own scale and shift: γ (w x + b) + β is w' x + b' with numbers of the task. Once
trained they fold into the layers (section 3.3, `patch.folding`), so that inference costs what the frozen network costs. A
patch of a ViT-B/16 holds 205,824 numbers.
"""

from pydantic import PositiveFloat

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.layers import find_layers
from modelpatch.methods.method import Method, register_method
from modelpatch.methods.scale_bias import GRAFT, SCALED, norm_tensors
from modelpatch.patch.blueprint import Blueprint


@register_method
class SSF(Method):
    """Trains a scale and a shift after every linear layer, convolution and normalisation layer, and the head.

    Left out are layers whose weight is read without calling them (inside `nn.MultiheadAttention`) or used in several
    places, and the classifier. `ScaleBias` trains those of normalisation layers alone.
    """

    name = "ssf"
    paper = "Lian et al., Scaling & Shifting Your Features, NeurIPS 2022"
    order = 14

    lr: PositiveFloat = 1e-2

    def changes(self, backbone: Backbone) -> Blueprint:
        found = [(segment, find_layers(backbone, segment, SCALED)) for segment in backbone.chain]
        grafts = tuple(graft_on(segment, GRAFT, layers=layers) for segment, layers in found if layers)
        if not grafts:
            raise MethodNotApplicableError(
                f"ssf: {backbone.spec} has no linear layer or convolution whose output could be scaled. Try `scale-bias`, "
                "which trains normalisation layers, or `subset`."
            )
        return Blueprint(owned=norm_tensors(backbone.chain, affine=True, statistics=False), grafts=grafts)
