"""LoRA patches in the folder format of the `peft` library, written and read.

    FOLDER/adapter_config.json           which layers, rank and alpha
    FOLDER/adapter_model.safetensors     base_model.model.<layer>.lora_A.weight   (rank, in[, k, k])
                                         base_model.model.<layer>.lora_B.weight   (out, rank[, 1, 1]), with lora_bias .bias
                                         base_model.model.<layer>.lora_magnitude_vector of DoRA, (out) or (1, out, 1, 1)
                                         base_model.model.<attention>.base_layer.out_proj.lora_A.weight, ...
                                         base_model.model.<layer>.base_layer.bias of bias="lora_only"
                                         base_model.model.<module>.<tensor> of modules_to_save
                                         base_model.model.<classifier>.weight     (classes, features), and .bias

`PeftModel.from_pretrained(base, FOLDER)` gives a patch's logits for a `base` whose classifier has the task's size, and
an imported folder gives the logits of that model. Options of PEFT that a patch does not support are refused by name.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.computation import Computation
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.convert.peft_config import CONFIG, AdapterConfig, Update, adapt, output_times, read_config
from modelpatch.errors import (
    ForeignTensorError,
    InvalidPatchError,
    ModelpatchError,
    NonFiniteTensorError,
    NotAPatchError,
    PatchError,
    WrongBackboneError,
    warn_caller,
)
from modelpatch.heads.base import HeadRecord
from modelpatch.methods.blocks import graft_on
from modelpatch.methods.layers import is_owner, weight_name
from modelpatch.methods.lora import ADAPTER, GRAFT, LoRA, add_updates, attention_weights, layers_of, variants
from modelpatch.patch.blueprint import Graft
from modelpatch.patch.changes import resolve
from modelpatch.patch.codec import FLOATS
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.plain_files import check_plain
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import first_problem

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
CHAIN = "modelpatch.chain"  # the key of the safetensors metadata that holds the fingerprint of the backbone's chain
COMPUTATION = "modelpatch.computation"  # that of the record of what the backbone computes
UNUSED = (".original_module.", ".modules_to_save.")  # in names of copies that PEFT stores with bias="all"


def export_peft(patch: Patch, backbone: Backbone, folder: str | Path) -> Path:
    """Write a LoRA patch as a PEFT folder, each file atomically. Returns the folder, made where it does not exist.

    The head is stored under the name of the backbone's own classifier, other tensors that the patch owns as biases of
    updated layers or in modules to save. The files hold neither the task's class names nor its preprocessing. Raises
    `PatchError` for a patch that the format cannot hold, `WrongBackboneError`, and `MissingExtraError` without peft.
    """
    patch.check_backbone(backbone)
    factors = {name.partition("/")[2] for name in patch.tensors if name.startswith("left/")}
    kinds = {graft.kind for graft in patch.grafts} | {f"{patch.head.kind} head"} - {"linear head"}
    kinds |= {"low-rank update of another weight"} if factors - _attention_weights(backbone) else set()
    if kinds != {GRAFT} and not (factors and not kinds):
        kinds |= {"replace"} if set(patch.blueprint.owned) - factors else set()
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
    values = resolve(
        {n: t for n, t in patch.tensors.items() if n.partition("/")[2] not in factors}, backbone.chain, patch.strength
    )
    owned = {name.removeprefix("replace/"): one for name, one in values.items() if name.startswith("replace/")}
    config = _make_config(patch, backbone, factors, owned, classifier)
    adapted = adapt(config, backbone)
    tensors = {key: patch.tensors[name] for name, key in _keys(backbone, patch.grafts, adapted.updates).items()}
    for weight in factors:
        key, times = adapted.updates[_layer(weight)].key, 1 if weight.endswith("in_proj_weight") else output_times()
        tensors[f"{key}.lora_A.weight"] = patch.tensors[f"right/{weight}"]
        tensors[f"{key}.lora_B.weight"] = patch.tensors[f"left/{weight}"] / times
    state = backbone.module.state_dict() | owned
    state |= {f"{classifier}.{leaf}": patch.tensors[f"head.{leaf}"] for leaf in ("weight", "bias")}
    tensors |= {key: state[name] for key, name in adapted.keys.items() if name}
    if tensors.keys() != adapted.keys.keys() or owned.keys() - set(adapted.keys.values()):
        raise PatchError(f"PEFT would not adapt the layers of this patch in {backbone.spec}. Keep it as a patch file.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelpatchError(f"cannot make the folder {folder}: {error.strerror}.") from error
    described = backbone.computing.record.model_dump_json()
    metadata = {"format": "pt", CHAIN: backbone.fingerprints.chain, COMPUTATION: described}
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(plain, metadata))
    text = json.dumps(config.model_dump(exclude_none=True), indent=2, sort_keys=True)
    write_bytes(folder / CONFIG, text.encode())
    return folder


def _make_config(
    patch: Patch, backbone: Backbone, factors: set[str], owned: Mapping[str, Tensor], classifier: str
) -> AdapterConfig:
    """The options under which PEFT computes what a patch does. Raises `PatchError` where there are none."""
    given = [graft.arguments for graft in patch.grafts]
    one = {name: {bool(arguments.get(name)) for arguments in given} for name in ("dora", "bias")}
    if mixed := [name for name, values in one.items() if len(values) > 1]:
        raise PatchError(f"some of the patch's updates have {mixed[0]}, others not; PEFT's folder has one for all.")
    dora, biased = (values == {True} for values in one.values())
    if dora and patch.strength != 1:
        raise PatchError(f"PEFT has no strength for DoRA: the patch's is {patch.strength}. Export it at strength 1.")
    if patch.strength == 0:
        raise PatchError("the patch has strength 0, which PEFT's folder cannot hold. Give it a strength above 0.")
    rslora = bool(given) and all(arguments.get("rslora") for arguments in given)
    sizes: dict[str, tuple[int, float]] = {}
    for graft in patch.grafts:
        rank, scale = graft.arguments["rank"], graft.arguments["scale"] * patch.strength
        alpha = scale * math.sqrt(rank) if graft.arguments.get("rslora") and not rslora else scale
        sizes |= dict.fromkeys(layers_of(backbone, graft), (rank, alpha))
    for weight in factors:
        rank = patch.tensors[f"left/{weight}"].shape[1]
        alpha = patch.strength * (math.sqrt(rank) if rslora else rank)  # the factors hold the scale
        sizes[_layer(weight)] = rank, alpha
    wrapped = {
        layer for layer in sizes if layer.removesuffix(".out_proj") not in sizes or not layer.endswith(".out_proj")
    }
    biases = {f"{layer}.bias" for layer in sizes}
    saved = {name.rpartition(".")[0] for name in owned.keys() - biases}
    if inside := sorted(name for name in saved for layer in sizes if not name or f"{layer}.".startswith(f"{name}.")):
        raise PatchError(
            f"the patch replaces tensors of {inside[0] or 'the network itself'!r} and adds updates there; PEFT stores a "
            "module as a whole or not at all. Keep it as a patch file."
        )
    (rank, alpha), _ = Counter(sizes[layer] for layer in sorted(wrapped)).most_common(1)[0]

    def plain(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    def exactly(layer: str) -> str:
        return f"^{re.escape(layer)}"

    return AdapterConfig(
        r=rank,
        lora_alpha=plain(alpha),
        rank_pattern={exactly(one): sizes[one][0] for one in sorted(wrapped) if sizes[one][0] != rank} or None,
        alpha_pattern={exactly(one): plain(sizes[one][1]) for one in sorted(wrapped) if sizes[one][1] != alpha} or None,
        use_rslora=rslora or None,
        use_dora=dora or None,
        lora_bias=biased or None,
        bias="lora_only" if owned.keys() & biases else "none",
        target_modules="|".join(map(re.escape, sorted(wrapped))),  # a list would name endings: conv1 in every block
        modules_to_save=[classifier, *sorted(saved)],
    )


def _attention_weights(backbone: Backbone) -> set[str]:
    """The backbone's names of the weights of attention that PEFT adapts."""
    modules = backbone.module.named_modules()
    named = {f"{name}.{weight}" for name, module in modules for weight in attention_weights(module)}
    return {name for name in named if name.endswith((".in_proj_weight", ".weight"))}


