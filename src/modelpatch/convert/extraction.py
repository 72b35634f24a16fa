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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.matching import find_head, match_states, tell_rest
from modelpatch.backbone.states import State, find_states, read_states
from modelpatch.errors import PatchError
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.codec import snap_int8, snap_signs, snap_sizes
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.provenance import describe_making
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import first_problem

HEAD = "head"  # the place of the head, where the backbone names no classifier
DELTA_CODECS = ("exact", "float16", "bfloat16", "int8", "sign", "two-bit", "low-rank")


def extract(
    backbone: Backbone,
    finetuned: str | Path | Mapping[str, Any],
    *,
    codec: str = "exact",
    rank: int = 8,
    name: str = "extracted",
    classes: Sequence[str] = (),
    image_size: int | None = None,
    part: str | None = None,
    head: str | None = None,
) -> Patch:
    """Extract the patch that turns `backbone` into a fine-tuned checkpoint of the same architecture.

    `finetuned` is a safetensors or `.pth` file, a folder or the index of shards, or what they hold: a state dict, alone or in
    others, under any prefix. `part` names one of several networks in it ("model_ema", "state_dict.student"; averages are
    preferred) and `head` the layer of its head, where there are several; what is left out is listed in a `CheckpointWarning`.
    Only floating-point tensors that differ are stored, with the
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
    state = read_finetuned(backbone, finetuned, part, head)
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
    place = backbone.classifier or HEAD
    outputs, features = state[f"{place}.weight"].shape
    for leaf in ("weight", "bias"):
        tensor = state[f"{place}.{leaf}"].float().cpu()
        if codec in ("float16", "bfloat16"):
            tensor = tensor.to(getattr(torch, codec))
        elif codec != "exact" and tensor.ndim > 1:
            tensor = snap_int8(tensor)
            int8.add(f"head.{leaf}")
        tensors[f"head.{leaf}"] = tensor
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
    return Patch.of(
        backbone, task, record, tensors, int8=int8, preprocessing=seen, method=method, created=describe_making()
    )


def read_finetuned(
    backbone: Backbone, source: str | Path | Mapping[str, Any], part: str | None = None, head: str | None = None
) -> State:
    """A checkpoint's tensors by the backbone's names, its head as the classifier's weight (K, D) and bias (K,).

    Warns of what is left out. Raises `CheckpointError` for a checkpoint of another architecture, or without a linear head.
    """
    states = find_states(source) if isinstance(source, Mapping) else read_states(source)
    own = {name: tensor.shape for name, tensor in backbone.module.state_dict().items()}
    needed = {name for segment in backbone.chain for name, t in segment.named_tensors() if t.is_floating_point()}
    needed &= own.keys()
    match = match_states(states, own, needed, backbone.classifier, network=backbone.spec, part=part)
    found = find_head(match, backbone.classifier, backbone.chain.feature_dim, head)
    tell_rest(match, backbone.spec, "the checkpoint")
    place, weight = backbone.classifier or HEAD, found["weight"]
    body = {name: tensor for name, tensor in match.tensors.items() if not name.startswith(f"{place}.")}
    return body | {f"{place}.weight": weight, f"{place}.bias": found.get("bias", torch.zeros(len(weight)))}


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


def factorise(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (C, r) and right (r, N) whose product is the nearest of rank r to `delta` (C, ...) with N numbers a channel.

    By the singular value decomposition (Eckart and Young); the singular values are shared evenly by both.
    """
    u, s, v = torch.linalg.svd(delta.float().reshape(len(delta), -1), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
