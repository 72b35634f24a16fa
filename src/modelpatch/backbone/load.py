"""Load a backbone by name, from a file, from the package or from a module at hand.

| spec             | where the network comes from                                                    |
|------------------|---------------------------------------------------------------------------------|
| `timm:NAME`        | timm, with the weights of its tag (`timm:resnet50.a1_in1k`)                     |
| `torchvision:NAME` | torchvision's classification models, with their default weights                 |
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocess import Preprocessing
from modelpatch.errors import BackboneError, UnknownBackboneError

ASSETS = Path(__file__).parent / "assets"
METADATA_KEY = "modelpatch_backbone"
KINDS = "timm:NAME, torchvision:NAME, file:PATH, bundled:NAME or an nn.Module"


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

    Raises `UnknownBackboneError` for a spec that names nothing, `BackboneError` for weights that do not fit,
    `UntraceableBackboneError` for a network that cannot be cut.
    """
    common: dict[str, Any] = {"segments": segments}
    if isinstance(spec, nn.Module):
        preprocessing = preprocessing or _preprocessing_of(spec)
        name = f"module:{type(spec).__name__}"
        return Backbone(spec, preprocessing, name, classifier=classifier or find_classifier(spec), **common)
    kind, _, name = spec.partition(":")
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
    if kind not in ("timm", "torchvision") or not name:
        raise UnknownBackboneError(f"{spec!r} is not a backbone. Expected {KINDS}.")
    published = pretrained and weights is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = _build_timm if kind == "timm" else _build_torchvision
        module, default = build(name, published, arguments)
    if weights is not None:
        _load_state(module, _read_tensors(Path(weights))[0], str(weights))
    recorded = {**arguments, **({} if published or weights is not None else {"pretrained": False, "seed": seed})}
    classifier = classifier or find_classifier(module)
    return Backbone(module, preprocessing or default, spec, recorded, classifier, **common)


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

    return Preprocessing.from_timm(timm.data.config.resolve_model_data_config(module))


def _build_torchvision(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocessing]:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise UnknownBackboneError(
            f"torchvision has no classification model {name!r}. See torchvision.models.list_models()."
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
    path = ASSETS / f"{name}.safetensors"
    if not path.exists():
        have = ", ".join(sorted(f"bundled:{asset.stem}" for asset in ASSETS.glob("*.safetensors")))
        raise UnknownBackboneError(f"the package bundles no backbone {name!r}. It has: {have}.")
    return path


def _load_file(
    path: Path,
    spec: str,
    preprocessing: Preprocessing | None,
    classifier: str | None,
    common: dict[str, Any],
    arguments: dict[str, Any],
) -> Backbone:
    tensors, metadata = _read_tensors(path)
    try:
        described = _describe(metadata, path)
        recorded = Preprocessing(**(described["preprocessing"] or {})).model_dump(exclude_unset=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BackboneError(f"the metadata of {path} does not describe a backbone: {error!r}") from error
    described["arguments"] = {**described["arguments"], **arguments}
    module, default = _build_timm(described["architecture"], False, described["arguments"])
    _load_state(module, tensors, str(path))
    return Backbone(
        module,
        preprocessing or Preprocessing(**{**default.model_dump(), **recorded}),
        spec,
        described["arguments"],
        classifier or find_classifier(module),
        classes=described["classes"],
        about=described["about"],
        **common,
    )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; half-precision weights are widened to float32, exactly."""
    if not path.is_file():
        raise UnknownBackboneError(f"there is no file {path}. Expected a safetensors file with a backbone's weights.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{path} is not a readable safetensors file: {error}") from error
    half = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in half else value for name, value in tensors.items()}, metadata


def _describe(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Architecture, arguments, preprocessing, classes and facts from our own metadata or from plain keys."""
    if METADATA_KEY in metadata:
        described = json.loads(metadata[METADATA_KEY])
        return {key: described[key] for key in ("architecture", "arguments", "preprocessing", "classes", "about")}
    if "architecture" not in metadata:
        raise BackboneError(
            f"{path} does not say which architecture it holds: its metadata has {sorted(metadata) or 'no keys'}. Expected "
            f"`architecture`, or write it with modelpatch.save_backbone, or load_backbone('timm:NAME', weights={str(path)!r})."
        )
    plain = dict(metadata)
    architecture = plain.pop("architecture")
    convert = {"num_classes": int, "pad_type": str, "bn_eps": float, "global_pool": str}
    arguments = {key: kind(plain.pop(key)) for key, kind in convert.items() if key in plain}
    preprocessing: dict[str, Any] = {
        key: [float(value) for value in plain.pop(key).split(",")] for key in ("mean", "std") if key in plain
    }
    if "crop_pct" in plain:
        preprocessing["crop_pct"] = float(plain.pop("crop_pct"))
    if "interpolation" in plain:
        preprocessing["interpolation"] = plain.pop("interpolation")
    if "input_size" in plain:
        preprocessing["input_size"] = [int(value) for value in plain.pop("input_size").split(",")]
    return {
        "architecture": architecture,
        "arguments": arguments,
        "preprocessing": preprocessing,
        "classes": [],
        "about": plain,
    }


def _load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise BackboneError(
            f"the tensors of {source} do not fit {type(module).__name__}: {' '.join(lines[1:3])}"
        ) from error


def save_backbone(backbone: Backbone, path: str | Path, architecture: str, half: bool = False, **about: Any) -> None:
    """Write a backbone as a file that `load_backbone("file:PATH")` reads.

    `architecture` is timm's name and `backbone.arguments` its arguments; `half=True` stores float16. `about` is kept
    as facts (accuracy, data, licence). The write is atomic.
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
    metadata = {METADATA_KEY: json.dumps(described, sort_keys=True), "format": "pt"}
    write_bytes(Path(path), save(tensors, metadata))