def _layer(weight: str) -> str:
    """The name of the layer of a tensor."""
    return weight.rpartition(".")[0]


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
    config = read_config(folder)
    tensors = _read_tensors(folder, backbone)
    classifier = _classifier(backbone)
    adapted = adapt(config, backbone)
    given, optional = set(tensors), {key for key in adapted.keys if any(part in key for part in UNUSED)}
    if missing := sorted(adapted.keys.keys() - optional - given):
        names = f"{len(missing)} tensors that {CONFIG} asks for: {', '.join(missing[:3])}"
        raise ForeignTensorError(f"{folder / WEIGHTS} lacks {names}.")
    if foreign := sorted(given - adapted.keys.keys()):
        raise ForeignTensorError(
            f"{folder / WEIGHTS} holds {len(foreign)} tensors that are no update of a layer named in {CONFIG} and not the "
            f"classifier's: {', '.join(foreign[:3])}."
        )
    if idle := sorted(layer for layer, update in adapted.updates.items() if update.idle):
        warn_caller(
            f"{len(idle)} updates are left out since PEFT's have no effect: attention reads {idle[0]}.weight itself"
        )
    attention = {layer for layer, update in adapted.updates.items() if update.attention or ".base_layer." in update.key}
    beside = {layer for layer, one in adapted.updates.items() if not one.idle} - attention - {classifier}
    grafts = _make_grafts({layer: adapted.updates[layer] for layer in beside}, config, backbone)
    named = {name: tensors[key] for name, key in _keys(backbone, grafts, adapted.updates).items()}
    for layer in attention:
        named |= _factors(layer, adapted.updates[layer], config, tensors)
    kept = {name: tensors[key] for key, name in adapted.keys.items() if name and key in tensors}
    named |= _owned({name: one for name, one in kept.items() if _layer(name) != classifier}, backbone)
    own = backbone.module.get_submodule(classifier).state_dict()
    head = {leaf: kept.get(f"{classifier}.{leaf}", own[leaf].detach().cpu().clone()) for leaf in ("weight", "bias")}
    if classifier in adapted.updates:
        head = _merge(head, adapted.updates[classifier], config, tensors)
    named |= {f"head.{leaf}": tensor for leaf, tensor in head.items()}
    outputs = len(named["head.weight"])
    if outputs != len(task.classes):
        found = f"the classifier of {folder} has {outputs} outputs"
        raise ForeignTensorError(f"{found}; the task {task.name!r} has {len(task.classes)} classes.")
    record = HeadRecord(features=backbone.chain.feature_dim, outputs=outputs)
    chosen = {"rank": config.r, "scale": config.lora_alpha, **_variants(config)}
    method = MethodRecord(name=LoRA.name, hyperparameters=chosen)
    patch = Patch.of(backbone, task, record, named, grafts=grafts, preprocessing=preprocessing, method=method)
    backbone.patched(patch)  # checks every shape
    return patch


