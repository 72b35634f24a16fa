"""LoRA patches in the folder format of the `peft` library, written and read.

    FOLDER/adapter_config.json           which layers, rank and alpha
    FOLDER/adapter_model.safetensors     base_model.model.<layer>.lora_A.weight   (rank, in[, k, k])
                                         base_model.model.<layer>.lora_B.weight   (out, rank[, 1, 1])
                                         base_model.model.<layer>.lora_magnitude_vector of DoRA, (out) or (1, out, 1, 1)
                                         base_model.model.<classifier>.weight     (classes, features), and .bias

`PeftModel.from_pretrained(base, FOLDER)` gives a patch's logits for a `base` whose classifier has the task's size, and
an imported folder gives the logits of that model. Options of PEFT that a patch does not support are refused by name.
"""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, PositiveFloat, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.computation import Computation
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import (
    ForeignTensorError,
    InvalidPatchError,
    ModelpatchError,
    NonFiniteTensorError,
    NotAPatchError,
    PatchError,
    WrongBackboneError,
    require,
)
from modelpatch.heads.base import HeadRecord
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.layers import is_owner, weight_name
from modelpatch.methods.lora import ADAPTER, GRAFT, LoRA, Rank, variants
from modelpatch.patch.blueprint import Graft
from modelpatch.patch.codec import FLOATS
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import first_problem

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
CHAIN = "modelpatch.chain"  # the key of the safetensors metadata that holds the fingerprint of the backbone's chain
COMPUTATION = "modelpatch.computation"  # that of the record of what the backbone computes
# Options without effect on what a finished adapter computes: where it comes from and how it was trained.
WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
)
STARTS = (True, False, "gaussian")  # the values of init_lora_weights that leave the base's weights as they are


WORDS = ("all-linear",)  # what PEFT does not read as an expression
NONE = "(?!)"  # an expression that nothing matches
SECONDS, MOST_PATTERN = 0.3, 2**18  # for all names, and characters, of an expression
Plain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,256}$")]  # PEFT puts it into an expression


class AdapterConfig(BaseModel, frozen=True, extra="allow"):
    """The options of `adapter_config.json` that a patch supports; all others must be off (see `_read_config`)."""

    peft_type: Literal["LORA"] = "LORA"
    r: Rank
    lora_alpha: PositiveFloat
    use_rslora: bool | None = None
    use_dora: bool | None = None
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Plain | list[Plain] | None = None
    modules_to_save: list[str] | None = None


def export_peft(patch: Patch, backbone: Backbone, folder: str | Path) -> Path:
    """Write a LoRA patch as a PEFT folder, each file atomically. Returns the folder, made where it does not exist.

    The head is stored under the name of the backbone's own classifier. The files hold neither the task's class names
    nor its preprocessing. Raises `PatchError` for a patch that the format cannot hold, `WrongBackboneError`, and
    `MissingExtraError` without peft.
    """
    patch.check_backbone(backbone)
    grafts = patch.grafts
    kinds = {graft.kind for graft in grafts} | ({"replace"} if patch.blueprint.owned else set())
    kinds |= {f"{patch.head.kind} head"} - {"linear head"}
    if kinds != {GRAFT}:
        raise PatchError(
            f"PEFT's folder holds low-rank updates and a head; this patch, made by {patch.method.name}, has "
            f"{', '.join(sorted(kinds)) or 'a head alone'}. Keep it as a patch file."
        )
    classifier = _classifier(backbone)
    others = [name for name, _ in backbone.module.named_modules() if name.endswith(classifier) and name != classifier]
    if others:
        raise PatchError(
            f"PEFT knows modules to save by the end of their names: besides the classifier {classifier!r} it would store "
            f"{', '.join(others[:3])}. Keep the patch as a patch file."
        )
    keys = _keys(backbone, grafts)
    downs = [key for key in keys.values() if key.endswith(".lora_A.weight")]  # one of each layer
    layers = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in downs]
    options = ("rank", "scale", "rslora", "dora")
    (rank, scale, rslora, dora), *rest = {
        tuple(graft.arguments.get(name, False) for name in options) for graft in grafts
    }
    if dora and patch.strength != 1:
        raise PatchError(f"PEFT has no strength for DoRA: the patch's is {patch.strength}. Export it at strength 1.")
    scale *= patch.strength
    if scale == 0:
        raise PatchError("the patch has strength 0, which PEFT's folder cannot hold. Give it a strength above 0.")
    if rest:
        raise PatchError(
            "the patch's updates differ in rank, scale or variant; PEFT's folder is written for one of each."
        )
    config = AdapterConfig(
        r=rank,
        lora_alpha=int(scale) if float(scale).is_integer() else scale,
        use_rslora=rslora or None,
        use_dora=dora or None,
        target_modules="|".join(map(re.escape, layers)),  # a list would name endings: conv1 in every block
        modules_to_save=[classifier],
    )
    if _targeted(config, backbone) != set(layers):
        raise PatchError(f"PEFT would not adapt the layers of this patch in {backbone.spec}. Keep it as a patch file.")
    keys |= _head_keys(classifier)
    tensors = {key: patch.tensors[name].detach().cpu().contiguous() for name, key in keys.items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelpatchError(f"cannot make the folder {folder}: {error.strerror}.") from error
    described = backbone.computing.record.model_dump_json()
    metadata = {"format": "pt", CHAIN: backbone.fingerprints.chain, COMPUTATION: described}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(tensors, metadata))
    text = json.dumps({**config.model_dump(exclude_none=True), "bias": "none"}, indent=2, sort_keys=True)
    write_bytes(folder / CONFIG, text.encode())
    return folder


