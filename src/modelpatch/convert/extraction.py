"""Extract a patch from a fine-tuned checkpoint: the tensors that differ from the base's, exact or compressed.

    codec             a tensor W' that differs from the base's W          the head
    exact             replace: W', float32                                float32
    float16 bfloat16  delta = W' - W in 16 bits                           the same 16 bits
    int8              delta in 8 bits with a scale an output channel      8 bits
    sign              delta = s sign(W' - W), s an output channel         8 bits
    two-bit           the same with two sizes s an output channel         8 bits
    low-rank          left right, the best approximation of delta of      8 bits
                      a rank r, 16 bits; int8 where that is smaller

Differences of vectors (norm layers, biases) are stored as float16 by every lossy codec but `bfloat16`.
`sign`: Liu et al., *BitDelta: Your Fine-Tune May Only Be Worth One Bit* (2024), with a scale an output channel in place of one
a matrix; `calibrate.py` learns the sizes of either. `low-rank`: the singular value decomposition, see `factorise`.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import widen
from modelpatch.errors import PatchError
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.codec import snap_int8, snap_signs, snap_sizes
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import first_problem

DELTA_CODECS = ("exact", "float16", "bfloat16", "int8", "sign", "two-bit", "low-rank")
HOLDERS = ("state_dict", "model_state_dict", "model")  # keys of the tensors in .pth files of training scripts
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # prefixes that wrappers add to names


def extract(
    backbone: Backbone,
    finetuned: str | Path | Mapping[str, Tensor],
    *,
    codec: str = "exact",
    rank: int = 8,
    name: str = "extracted",
    classes: Sequence[str] = (),
    image_size: int | None = None,
) -> Patch:
    """Extract the patch that turns `backbone` into a fine-tuned checkpoint of the same architecture.

    `finetuned` is a safetensors or `.pth` file, or a state dict. Only floating-point tensors that differ are stored, with the
    `codec` (see the module's table); counters of batches are left out. The checkpoint's classifier becomes the patch's head
    with outputs named `classes` (default: "0", "1", ...). `rank` is that of `low-rank`.
    With `exact` the patched model has the checkpoint's tensors, bit for bit.

    Raises `PatchError` for a checkpoint of another architecture, `NonFiniteTensorError` for a difference outside the range of
    its 16-bit type.
    """
    if codec not in DELTA_CODECS:
        raise PatchError(f"unknown codec {codec!r}. Expected one of: {', '.join(DELTA_CODECS)}.")
    if rank < 1:
        raise PatchError(f"the rank is {rank}; expected at least 1.")
    state = finetuned if isinstance(finetuned, Mapping) else read_checkpoint(finetuned)
    state = match_names(backbone, state)
    tensors: dict[str, Tensor] = {}
    int8: set[str] = set()
    for weight, (before, after) in find_changes(backbone, state).items():
        delta, place = after - before, f"delta/{weight}"
        if codec == "exact":
            tensors[f"replace/{weight}"] = after
        elif codec == "bfloat16":
            tensors[place] = delta.bfloat16()
        elif codec == "float16" or delta.ndim < 2 or delta[0].numel() < 2:
            tensors[place] = delta.half()
        elif codec in ("sign", "two-bit"):
            tensors[place] = snap_signs(delta) if codec == "sign" else snap_sizes(delta)
        elif codec == "low-rank" and 2 * rank * (len(delta) + delta[0].numel()) < delta.numel():
            left, right = factorise(delta, rank)
            tensors |= {f"left/{weight}": left.half(), f"right/{weight}": right.half()}
        else:
            tensors[place] = snap_int8(delta)
            int8.add(place)
    head = _read_head(backbone, state)
    for part, tensor in head.items():
        if codec in ("float16", "bfloat16"):
            tensor = tensor.to(getattr(torch, codec))
        elif codec != "exact" and tensor.ndim > 1:
            tensor = snap_int8(tensor)
            int8.add(f"head.{part}")
        tensors[f"head.{part}"] = tensor
    outputs, features = head["weight"].shape
    names = tuple(classes) or tuple(map(str, range(outputs)))
    if len(names) != outputs:
        raise PatchError(f"the checkpoint's head has {outputs} outputs; {len(names)} classes are named.")
    try:
        task = TaskRecord(name=name, classes=names)
    except ValidationError as error:
        raise PatchError(f"the task's or its classes' names cannot be used: {first_problem(error)}.") from error
    used = {"codec": codec, **({"rank": rank} if codec == "low-rank" else {})}
    method = MethodRecord(name="extract", hyperparameters=used)
    seen, record = backbone.preprocessing.with_image_size(image_size), HeadRecord(features=features, outputs=outputs)
    return Patch.of(backbone, task, record, tensors, int8=int8, preprocessing=seen, method=method)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or `.pth` file by their names; half precision is widened to float32, exactly.

    Raises `PatchError` for a file that cannot be read, is no dictionary of tensors, or holds other objects than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise PatchError(f"{path} does not exist. Expected a safetensors file or a .pth of tensors.")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PatchError(
            f"{path} cannot be read as plain tensors: {reason}. Save the network's state_dict() alone, best as safetensors."
        ) from error
    for holder in HOLDERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(holder), Mapping):
            loaded = loaded[holder]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise PatchError(f"{path} holds no tensors by name. Expected a state_dict().")
    return {str(name): widen(value.detach()) for name, value in loaded.items() if isinstance(value, Tensor)}


def match_names(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by the backbone's names, without prefixes that wrappers add.

    Raises `PatchError` for missing tensors of the backbone's chain and for tensors that the network does not have.
    """
    own = backbone.module.state_dict().keys()
    while not own & tensors.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    needed = {name for segment in backbone.chain for name, t in segment.named_tensors() if t.is_floating_point()}
    needed &= own
    if missing := sorted(needed - tensors.keys()):
        raise PatchError(
            f"the checkpoint lacks {len(missing)} of the {len(needed)} tensors of {backbone.spec}: {', '.join(missing[:3])}. "
            f"It has {', '.join(sorted(tensors)[:3])}. Expected the state_dict() of the same architecture."
        )
    head = f"{backbone.classifier}." if backbone.classifier else None
    foreign = sorted(name for name in tensors.keys() - own if head is None or not name.startswith(head))
    if foreign:
        raise PatchError(
            f"{backbone.spec} does not have {len(foreign)} tensors of the checkpoint: {', '.join(foreign[:3])}. Expected "
            "the state_dict() of the same architecture."
        )
    return dict(tensors)


def find_changes(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Floating-point tensors of the chain that differ, as (base, checkpoint) pairs of float32 on the CPU, by name.

    Raises `PatchError` for a shape that differs, and for other integer tensors than counters of batches.
    """
    changed = {}
    for segment in backbone.chain:
        for name, tensor in segment.named_tensors():
            if name not in state:
                continue
            before, after = tensor.detach().cpu(), state[name].cpu()
            if before.shape != after.shape:
                raise PatchError(
                    f"{name} has shape {tuple(after.shape)} in the checkpoint, {tuple(before.shape)} in {backbone.spec}. "
                    "Expected the same architecture with the same arguments."
                )
            if not before.is_floating_point():
                if not name.endswith("num_batches_tracked") and not torch.equal(before, after.to(before.dtype)):
                    raise PatchError(f"the integer tensor {name} differs from the base's. Expected an equal one.")
            elif not torch.equal(before.float(), after.float()):
                changed[name] = before.float(), after.float()
    return changed


def _read_head(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight (K, D) and bias (K,) of the checkpoint's classifier. Raises `PatchError` if it is not a linear layer."""
    if backbone.classifier is None or f"{backbone.classifier}.weight" not in state:
        raise PatchError(
            f"the checkpoint has no classifier {backbone.classifier or '(the backbone names none)'}. Load the backbone with "
            "classifier=... naming the linear layer that ends it."
        )
    weight = state[f"{backbone.classifier}.weight"].float().cpu()
    weight = weight.flatten(1) if weight.ndim > 1 and weight[0, 0].numel() == 1 else weight
    if weight.ndim != 2 or weight.shape[1] != backbone.chain.feature_dim:
        raise PatchError(
            f"the checkpoint's classifier has a weight of shape {tuple(weight.shape)}; expected "
            f"(classes, {backbone.chain.feature_dim})."
        )
    bias = state.get(f"{backbone.classifier}.bias", torch.zeros(len(weight)))
    return {"weight": weight, "bias": bias.float().cpu()}


def factorise(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (C, r) and right (r, N) whose product is the nearest of rank r to `delta` (C, ...) with N numbers a channel.

    By the singular value decomposition (Eckart and Young); the singular values are shared evenly by both.
    """
    u, s, v = torch.linalg.svd(delta.float().reshape(len(delta), -1), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
