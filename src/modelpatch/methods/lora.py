"""LoRA: low-rank updates beside the frozen linear layers and convolutions of a network, through the `peft` library.

    y = W x + (scale / rank) B A x        A (rank, in) starts random, B (out, rank) at zero; W and all else stay frozen

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: *LoRA: Low-Rank Adaptation of Large Language Models* (ICLR 2022),
section 4.1. Beside a convolution A has its kernel, stride and padding, and B is a 1x1 convolution, so that B A has W's
shape there too. A patch of rank r holds r (in + out) numbers for a linear layer and r (in k² + out) for a k x k convolution.

    rsLoRA    y = W x + (scale / √rank) B A x
    DoRA      y = m (W + (scale / rank) B A) x / ‖W + (scale / rank) B A‖      m (out) starts at ‖W‖, norms by output

Kalajdzievski: *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA* (2023), arXiv:2312.03732, theorem 3.2.
Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen: *DoRA: Weight-Decomposed Low-Rank Adaptation* (ICML 2024), equations 5, 11.
"""

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError, require
from modelpatch.methods.blocks import find_segments, graft_on
from modelpatch.methods.layers import CONVOLUTIONS, LINEAR, find_layers, is_dense
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint, register_graft

GRAFT = "lora"
ADAPTER = "default"  # what peft calls the one set of updates a layer has here
MAX_RANK = 4096  # the header of a small file must not make its reader allocate without bound
LAYERS = {"all": LINEAR + CONVOLUTIONS, "linear": LINEAR, "convolution": CONVOLUTIONS}

Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]


@register_method
class LoRA(Method):
    """Trains an update of rank `rank` for every linear layer and convolution of the named blocks, and the head.

    `scale` is LoRA's alpha: the update is scale / rank times B A, with `rslora` scale / √rank. `dora` also trains the
    length of every output's weights, in layers where none is zero. `blocks` holds names as in `Subset`; none means all
    blocks. `layers` picks `linear` layers, `convolution`s or `all`. Left out is what has no low-rank update that could be
    added to its weight: grouped (depthwise), dilated and non-zero-padded convolutions and layers of other types; so are
    layers whose weight is read without calling them (inside `nn.MultiheadAttention`) or used in several places.
    """

    name = "lora"
    paper = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022"
    order = 7
    compared = ("lora",)
    searched = ("lora",)
    names_blocks = True

    lr: PositiveFloat = 2e-3
    rank: Rank = 8
    scale: PositiveFloat = 16.0
    blocks: tuple[str, ...] = field(default=(), kw_only=False)
    layers: Literal["all", "linear", "convolution"] = "all"
    rslora: bool = False
    dora: bool = False

    def changes(self, backbone: Backbone) -> Blueprint:
        """Adds updates beside the layers of the blocks. Raises `MissingExtraError` without peft, too."""
        require("peft", "lora", "The method lora")  # only where it is used, since it brings `transformers`
        segments = find_segments(backbone, self.blocks)
        fits = has_lengths if self.dora else is_dense
        found = [(segment, find_layers(backbone, segment, LAYERS[self.layers], fits)) for segment in segments]
        given = {"rank": self.rank, "scale": self.scale, **variants(self.rslora, self.dora)}
        grafts = tuple(graft_on(segment, GRAFT, **given, layers=layers) for segment, layers in found if layers)
        if not grafts:
            kind = "layer" if self.layers == "all" else f"{self.layers} layer"
            others = "other blocks" if self.layers == "all" else "layers='all', other blocks"
            raise MethodNotApplicableError(
                f"lora: {backbone.spec} has no {kind} in {', '.join(self.blocks) or 'its blocks'} that can have a low-rank "
                f"update. Try {others}, or the methods `scale-bias` or `subset`."
            )
        return Blueprint(grafts=grafts)


def variants(rslora: bool, dora: bool) -> dict[str, bool]:
    """The arguments of a graft for these variants of LoRA; those that are off have none, as in files before there were any."""
    return {name: True for name, on in (("rslora", rslora), ("dora", dora)) if on}


def has_lengths(layer: Any) -> bool:
    """True for a layer that can have an update and none of whose outputs has weights of length 0, by which DoRA divides."""
    return is_dense(layer) and bool(layer.weight.flatten(1).norm(dim=1).all())


class Strength(nn.Module):
    """The share of an update that takes effect: 1 all of it, 0 none. The update is linear, so its input is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.strength == 1 else self.strength * x


@register_graft(GRAFT)
def add_updates(
    variant: nn.Module, rank: int, scale: float, layers: list[str], rslora: bool = False, dora: bool = False
) -> nn.Module:
    """Put peft's layers in place of those named in `layers` (the empty name is the variant itself), which they hold.

    Raises `MissingExtraError` without peft, TypeError or ValueError for layers or ranks that peft cannot adapt.
    """
    peft = require("peft", "lora", "A patch with low-rank updates")
    if not 0 < rank <= MAX_RANK:
        raise ValueError(f"the rank {rank} is not between 1 and {MAX_RANK}")
    if not (isinstance(rslora, bool) and isinstance(dora, bool)):
        raise TypeError(f"rslora={rslora!r}, dora={dora!r}: expected true or false")
    holder = nn.ModuleDict({"variant": variant})  # peft replaces members, and leaves its records on what it is given
    targets = [f"variant.{name}".rstrip(".") for name in layers]
    for target in targets:
        layer = holder.get_submodule(target)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"{target} is a {type(layer).__name__}, not a linear layer or 2-d convolution")
    trained = [parameter for parameter in variant.parameters() if parameter.requires_grad]
    exactly = "|".join(map(re.escape, targets))
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=exactly, use_rslora=rslora, use_dora=dora)
    peft.inject_adapter_in_model(config, holder, ADAPTER)
    for parameter in trained:  # peft froze what other parts of the patch train
        parameter.requires_grad_(True)
    for target in targets:
        if dora:
            added: Any = holder.get_submodule(f"{target}.lora_magnitude_vector.{ADAPTER}")
            added.strength = 1.0
            added.register_forward_hook(_take_share)
        else:
            holder.get_submodule(f"{target}.lora_dropout").add_module(ADAPTER, Strength())
    return holder["variant"]


def _take_share(added: Any, inputs: Any, result: Tensor) -> Tensor:
    """The share of DoRA's whole addition to the frozen output that takes effect."""
    return result if added.strength == 1 else added.strength * result