def import_peft(
    folder: str | Path, backbone: Backbone, task: TaskRecord, *, preprocessing: Preprocessing | None = None
) -> Patch:
    """Read a PEFT folder with a LoRA adapter of `backbone` as a patch; `preprocessing` is that of the task's images.

    Without a trained classifier in the folder the head is the backbone's own. Only folders written by `export_peft` record
    the base they belong to, which is checked then. Raises `NotAPatchError` for files that cannot be read and
    for pickles, `InvalidPatchError` naming the option that a patch does not compute, `ForeignTensorError` for
    layers, names or shapes that do not fit, `NonFiniteTensorError`, and `MissingExtraError` without peft.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder, backbone)
    classifier = _classifier(backbone)
    grafts = _make_grafts(_targeted(config, backbone), config, backbone)
    keys = _keys(backbone, grafts)
    saved = config.modules_to_save or ()
    own_head = not any(classifier.endswith(name) or classifier.startswith(f"{name}.") for name in saved)
    keys |= {} if own_head else _head_keys(classifier)
    expected, given = set(keys.values()), set(tensors)
    if missing := sorted(expected - given):
        names = f"{len(missing)} tensors that {CONFIG} asks for: {', '.join(missing[:3])}"
        raise ForeignTensorError(f"{folder / WEIGHTS} lacks {names}.")
    if foreign := sorted(given - expected):
        raise ForeignTensorError(
            f"{folder / WEIGHTS} holds {len(foreign)} tensors that are no update of a layer named in {CONFIG} and not the "
            f"classifier's: {', '.join(foreign[:3])}."
        )
    named = {name: tensors[key] for name, key in keys.items()}
    if own_head:
        head = backbone.module.get_submodule(classifier).state_dict()
        named |= {f"head.{leaf}": tensor.detach().clone() for leaf, tensor in head.items()}
    outputs = len(named["head.weight"])
    if outputs != len(task.classes):
        found = f"the classifier of {folder} has {outputs} outputs"
        raise ForeignTensorError(f"{found}; the task {task.name!r} has {len(task.classes)} classes.")
    record = HeadRecord(features=backbone.chain.feature_dim, outputs=outputs)
    chosen = {"rank": config.r, "scale": config.lora_alpha, **variants(bool(config.use_rslora), bool(config.use_dora))}
    method = MethodRecord(name=LoRA.name, hyperparameters=chosen)
    patch = Patch.of(backbone, task, record, named, grafts=grafts, preprocessing=preprocessing, method=method)
    backbone.patched(patch)  # checks every shape
    return patch


def _targeted(config: AdapterConfig, backbone: Backbone) -> set[str]:
    """Names of the layers that PEFT itself adapts, found by adapting a structural clone."""
    peft = require("peft", "lora", "PEFT's folder format")
    fields = config.model_dump(include=set(AdapterConfig.model_fields) - {"peft_type"}, exclude_none=True)
    names = [name for name, _ in backbone.module.named_modules() if name]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(field), str) and fields[field] not in WORDS:
            matched = match_within(fields[field], names, f"{CONFIG}: {field}")
            fields[field] = "|".join(map(re.escape, matched)) or NONE
    clone = clone_module(backbone.module)
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**fields), clone)
    except (LookupError, TypeError, ValueError, re.error) as error:
        raise InvalidPatchError(f"PEFT cannot adapt {backbone.spec} as {CONFIG} says: {error}") from error
    return {name for name, module in clone.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def match_within(pattern: str, names: Sequence[str], where: str) -> list[str]:
    """The names that an expression matches as a whole. Raises `InvalidPatchError` for none, and for one without an end."""
    regex = require("regex", "lora", "PEFT's folder format")
    end = time.monotonic() + SECONDS
    try:
        compiled = regex.compile(pattern[: MOST_PATTERN + 1])
        if len(pattern) > MOST_PATTERN:
            raise TimeoutError
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.001))]
    except (TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise InvalidPatchError(
            f"{where} = {pattern[:80]!r} takes too long to match {len(names)} modules. Name the layers in a list."
        ) from error
    except regex.error as error:
        raise InvalidPatchError(f"{where} = {pattern[:80]!r} is no regular expression: {error}") from error


def _read_config(folder: Path) -> AdapterConfig:
    """The options. Raises `InvalidPatchError` for one that changes the adapter's output and that a patch does not support."""
    try:
        config = AdapterConfig.model_validate(json.loads((folder / CONFIG).read_bytes()))
    except OSError as error:
        raise NotAPatchError(f"{folder} is not a PEFT folder: {CONFIG} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = first["loc"][0] if first["loc"] else "the whole"
        given = f"{where} = {first['input']!r}"
        raise InvalidPatchError(f"{folder / CONFIG}: {given} is not valid: {first['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise NotAPatchError(f"{folder / CONFIG} is not valid JSON: {error}.") from error
    defaults = require("peft", "lora", "PEFT's folder format").LoraConfig().to_dict()
    for name, value in (config.model_extra or {}).items():
        harmless = name in WITHOUT_EFFECT or (name == "init_lora_weights" and value in STARTS)
        if value and not harmless and value != defaults.get(name):  # null, false and empty mean that an option is off
            raise InvalidPatchError(
                f"{folder / CONFIG}: a patch does not support {name}={value!r}. Expected LoRA, rsLoRA or "
                "DoRA with one rank and one alpha, no biases. Train the adapter without that option."
            )
    return config


def _read_tensors(folder: Path, backbone: Backbone) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file() and (folder / PICKLE).exists():
        raise NotAPatchError(
            f"{folder / PICKLE} is a pickle, which can run any code and is not read. Save the adapter as {WEIGHTS}: "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            chain, described = metadata.get(CHAIN), metadata.get(COMPUTATION)
    except (SafetensorError, OSError) as error:
        raise NotAPatchError(f"{path} is not a readable safetensors file: {error}.") from error
    if chain not in (None, backbone.fingerprints.chain):
        raise WrongBackboneError(
            f"{folder} was written for a backbone whose chain is {chain[:12]}; that of {backbone.spec} is "
            f"{backbone.fingerprints.chain[:12]}. Load the backbone with the weights the adapter was trained on."
        )
    if chain is not None:
        try:
            recorded = None if described is None else Computation.model_validate_json(described)
        except ValidationError as error:
            raise InvalidPatchError(f"{path}: its {COMPUTATION} is not one: {first_problem(error)}.") from error
        backbone.check_computation(recorded, str(folder), "the backbone it was trained on")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise InvalidPatchError(f"{path}: {name} is stored as {tensor.dtype}. Expected one of {', '.join(FLOATS)}.")
        if not torch.isfinite(tensor).all():
            raise NonFiniteTensorError(f"{path}: tensor {name} holds NaN or infinity.")
    return tensors


def _make_grafts(layers: set[str], config: AdapterConfig, backbone: Backbone) -> tuple[Graft, ...]:
    """Grafts that add updates to the backbone's layers of these names."""
    grafts, left = list[Graft](), set(layers)
    for segment in backbone.chain:
        names = []
        for name, module in segment.module.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and is_owner(backbone, segment, name):
                layer = weight_name(segment, name).removesuffix(".weight")
                if layer in left and layer != backbone.classifier:
                    names.append(name)
                    left.remove(layer)
        if names:
            given = {
                "rank": config.r,
                "scale": config.lora_alpha,
                **variants(bool(config.use_rslora), bool(config.use_dora)),
            }
            grafts.append(graft_on(segment, GRAFT, **given, layers=names))
    if left:
        first = min(left)
        kind = type(backbone.module.get_submodule(first)).__name__
        raise ForeignTensorError(
            f"the adapter changes {len(left)} layers that a patch has no update of, first {first!r} ({kind}). Expected linear "
            "layers and 2-d convolutions before the classifier, each used in one place."
        )
    return tuple(grafts)


def _keys(backbone: Backbone, grafts: Sequence[Graft]) -> dict[str, str]:
    """Keys in PEFT's file of the updates' tensors, by their names in a patch file."""
    keys: dict[str, str] = {}
    for graft in grafts:
        for name in graft.arguments["layers"]:
            layer = weight_name(backbone.chain[graft.start], name).removesuffix(".weight")
            for part in ("lora_A", "lora_B"):
                local = f"{name}.{part}.{ADAPTER}.weight".lstrip(".")
                keys[f"graft/{graft.start}-{graft.end}/{local}"] = f"{PREFIX}{layer}.{part}.weight"
            if graft.arguments.get("dora"):
                local = f"{name}.lora_magnitude_vector.{ADAPTER}.weight".lstrip(".")
                keys[f"graft/{graft.start}-{graft.end}/{local}"] = f"{PREFIX}{layer}.lora_magnitude_vector"
    return keys


def _head_keys(classifier: str) -> dict[str, str]:
    return {f"head.{leaf}": f"{PREFIX}{classifier}.{leaf}" for leaf in ("weight", "bias")}


def _classifier(backbone: Backbone) -> str:
    """The name of the backbone's classifier. Raises `PatchError` unless it is a linear layer with a bias, run last."""
    name = backbone.classifier
    layer = backbone.module.get_submodule(name) if name else None
    if name is None or not isinstance(layer, nn.Linear) or layer.bias is None or backbone.chain.head is not layer:
        raise PatchError(
            f"PEFT's folder stores a head in the place of the base's classifier; that of {backbone.spec} is "
            f"{name and type(layer).__name__}. Expected a linear layer with a bias that gives the logits."
        )
    return name
