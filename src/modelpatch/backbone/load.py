"""Load a backbone by name, from a file, from the package or from a module at hand.

| spec             | where the network comes from                                                    |
|------------------|---------------------------------------------------------------------------------|
| `timm:NAME`        | timm, with the weights of its tag (`timm:resnet50.a1_in1k`)                     |
| `torchvision:NAME` | torchvision's models with their default weights; segmenters and detectors as in `dense_zoo.py` |
| `openclip:NAME/TAG` | the image tower of an open_clip model, with its text tower beside it            |
| `file:PATH`        | a safetensors file whose metadata names architecture, arguments, preprocessing  |
| `bundled:NAME`     | a file that ships with the package (`bundled:tiny`)                             |
| an `nn.Module`     | as it is; frozen in place                                                       |
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.described import Described
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.openclip import build_openclip
from modelpatch.backbone.sources.torchvision_dense import build_dense, dense_models
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.text import first_problem

ASSETS = Path(__file__).parent / "assets"
METADATA_KEY = "modelpatch_backbone"
KINDS = "timm:NAME, torchvision:NAME, openclip:NAME/TAG, file:PATH, bundled:NAME or an nn.Module"
OPTIONS: dict[str, tuple[Any, str]] = {
    "pretrained": (bool, "true or false"),
    "weights": (str | Path | None, "the path of a safetensors file"),
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
    """A frozen backbone from a specification (see the module's table).

    `pretrained=False` gives random weights that follow `seed`, so that a patch of them can be loaded again; `weights`
    names a safetensors state dict to load instead of the published one; `arguments` go to the architecture's
    constructor. `preprocessing` overrides how images are seen; `classifier` and `segments` name modules where a network
    of your own cannot be cut automatically.

    Raises `UnknownBackboneError` for a spec that names nothing, `BackboneError` for weights that do not fit and for
    options that are not what they should be, `UntraceableBackboneError` for a network that cannot be cut.
    """
    _check_options(
        pretrained=pretrained,
        weights=weights,
        preprocessing=preprocessing,
        classifier=classifier,
        segments=segments,
        seed=seed,
    )
    common: dict[str, Any] = {"segments": segments}
    if isinstance(spec, nn.Module):
        if arguments or weights is not None or not pretrained:
            raise BackboneError(
                f"{type(spec).__name__} is built already: pretrained=False, weights=... and arguments of a constructor "
                f"({', '.join(arguments) or 'none given'}) do not apply to it. Build the module as you want it."
            )
        preprocessing = preprocessing or _preprocessing_of(spec)
        name = f"module:{type(spec).__name__}"
        return Backbone(spec, preprocessing, name, classifier=classifier or find_classifier(spec), **common)
    kind, _, name = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if kind in ("bundled", "file") and not (pretrained and weights is None):
        raise BackboneError(
            f"{spec} is a file of weights: pretrained=False and weights=... do not apply to it. Build the architecture with "
            "timm:NAME and its arguments instead."
        )
    if kind == "bundled":
        return _load_file(_bundled_path(name), spec, preprocessing, classifier, common, arguments)
    if kind == "file":
        path = Path(name)
        return _load_file(path, f"file:{path.name}", preprocessing, classifier, common, arguments)
    if kind not in ("timm", "torchvision", "openclip") or not name:
        raise UnknownBackboneError(f"{spec!r} is not a backbone. Expected {KINDS}.")
    published = pretrained and weights is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = None
        if kind == "openclip":
            module, default, text = build_openclip(name, published, arguments)
        else:
            build = _build_timm if kind == "timm" else _build_torchvision
            module, default = build(name, published, arguments)
    if weights is not None:
        _load_state(module, _read_tensors(Path(weights))[0], str(weights))
    recorded = {**arguments, **({} if published or weights is not None else {"pretrained": False, "seed": seed})}
    if text is None:
        classifier = classifier or find_classifier(module)
    return Backbone(module, preprocessing or default, spec, recorded, classifier, text=text, **common)


def _check_options(**given: Any) -> None:
    for name, (kind, expected) in OPTIONS.items():
        if not isinstance(given[name], kind):
            raise BackboneError(f"{name} is {given[name]!r}; expected {expected}.")
    if not all(isinstance(name, str) for name in given["segments"]):
        raise BackboneError(f"segments is {given['segments']!r}; expected {OPTIONS['segments'][1]}.")
    if not 0 <= given["seed"] < 2**63:
        raise BackboneError(f"seed is {given['seed']}; expected {OPTIONS['seed'][1]}.")


def find_classifier(module: nn.Module) -> str | None:
    """The name of the module whose input is the features: timm's own word for it, else the last linear layer."""
    names = {id(child): name for name, child in module.named_modules()}
    if hasattr(module, "get_classifier"):
        head: Any = module.get_classifier()  # type: ignore[operator]
        return names.get(id(head)) if isinstance(head, nn.Linear) else None
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return linear[-1] if linear else None


# zoos -------------------------------------------------------------------------------------------------------


def _build_timm(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocessing]:
    import timm

    try:
        module = timm.create_model(name, pretrained=pretrained, **arguments)
    except RuntimeError as error:
        if "Unknown model" in str(error):
            close = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
            hint = f"Similar: {', '.join(close)}." if close else "See timm.list_models()."
            raise UnknownBackboneError(f"timm has no model {name!r}. {hint}") from error
        raise BackboneError(f"timm could not build {name!r}: {error}") from error
    except Exception as error:  # a hub that cannot be reached, an argument the constructor does not take
        raise BackboneError(f"timm could not build {name!r} with {arguments}: {error}") from error
    return module, _preprocessing_of(module)


def _preprocessing_of(module: nn.Module) -> Preprocessing:
    if not hasattr(module, "pretrained_cfg"):
        return Preprocessing()
    import timm

    config = timm.data.config.resolve_model_data_config(module)
    try:
        return Preprocessing.from_timm(config)
    except ValidationError as error:
        raise BackboneError(
            f"{type(module).__name__} sees images in a way that is not supported: {first_problem(error)}. Expected square "
            "RGB images; build the module yourself and give it to load_backbone with preprocessing=..."
        ) from error


def _build_torchvision(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocessing]:
    import torchvision

    if name in dense_models():
        return build_dense(name, pretrained, arguments)
    if name not in torchvision.models.list_models(torchvision.models):
        raise UnknownBackboneError(
            f"torchvision has no model {name!r} that could be a backbone: for classification, FCN, DeepLabV3, Faster R-CNN or "
            "SSD. See torchvision.models.list_models()."
        )
    published = torchvision.models.get_model_weights(name).DEFAULT
    try:
        extra = {} if "init_weights" not in inspect.signature(_constructor(name)).parameters else {"init_weights": True}
        module = torchvision.models.get_model(name, weights=published if pretrained else None, **{**extra, **arguments})
    except Exception as error:
        raise BackboneError(f"torchvision could not build {name!r} with {arguments}: {error}") from error
    transform = published.transforms()
    crop = int(transform.crop_size[0])
    return module, Preprocessing(
        input_size=(3, crop, crop),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        crop_pct=crop / transform.resize_size[0],
    )


def _constructor(name: str) -> Any:
    import torchvision

    return torchvision.models.get_model_builder(name)


# files ------------------------------------------------------------------------------------------------------


def _bundled_path(name: str) -> Path:
    bundled = {asset.stem: asset for asset in sorted(ASSETS.glob("*.safetensors"))}
    if name not in bundled:
        have = ", ".join(f"bundled:{stem}" for stem in bundled)
        raise UnknownBackboneError(f"the package bundles no backbone {name[:80]!r}. It has: {have}.")
    return bundled[name]


def _load_file(
    path: Path,
    spec: str,
    preprocessing: Preprocessing | None,
    classifier: str | None,
    common: dict[str, Any],
    arguments: dict[str, Any],
) -> Backbone:
    tensors, metadata = _read_tensors(path)
    described = _describe(metadata, path)
    recorded = described.preprocessing.model_dump(exclude_unset=True) if described.preprocessing else {}
    built = {**described.arguments, **arguments}
    module, default = _build_timm(described.architecture, False, built)
    _load_state(module, tensors, str(path))
    outputs = getattr(module, "num_classes", None)
    if described.classes and len(described.classes) != outputs:
        raise BackboneError(f"{path} names {len(described.classes)} classes for the {outputs} outputs of its network.")
    return Backbone(
        module,
        preprocessing or Preprocessing(**{**default.model_dump(), **recorded}),
        spec,
        built,
        classifier or find_classifier(module),
        classes=described.classes,
        about=described.about,
        **common,
    )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; half-precision weights are widened to float32, exactly."""
    try:
        if not path.is_file():
            raise UnknownBackboneError(
                f"there is no file {path}. Expected a safetensors file with a backbone's weights."
            )
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{str(path)[:300]} is not a readable safetensors file: {str(error)[:300]}") from error
    half = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in half else value for name, value in tensors.items()}, metadata


def _describe(metadata: dict[str, str], path: Path) -> Described:
    """What our own metadata says of the network, or plain keys. Raises `BackboneError` for what cannot be one."""
    if METADATA_KEY in metadata:
        return Described.parse(metadata[METADATA_KEY], path)
    if "architecture" not in metadata:
        raise BackboneError(
            f"{path} does not say which architecture it holds: its metadata has {sorted(metadata) or 'no keys'}. Expected "
            f"`architecture`, or write it with save_backbone, or load_backbone('timm:NAME', weights={str(path)!r})."
        )
    try:
        return Described.parse(json.dumps(_read_plain(dict(metadata))), path)
    except ValueError as error:
        raise BackboneError(f"the metadata of {path} does not describe a backbone: {error}.") from error


def _read_plain(metadata: dict[str, str]) -> dict[str, Any]:
    """Plain keys as the fields of `Described`. Raises ValueError for words where numbers are expected."""
    numbers = {"num_classes": int, "pad_type": str, "bn_eps": float, "global_pool": str}
    seen = {"crop_pct": float, "interpolation": str}
    lists = {"mean": float, "std": float, "input_size": int}
    preprocessing: dict[str, Any] = {key: kind(metadata.pop(key)) for key, kind in seen.items() if key in metadata}
    for key, kind in lists.items():
        if key in metadata:
            preprocessing[key] = [kind(value) for value in metadata.pop(key).split(",")]
    return {
        "architecture": metadata.pop("architecture"),
        "arguments": {key: kind(metadata.pop(key)) for key, kind in numbers.items() if key in metadata},
        "preprocessing": preprocessing,
        "classes": [],
        "about": metadata,
    }


def _load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise BackboneError(
            f"the tensors of {source} do not fit {type(module).__name__}: {' '.join(lines[1:3])}"
        ) from error
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BackboneError(f"the tensor {name} of {source} holds NaN or infinity. Fetch or train it again.")


def check_writable(backbone: Backbone) -> str:
    """The architecture's name, for `save_backbone`. Raises `BackboneError` for a network that a file could not name."""
    if backbone.architecture is None or backbone.spec.startswith("openclip:"):
        raise BackboneError(
            f"{backbone.spec} cannot be written as a backbone file, which names an architecture of timm and its arguments. "
            "Leave `out` away and keep the result's backbone, or start from timm:NAME."
        )
    return backbone.architecture


def save_backbone(backbone: Backbone, path: str | Path, architecture: str, half: bool = False, **about: Any) -> None:
    """Write a backbone as a file that `load_backbone("file:PATH")` reads.

    `architecture` is timm's name and `backbone.arguments` its arguments; `half=True` stores float16. `about` is kept
    as facts (accuracy, data, licence). The write is atomic. Raises `BackboneError` for what no reader would accept.
    """
    described = {
        "architecture": architecture,
        "arguments": {k: v for k, v in backbone.arguments.items() if k not in ("pretrained", "seed")},
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "classes": list(backbone.classes),
        "about": {**backbone.about, **about},
    }
    tensors = {
        name: value.half() if half and value.is_floating_point() else value.contiguous()
        for name, value in backbone.module.state_dict().items()
    }
    try:
        text = json.dumps(described, sort_keys=True)
        data = save(tensors, {METADATA_KEY: text, "format": "pt"})
    except (TypeError, ValueError, RuntimeError) as error:  # a fact that is no JSON, tensors that share memory
        raise BackboneError(f"{backbone.spec} cannot be written to {path}: {error}") from error
    Described.parse(text, path)
    write_bytes(Path(path), data)
