"""Load a backbone by name, from a file, from the package or from a module at hand.

Each source (`timm:`, `torchvision:`, `transformers:`, `openclip:`, `file:`, `bundled:`) is described in its file of
`sources/`; other distributions register theirs (see `sources/base.py`).
"""

import copy
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.checkpoint import load_checkpoint
from modelpatch.backbone.cuts import find_repeated
from modelpatch.backbone.places import LocalPlace, remember
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.reach import reaching
from modelpatch.backbone.sources.base import SOURCES, BuiltNetwork
from modelpatch.backbone.sources.timm import preprocessing_of
from modelpatch.backbone.sources.transformers import wrap_model
from modelpatch.errors import BackboneError, UnknownBackboneError

OPTIONS: dict[str, tuple[Any, str]] = {
    "pretrained": (bool, "true or false"),
    "weights": (str | Path | None, "the path of a checkpoint"),
    "preprocessing": (Preprocessing | None, "a modelpatch.backbone.Preprocessing, which is made in Python"),
    "classifier": (str | None, "the name of a module"),
    "segments": (list | tuple, 'a list of names of modules, such as ["stem", "stage1"]'),
    "seed": (int, "an integer from 0 to 2**63 - 1"),
}


def load_backbone(
    spec: str | nn.Module,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    classifier: str | None = None,
    segments: Sequence[str] = (),
    seed: int = 0,
    **arguments: Any,
) -> Backbone:
    """A frozen backbone from a specification such as `timm:resnet50.a1_in1k`, or an `nn.Module`, which is frozen in place.

    `pretrained=False` gives random weights that follow `seed`, so that a patch of them can be loaded again; `weights`
    names a checkpoint (safetensors or .pth) to load instead of the published one; `arguments` go to the architecture's
    constructor. `preprocessing` overrides how images are seen; `classifier` and `segments` name modules where a network
    of your own cannot be cut automatically.

    Raises `UnknownBackboneError` for a spec that names nothing, `BackboneError` for weights that do not fit and for
    options that are not what they should be, `UntraceableBackboneError` for a network that cannot be cut.
    """
    given: tuple[Any, ...] = (pretrained, weights, preprocessing, classifier, segments, seed)
    for (name, (kind, expected)), value in zip(OPTIONS.items(), given, strict=True):
        fits = isinstance(value, kind) and (name != "seed" or 0 <= value < 2**63)
        if not fits or (name == "segments" and not all(isinstance(one, str) for one in value)):
            raise BackboneError(f"{name} is {value!r}; expected {expected}.")
    if isinstance(spec, nn.Module):
        spec = unwrap(spec)
        if arguments or weights is not None or not pretrained:
            raise BackboneError(
                f"{type(spec).__name__} is built already: pretrained=False, weights=... and arguments of a constructor "
                f"({', '.join(arguments) or 'none given'}) do not apply to it. Build the module as you want it."
            )
        built, place = wrap_model(spec, preprocessing) or _plain(spec, preprocessing), None
    else:
        built, place = _build(spec, pretrained, weights, seed, arguments), _place(spec, weights, segments, arguments)
    if built.text is None:
        classifier = classifier or find_classifier(built.module)
    facts = vars(replace(built, preprocessing=preprocessing or built.preprocessing))
    backbone = Backbone(**facts, classifier=classifier, segments=segments, place=place)
    if place is not None:
        remember(backbone.fingerprints.chain, place)
    return backbone


def _plain(module: nn.Module, preprocessing: Preprocessing | None) -> BuiltNetwork:
    """A module as it is."""
    seen = preprocessing or preprocessing_of(module)
    return BuiltNetwork(module=module, preprocessing=seen, spec=f"module:{type(module).__name__}", arguments={})


def _place(
    spec: str, weights: str | Path | None, segments: Sequence[str], arguments: dict[str, Any]
) -> LocalPlace | None:
    """The place of a network of local files or of a repository that anybody may fill; None for one that its name tells."""
    kind, _, name = spec.partition(":")
    source = SOURCES.find(kind)()
    local = source.names_file(name)
    if not local and weights is None and source.find_repository(name) is None:
        return None
    spec = f"{kind}:{Path(name).expanduser().absolute()}" if local else spec
    own = None if weights is None else str(Path(weights).expanduser().absolute())
    return LocalPlace(spec=spec, arguments=arguments, weights=own, segments=tuple(segments))


def _build(
    spec: str, pretrained: bool, weights: str | Path | None, seed: int, arguments: dict[str, Any]
) -> BuiltNetwork:
    """The network of a specification, with the arguments that build it again."""
    kind, _, name = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if not name or kind not in SOURCES.names():
        known = ", ".join(f"{source}:NAME" for source in SOURCES.names())
        raise UnknownBackboneError(f"{spec!r} is not a backbone. Expected {known} or an nn.Module.")
    source = SOURCES.find(kind)()
    if source.holds_weights and not (pretrained and weights is None):
        raise BackboneError(
            f"{spec} is a file of weights: pretrained=False and weights=... do not apply to it. Build the architecture with "
            "timm:NAME and its arguments instead."
        )
    published = pretrained and weights is None
    downloads: AbstractContextManager[None] = nullcontext()
    if source.address and not source.names_file(name) and (published or source.find_repository(name)):
        downloads = reaching(source.address, spec)
    with torch.random.fork_rng(devices=[]), downloads:
        torch.manual_seed(seed)
        built = source.build(name, published, arguments)
        if weights is not None:
            path, resizes = Path(weights).expanduser(), source.outputs not in arguments
            outputs = load_checkpoint(built.module, path, find_classifier(built.module), resizes)
            arguments = arguments if outputs is None else {**arguments, source.outputs: outputs}
    if not published and weights is None:
        arguments = {**arguments, "pretrained": False, "seed": seed}
    recorded = arguments if built.arguments is None else built.arguments
    return replace(built, spec=built.spec or spec, arguments=recorded)


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside what compiles, averages or distributes it."""
    while isinstance(module, OptimizedModule | nn.DataParallel | DistributedDataParallel | AveragedModel):
        inner = module._orig_mod if isinstance(module, OptimizedModule) else module.module
        assert isinstance(inner, nn.Module)
        module = inner
    if module._compiled_call_impl is not None:  # compiled in place, which stays as it is for its owner
        module = copy.copy(module)
        module._compiled_call_impl = None
    return module


def find_classifier(module: nn.Module) -> str | None:
    """The name of the module whose input is the features: as timm says it, else the last linear layer outside of blocks.

    Without any, a 1x1 convolution that is called a classifier.
    """
    names = {id(child): name for name, child in module.named_modules()}
    if hasattr(module, "get_classifier"):
        head: Any = module.get_classifier()  # type: ignore[operator]
        return names.get(id(head)) if isinstance(head, nn.Module) and any(True for _ in head.parameters()) else None
    blocks = tuple(f"{name}." for name in find_repeated(module))
    outside = [(name, child) for name, child in module.named_modules() if not name.startswith(blocks)]
    linear = [name for name, child in outside if isinstance(child, nn.Linear)]
    pointwise = [name for name, child in outside if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)]
    called = [name for name in pointwise if re.search(r"(^|\.)(classifier|head|fc|logits)(\.|$)", name)]
    return (linear or called or [None])[-1]
