"""Backbone files: safetensors weights whose metadata names the architecture, its arguments and the preprocessing.

Files come from strangers. One may name an architecture of the zoo and plain values for its constructor. It may not make
the constructor read other files or addresses, nor set what `load_backbone` keeps for its caller.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.text import MAX_LENGTH, Text, check_printable, first_problem

METADATA_KEY = "modelpatch_backbone"
READING = r"weights.*|pretrained_.*|checkpoint_.*|cache_dir|hf_hub_.*|features_only|feature_cls"
CALLERS = r"spec|preprocessing|classifier|segments"
REFUSED = re.compile(f"{READING}|{CALLERS}")
MAX_NUMBER = 2**20  # a wider network would only be named to exhaust the memory
REPEATED = re.compile(
    r".*(depth|layer|block|repeat|stage|group|level|module|count).*"
)  # arguments that may number modules
MAX_REPEATED = 1024  # a deeper one, to exhaust time
MAX_METADATA = 4 * 2**20


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments from a file. Raises ValueError for one that no file may set, or that is not plain."""
    for name, value in arguments.items():
        check_printable(name)
        if len(name) > MAX_LENGTH or REFUSED.fullmatch(name):
            raise ValueError(f"a file cannot set {name[:80]!r} of its backbone")
        _check_plain(name, value, MAX_REPEATED if REPEATED.fullmatch(name) else MAX_NUMBER)
    return arguments


def _check_plain(name: str, value: Any, most: int) -> None:
    if isinstance(value, list | tuple) and len(value) <= MAX_LENGTH:
        for item in value:
            _check_plain(name, item, most)
    elif isinstance(value, str) and len(value) <= MAX_LENGTH:
        check_printable(value)
    elif not (value is None or (isinstance(value, int | float) and abs(value) <= most)):
        given = f"{type(value).__name__} {str(value)[:80]!r}"
        raise ValueError(f"{name} = {given} is no plain value: expected numbers to {most:,}, short words, lists")


Arguments = Annotated[dict[str, Any], AfterValidator(check_arguments)]
Architecture = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=MAX_LENGTH)]


class Described(BaseModel, frozen=True):
    """A backbone's own description in its file: timm's name of the architecture, its arguments and its preprocessing.

    `classes` name the outputs of its own head, if they have names; `about` holds facts that nothing here relies on.
    """

    architecture: Architecture
    arguments: Arguments
    preprocessing: Preprocessing | None
    classes: tuple[Text, ...]
    about: dict[str, Any]

    @classmethod
    def parse(cls, text: str, source: object) -> Self:
        """From the metadata of the file `source`. Raises `BackboneError` that names it and what is wrong."""
        if len(text) > MAX_METADATA:
            raise BackboneError(
                f"the metadata of {source} has {len(text):,} characters; at most {MAX_METADATA:,} are read."
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            problem = first_problem(error)
            raise BackboneError(f"the metadata of {source} does not describe a backbone: {problem}.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; half-precision weights are widened to float32, exactly."""
    try:
        if not path.is_file():
            raise UnknownBackboneError(f"there is no file {path}. Expected a safetensors file of a backbone's weights.")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{str(path)[:300]} is not a readable safetensors file: {str(error)[:300]}") from error
    return {name: widen(value) for name, value in tensors.items()}, metadata


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32, exactly; other tensors as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def describe(metadata: dict[str, str], path: Path) -> Described:
    """The description of the network in our own metadata, or in plain keys. Raises `BackboneError` for what cannot be one."""
    if METADATA_KEY in metadata:
        return Described.parse(metadata[METADATA_KEY], path)
    if "architecture" not in metadata:
        raise BackboneError(
            f"{path} does not say which architecture it holds: its metadata has {sorted(metadata) or 'no keys'}. Expected "
            f"`architecture`, or write it with save_backbone, or load_backbone('timm:NAME', weights={str(path)!r})."
        )
    numbers = {"num_classes": int, "pad_type": str, "bn_eps": float, "global_pool": str}
    seen = {"crop_pct": float, "interpolation": str}
    lists = {"mean": float, "std": float, "input_size": int}
    about = dict(metadata)
    try:
        preprocessing: dict[str, Any] = {key: kind(about.pop(key)) for key, kind in seen.items() if key in about}
        for key, kind in lists.items():
            if key in about:
                preprocessing[key] = [kind(value) for value in about.pop(key).split(",")]
        plain = {
            "architecture": about.pop("architecture"),
            "arguments": {key: kind(about.pop(key)) for key, kind in numbers.items() if key in about},
            "preprocessing": preprocessing,
            "classes": [],
            "about": about,
        }
    except ValueError as error:  # words where numbers are expected
        raise BackboneError(f"the metadata of {path} does not describe a backbone: {error}.") from error
    return Described.parse(json.dumps(plain), path)


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load a state dict. Raises `BackboneError` for tensors that do not fit the module or are not finite."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:3])
        raise BackboneError(f"the tensors of {source} do not fit {type(module).__name__}: {reason}") from error
    check_finite(module, source)


def check_finite(module: nn.Module, source: str) -> None:
    """Raise `BackboneError` for a parameter that holds NaN or infinity."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BackboneError(f"the tensor {name} of {source} holds NaN or infinity. Fetch or train it again.")


def check_writable(backbone: Backbone) -> str:
    """The architecture's name, for `save_backbone`. Raises `BackboneError` for a network that a file could not name."""
    if backbone.architecture is None or backbone.spec.startswith("openclip:"):
        raise BackboneError(
            f"{backbone.spec} cannot be written as a backbone file, which names an architecture of timm and its arguments.",
            "Keep the result's backbone in Python (without `out`), or start from timm:NAME.",
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
