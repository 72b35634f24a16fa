"""LoRA: low-rank updates beside the frozen linear layers and convolutions of a network, through the `peft` library.

    y = W x + (scale / rank) B A x        A (rank, in) starts random, B (out, rank) at zero; W and all else stay frozen

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: *LoRA: Low-Rank Adaptation of Large Language Models* (ICLR 2022),
section 4.1. Beside a convolution A has its kernel, stride and padding, and B is a 1x1 convolution, so that B A has W's
shape there too. A patch of rank r holds r (in + out) numbers for a linear layer and r (in k² + out) for a k x k convolution.

    rsLoRA    y = W x + (scale / √rank) B A x
    DoRA      y = m (W + (scale / rank) B A) x / ‖W + (scale / rank) B A‖      m (out) starts at ‖W‖, norms by output

Attention that reads its weights itself (`nn.MultiheadAttention`) has W + (scale / rank) B A made for it, stored as the two
factors `left` and `right` of `patch.changes`.

Kalajdzievski: *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA* (2023), arXiv:2312.03732, theorem 3.2.
Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen: *DoRA: Weight-Decomposed Low-Rank Adaptation* (ICML 2024), equations 5, 11.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.errors import MethodError, MethodNotApplicableError, require
from modelpatch.methods.blocks import find_segments, graft_on, name_tensors
from modelpatch.methods.layers import CONVOLUTIONS, LINEAR, find_layers, is_dense, weight_name
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint, Graft, register_graft
from modelpatch.patch.changes import Reweighting

GRAFT = "lora"
ADAPTER = "default"  # what peft calls the one set of updates a layer has here
MAX_RANK = 4096  # the header of a small file must not make its reader allocate without bound
LAYERS = {"all": LINEAR + CONVOLUTIONS, "linear": LINEAR, "convolution": CONVOLUTIONS}

# what `nn.MultiheadAttention` reads itself, and the type of its output projection
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
OUT_PROJECTION = nn.modules.linear.NonDynamicallyQuantizableLinear

Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
T = TypeVar("T")


def _split_pair(given: Any) -> Any:
    """`attn.qkv=16` as a name and its value, as a command line gives them."""
    return tuple(given.rpartition("=")[::2]) if isinstance(given, str) else given


def _list_pairs(given: Any) -> Any:
    return tuple(given.items()) if isinstance(given, Mapping) else given


def check_expression(given: str) -> str:
    """Return a regular expression. Raises ValueError for what is none."""
    try:
        re.compile(given)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return given


Expression = Annotated[str, AfterValidator(check_expression)]
PairOf = Annotated[tuple[Expression, T], BeforeValidator(_split_pair)]
Pattern = Annotated[tuple[PairOf[T], ...], BeforeValidator(_list_pairs)]  # values by what ends the names of layers


@register_method
class LoRA(Method):
    """Trains an update of rank `rank` for every linear layer, convolution and attention of the named blocks, and the head.

    `scale` is LoRA's alpha: the update is scale / rank times B A, with `rslora` scale / √rank. `dora` also trains the
    length of every output's weights, in layers where none is zero. `blocks` holds names as in `Subset`; none means all
    blocks. `layers` picks `linear` layers (attention's too), `convolution`s or `all`; `targets` those whose whole name in the
    backbone a regular expression matches. `rank_pattern` and `alpha_pattern` give layers a rank or scale of their own: pairs,
    or a mapping, of an expression that ends their name. `bias` trains the biases of the updated layers (`lora_only`) or of all
    layers of the network too, `modules_to_save` all parameters of modules whose names end so.

    Left out is what has no low-rank update that could be added to its weight: grouped (depthwise), dilated and
    non-zero-padded convolutions and layers of other types, and layers whose weight is used in several places or read
    without calling them; `nn.MultiheadAttention` has updates but no DoRA.
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
    targets: Expression | None = None
    rank_pattern: Pattern[Rank] = ()
    alpha_pattern: Pattern[PositiveFloat] = ()
    bias: Literal["none", "lora_only", "all"] = "none"
    modules_to_save: tuple[str, ...] = ()

    def changes(self, backbone: Backbone) -> Blueprint:
        """Adds updates beside the layers of the blocks. Raises `MissingExtraError` without peft, too."""
        require("peft", "lora", "The method lora")  # only where it is used, since it brings `transformers`
        grafts = tuple(
            graft for segment in find_segments(backbone, self.blocks) for graft in self._updates(backbone, segment)
        )
        attention = self._attention(backbone)
        if not (grafts or attention):
            kind = "layer" if self.layers == "all" else f"{self.layers} layer"
            others = "other targets" if self.targets else "other blocks"
            others = others if self.layers == "all" else f"layers='all', {others}"
            raise MethodNotApplicableError(
                f"lora: {backbone.spec} has no {kind} in {', '.join(self.blocks) or 'its blocks'} that can have a low-rank "
                f"update{f' and whose name is {self.targets!r}' if self.targets else ''}. Try {others}, or the methods "
                "`scale-bias` or `subset`."
            )
        wrapped = {name for graft in grafts for name in layers_of(backbone, graft)}
        biased = wrapped | {name.rpartition(".")[0] for name in attention}
        owned = dict.fromkeys((*attention, *self._biases(backbone, biased), *self._saved(backbone, wrapped)))
        return Blueprint(owned=tuple(owned), grafts=grafts)

    def reweightings(self, backbone: Backbone) -> Mapping[str, Callable[[], Reweighting]]:
        """Those of attention that reads its weights itself."""
        return {
            name: partial(LowRank, backbone.chain.tensor(name), *self._size(name.rpartition(".")[0]), self.rslora)
            for name in self._attention(backbone)
        }

    def _updates(self, backbone: Backbone, segment: Segment) -> Iterable[Graft]:
        """Grafts on one segment, one for each rank and scale."""
        groups: dict[tuple[int, float], list[str]] = {}
        for name in find_layers(backbone, segment, LAYERS[self.layers], has_lengths if self.dora else is_dense):
            layer = weight_name(segment, name).removesuffix(".weight")
            if self._wants(layer):
                groups.setdefault(self._size(layer), []).append(name)
        added = variants(self.rslora, self.dora)
        return [
            graft_on(segment, GRAFT, rank=rank, scale=scale, **added, layers=layers)
            for (rank, scale), layers in groups.items()
        ]

    def _attention(self, backbone: Backbone) -> tuple[str, ...]:
        """The backbone's names of the weights of attention that an update is added to."""
        if self.dora or self.layers == "convolution":
            return ()
        names = name_tensors(find_segments(backbone, self.blocks), attention_weights)
        return tuple(name for name in names if self._wants(name.rpartition(".")[0]))

    def _wants(self, layer: str) -> bool:
        """True for a layer that `targets` takes; attention is taken with its output projection."""
        return not self.targets or any(
            re.fullmatch(self.targets, one) for one in (layer, layer.removesuffix(".out_proj"))
        )

    def _size(self, layer: str) -> tuple[int, float]:
        """Rank and scale of a layer."""
        return find_value(self.rank_pattern, layer, self.rank), find_value(self.alpha_pattern, layer, self.scale)

    def _biases(self, backbone: Backbone, layers: set[str]) -> Iterable[str]:
        if self.bias == "none":
            return ()
        names = name_tensors(
            backbone.chain, lambda module: ["bias"] if getattr(module, "bias", None) is not None else []
        )
        return [name for name in names if self.bias == "all" or name.rpartition(".")[0] in layers]

    def _saved(self, backbone: Backbone, layers: set[str]) -> Iterable[str]:
        """The parameters of the modules to save. Raises `MethodError` where a name means none, or one with an update."""
        if not self.modules_to_save:
            return []
        names = [name for name, _ in backbone.module.named_modules() if name and name != backbone.classifier]
        parameters = name_tensors(
            backbone.chain, lambda module: [name for name, _ in module.named_parameters(recurse=False)]
        )
        saved = []
        for end in self.modules_to_save:
            chosen = [name for name in names if name.endswith(end)]
            inside = [one for one in parameters if any(one.startswith(f"{name}.") for name in chosen)]
            if not inside:
                raise MethodError(
                    f"lora: no module of {backbone.spec} with parameters has a name that ends with {end!r}."
                )
            if both := [one for one in inside if one.rpartition(".")[0] in layers]:
                raise MethodError(
                    f"lora: modules_to_save={end!r} holds {both[0]}, whose layer has an update. Drop one of them."
                )
            saved += inside
        return saved


def find_value(pattern: Iterable[tuple[str, T]], layer: str, default: T) -> T:
    """The value of the first expression that matches the end of a layer's name, from a dot on."""
    return next((value for end, value in pattern if re.fullmatch(rf"(?:.*\.)?(?:{end})", layer)), default)


def layers_of(backbone: Backbone, graft: Graft) -> list[str]:
    """The backbone's names of the layers that a graft has updates of."""
    segment = backbone.chain[graft.start]
    return [weight_name(segment, name).removesuffix(".weight") for name in graft.arguments["layers"]]


def attention_weights(module: nn.Module) -> list[str]:
    """Names of a module's own matrices that `nn.MultiheadAttention` reads without calling a layer."""
    names = (
        ["weight"] if type(module) is OUT_PROJECTION else ATTENTION if isinstance(module, nn.MultiheadAttention) else ()
    )
    return [name for name in names if getattr(module, name, None) is not None]


class LowRank(Reweighting):
    """W -> W + factor B A, with factor scale / rank, or scale / √rank for rsLoRA."""

    trains = "delta"

    def __init__(self, weight: Tensor, rank: int, scale: float, rslora: bool = False) -> None:
        super().__init__()
        self.factor = scale / (math.sqrt(rank) if rslora else rank)
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.factor * self.lora_B @ self.lora_A

    def stored(self) -> dict[str, Tensor]:
        return {"left": (self.factor * self.lora_B).detach(), "right": self.lora_A.detach()}


def variants(rslora: bool, dora: bool, bias: bool = False) -> dict[str, bool]:
    """The arguments of a graft for these variants of LoRA; those that are off have none, as in files before there were any."""
    return {name: True for name, on in (("rslora", rslora), ("dora", dora), ("bias", bias)) if on}


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
    variant: nn.Module,
    rank: int,
    scale: float,
    layers: list[str],
    rslora: bool = False,
    dora: bool = False,
    bias: bool = False,
) -> nn.Module:
    """Put peft's layers in place of those named in `layers` (the empty name is the variant itself), which they hold.

    With `bias` B has one. Raises `MissingExtraError` without peft, TypeError or ValueError for layers or ranks that peft
    cannot adapt.
    """
    peft = require("peft", "lora", "A patch with low-rank updates")
    if not 0 < rank <= MAX_RANK:
        raise ValueError(f"the rank {rank} is not between 1 and {MAX_RANK}")
    if not all(isinstance(one, bool) for one in (rslora, dora, bias)):
        raise TypeError(f"rslora={rslora!r}, dora={dora!r}, bias={bias!r}: expected true or false")
    holder = nn.ModuleDict({"variant": variant})  # peft replaces members, and leaves its records on what it is given
    targets = [f"variant.{name}".rstrip(".") for name in layers]
    for target in targets:
        layer = holder.get_submodule(target)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise TypeError(f"{target} is a {type(layer).__name__}, not a linear layer or 2-d convolution")
    trained = [parameter for parameter in variant.parameters() if parameter.requires_grad]
    exactly = "|".join(map(re.escape, targets))
    options = {"use_rslora": rslora, "use_dora": dora, "lora_bias": bias}
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=exactly, **options)
    peft.inject_adapter_in_model(config, holder, ADAPTER)
    for parameter in trained:  # peft froze what other parts of the patch train
        parameter.requires_grad_(True)
    for target in targets:
        wrapper: Any = holder.get_submodule(target)
        own = {name: value for name, value in vars(wrapper.base_layer).items() if not name.startswith("_")}
        vars(wrapper).update(
            {name: value for name, value in own.items() if not hasattr(wrapper, name)}
        )  # some networks read them
        if dora or bias:
            added: Any = holder.get_submodule(f"{target}.{'lora_magnitude_vector' if dora else 'lora_B'}.{ADAPTER}")
            added.strength = 1.0
            added.register_forward_hook(_take_share)
        else:
            holder.get_submodule(f"{target}.lora_dropout").add_module(ADAPTER, Strength())
    return holder["variant"]


def _take_share(added: Any, inputs: Any, result: Tensor) -> Tensor:
    """The share that takes effect of DoRA's whole addition to the frozen output, or of an update with a bias."""
    return result if added.strength == 1 else added.strength * result
