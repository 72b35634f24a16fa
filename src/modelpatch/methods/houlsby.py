"""Houlsby adapters: a bottleneck after the attention and after the MLP of every transformer block.

    h' = h + U GELU(D h + b) + c        h what attention or MLP adds to the stream; D (width, C) random, U (C, width) zero

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly: *Parameter-Efficient Transfer Learning for
NLP* (ICML 2019), section 2.1. A patch holds 2 (2 C width + width + C) numbers a block, and the scales and shifts of the
blocks' normalisation layers, which the paper trains as well.
"""

from dataclasses import field
from typing import Literal

from pydantic import PositiveFloat

from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.bottleneck import Width, bottlenecks
from modelpatch.methods.method import Method, register_method
from modelpatch.methods.scale_bias import norm_tensors
from modelpatch.patch.blueprint import Blueprint


@register_method
class Houlsby(Method):
    """Trains bottlenecks of `width` channels after the attention and the MLP of the named transformer blocks, and the head.

    `norms="trained"` trains the normalisation layers of these blocks too. `blocks` holds names as in `Subset`; none means
    all transformer blocks.
    """

    name = "houlsby"
    paper = "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019"
    order = 16
    names_blocks = True

    lr: PositiveFloat = 1e-3
    width: Width = 64
    norms: Literal["frozen", "trained"] = "trained"
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        settings = {"place": "after", "width": self.width, "activation": "gelu", "scale": 1.0}
        added = bottlenecks(backbone, self.blocks, ("attention", "mlp"), self.name, **settings)
        if self.norms == "frozen":
            return added
        segments = [backbone.chain[graft.start] for graft in added.grafts]
        return Blueprint(owned=norm_tensors(segments, affine=True, statistics=False), grafts=added.grafts)