def _variants(config: AdapterConfig) -> dict[str, bool]:
    return variants(bool(config.use_rslora), bool(config.use_dora), bool(config.lora_bias))


def _factors(layer: str, update: Update, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An update of attention as the two factors of a weight's difference."""
    weight = f"{layer}.in_proj_weight" if update.attention else f"{layer}.weight"
    down, up = (tensors[f"{update.key}.lora_{part}.weight"] for part in "AB")
    scale = update.alpha / (math.sqrt(update.rank) if config.use_rslora else update.rank)
    scale *= 1 if update.attention else output_times()
    return {f"left/{weight}": scale * up, f"right/{weight}": down}


def _owned(kept: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Tensors that stand in for the base's, without those that are equal. Raises `ForeignTensorError` for others' places."""
    owned, state = {}, backbone.module.state_dict()
    for name, tensor in kept.items():
        base = state[name].cpu()
        if base.shape != tensor.shape:
            raise ForeignTensorError(
                f"{name} has shape {tuple(tensor.shape)}; the backbone expects {tuple(base.shape)}."
            )
        if not base.is_floating_point() or torch.equal(
            base.float(), tensor.float()
        ):  # counters of batches, and what is the base's
            continue
        try:
            backbone.chain.segment_of(name)
        except KeyError:
            raise ForeignTensorError(
                f"the adapter trains {name!r}, which no single segment of {backbone.spec} holds, so a patch cannot own it."
            ) from None
        owned[f"replace/{name}"] = tensor
    return owned


@torch.no_grad()
def _merge(
    head: Mapping[str, Tensor], update: Update, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The classifier with its update in its weights."""
    outputs, inputs = head["weight"].shape
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    layer.load_state_dict(head)
    options = {"rank": update.rank, "scale": update.alpha, **_variants(config)}
    wrapped: Any = add_updates(layer, layers=[""], **options)
    for name, key in _stored(update.key, _variants(config)).items():
        wrapped.get_parameter(name).copy_(tensors[key])
    wrapped.merge()
    return {leaf: tensor.detach().clone() for leaf, tensor in wrapped.base_layer.state_dict().items()}


def _read_tensors(folder: Path, backbone: Backbone) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file() and (folder / PICKLE).exists():
        raise NotAPatchError(
            f"{folder / PICKLE} is a pickle, which can run any code and is not read. Save the adapter as {WEIGHTS}: "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    try:
        with safe_open(check_plain(path), "pt") as file:
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
        if tensor.dtype not in FLOATS.values() and not name.endswith(".num_batches_tracked"):
            raise InvalidPatchError(f"{path}: {name} is stored as {tensor.dtype}. Expected one of {', '.join(FLOATS)}.")
        if not torch.isfinite(tensor).all():
            raise NonFiniteTensorError(f"{path}: tensor {name} holds NaN or infinity.")
    return tensors


def _make_grafts(updates: Mapping[str, Update], config: AdapterConfig, backbone: Backbone) -> tuple[Graft, ...]:
    """Grafts that add updates to the backbone's layers of these names, on each segment one for each rank and scale."""
    grafts, left = list[Graft](), set(updates)
    for segment in backbone.chain:
        groups: dict[tuple[int, float], list[str]] = {}
        for name, module in segment.module.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and is_owner(backbone, segment, name):
                layer = weight_name(segment, name).removesuffix(".weight")
                if layer in left:
                    groups.setdefault((updates[layer].rank, updates[layer].alpha), []).append(name)
                    left.remove(layer)
        for (rank, scale), names in groups.items():
            grafts.append(graft_on(segment, GRAFT, rank=rank, scale=scale, **_variants(config), layers=names))
    if left:
        first = min(left)
        kind = type(backbone.module.get_submodule(first)).__name__
        raise ForeignTensorError(
            f"the adapter changes {len(left)} layers that a patch has no update of, first {first!r} ({kind}). Expected linear "
            "layers, 2-d convolutions and nn.MultiheadAttention, each used in one place."
        )
    return tuple(grafts)


def _keys(backbone: Backbone, grafts: Sequence[Graft], updates: Mapping[str, Update]) -> dict[str, str]:
    """Keys in PEFT's file of the updates' tensors, by their names in a patch file. Raises `PatchError` for other layers."""
    keys: dict[str, str] = {}
    for graft in grafts:
        for name, layer in zip(graft.arguments["layers"], layers_of(backbone, graft), strict=True):
            if layer not in updates:
                raise PatchError(f"PEFT would not adapt {layer} of {backbone.spec}. Keep the patch as a patch file.")
            for own, key in _stored(updates[layer].key, graft.arguments).items():
                keys[f"graft/{graft.start}-{graft.end}/{f'{name}.{own}'.lstrip('.')}"] = key
    return keys


def _stored(layer: str, options: Mapping[str, object]) -> dict[str, str]:
    """Keys in PEFT's file of one update's tensors, by their names in the layer."""
    names = {f"lora_{part}.{ADAPTER}.weight": f"{layer}.lora_{part}.weight" for part in "AB"}
    if options.get("bias"):
        names[f"lora_B.{ADAPTER}.bias"] = f"{layer}.lora_B.bias"
    if options.get("dora"):
        names[f"lora_magnitude_vector.{ADAPTER}.weight"] = f"{layer}.lora_magnitude_vector"
    return names


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
