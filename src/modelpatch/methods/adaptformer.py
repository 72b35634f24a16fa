"""AdaptFormer: a bottleneck beside the MLP of every transformer block.

    y = x + MLP(LN(x)) + s (U ReLU(D LN(x) + b) + c)      D (width, C) random, U (C, width) zero; all else frozen

Chen, Ge, Tong, Wang, Song, Wang, Luo: *AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition* (NeurIPS
2022), section 3.2, equations 3 and 4. A patch holds 2 C width + width + C numbers a block: 1,189,632 for a ViT-B/16 at the
paper's width of 64.
"""

from dataclasses import field

from pydantic import PositiveFloat

from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.bottleneck import Scale, Width, bottlenecks
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint


@register_method
class AdaptFormer(Method):
    """Trains a bottleneck of `width` channels beside the MLP of each of the named transformer blocks, and the head.

    `scale` is the paper's s. `blocks` holds names as in `Subset`; none means all transformer blocks.
    """

    name = "adaptformer"
    paper = "Chen et al., AdaptFormer, NeurIPS 2022"
    order = 15
    names_blocks = True

    lr: PositiveFloat = 1e-3
    width: Width = 64
    scale: Scale = 0.1
    blocks: tuple[str, ...] = field(default=(), kw_only=False)

    def changes(self, backbone: Backbone) -> Blueprint:
        settings = {"place": "beside", "width": self.width, "activation": "relu", "scale": self.scale}
        return bottlenecks(backbone, self.blocks, ("mlp",), self.name, **settings)
