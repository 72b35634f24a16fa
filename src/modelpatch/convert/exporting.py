"""Export a patched model for other runtimes.

    safetensors    the state dict that the network's own library loads (timm, torchvision): weights changed, head in place
    torch-export   a program of torch.export with a free batch size: `torch.export.load(path).module()(images)`
    onnx           an ONNX graph, input `images` (B, 3, H, W) float32 normalised, output `logits` (B, K),
                   of a regression the numbers in the user's units

The file is complete: neither the patch nor the backbone is needed to run it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import METADATA_KEY
from modelpatch.backbone.graphs import GRAPHS, write_graph
from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.engine.engine import Engine
from modelpatch.errors import PatchError, require
from modelpatch.patch.changes import resolve
from modelpatch.patch.contents import Patch
from modelpatch.patch.folding import fold

SUFFIXES = {"safetensors": ".safetensors", **GRAPHS}


def export(backbone: Backbone, patch: Patch, path: str | Path, form: str) -> Path:
    """Write the patched model in a format of `SUFFIXES`, atomically. Returns the path.

    Raises `PatchError` for a format that cannot hold this patch, `MissingExtraError` without the `export` extra for ONNX,
    `WrongBackboneError` and `ForeignTensorError` for a patch of another backbone.
    """
    if form not in SUFFIXES:
        raise PatchError(f"unknown format {form!r}. Expected one of: {', '.join(SUFFIXES)}.")
    data = _as_graph(form, backbone, patch) if form in GRAPHS else _as_state_dict(backbone, patch)
    write_bytes(Path(path), data)
    return Path(path)


def state_dict_of(backbone: Backbone, patch: Patch) -> dict[str, Tensor]:
    """The network's own state dict with the patch's weights and head in place, on the CPU.

    Added modules that fold into layers are folded. Raises `PatchError` for a patch that adds others, and for heads that
    are not one linear layer of features.
    """
    patch.check_backbone(backbone)
    classifier = backbone.classifier and backbone.module.get_submodule(backbone.classifier)
    changed = _changed_tensors(backbone, patch)
    reasons = [f"adds modules ({graft.kind})" for graft in patch.grafts if changed is None]
    reasons += [f"has a {patch.head.kind} head"] if patch.head.kind != "linear" else []
    if not isinstance(classifier, nn.Linear):
        reasons.append("has a head that the network has no linear layer for")
    if reasons:
        raise PatchError(
            f"the patch {reasons[0]}, which a state dict of {backbone.spec} cannot hold. Use the format torch-export or onnx."
        )
    state = {name: tensor.detach().cpu().clone() for name, tensor in backbone.module.state_dict().items()}
    for name, tensor in (changed or {}).items():
        place = name.removeprefix("replace/") if name.startswith("replace/") else None
        state[place or f"{backbone.classifier}.{name.removeprefix('head.')}"] = tensor.detach().cpu().float().clone()
    return state


def _changed_tensors(backbone: Backbone, patch: Patch) -> dict[str, Tensor] | None:
    """The head and, under `replace/` names, what the patch changes; None where added modules do not fold into the layers."""
    if not patch.grafts:
        return resolve(patch.tensors, backbone.chain, patch.strength)
    model = fold(backbone.patched(patch))
    changed = {name: tensor for name, tensor in patch.tensors.items() if name.startswith("head.")}
    for (start, end), variant in zip(model.spans, model.variants, strict=True):
        segments = backbone.chain[start:end]
        parts = [variant] if len(segments) == 1 else list(variant.children())
        for segment, part in zip(segments, parts, strict=True):
            tensors = part.state_dict()
            if tensors.keys() != segment.module.state_dict().keys():
                return None
            changed |= {f"replace/{segment.tensor_names[name]}": tensor for name, tensor in tensors.items()}
    return changed


def _as_state_dict(backbone: Backbone, patch: Patch) -> bytes:
    """A state dict; its metadata let `load_backbone("file:...")` build the network if timm knows it by name."""
    metadata = {"format": "pt", "kind": patch.task.kind, "classes": json.dumps(patch.task.classes)}
    if patch.task.options:
        metadata["options"] = json.dumps(patch.task.options)
    if architecture := backbone.architecture:
        arguments = {k: v for k, v in backbone.arguments.items() if k not in ("pretrained", "seed")}
        described = {
            "architecture": architecture,
            "arguments": {**arguments, "num_classes": len(patch.task.classes)},
            "preprocessing": patch.preprocessing.model_dump(mode="json"),
            "classes": list(patch.task.classes),
            "about": {"task": patch.task.name, "method": patch.method.name, **patch.metrics},
        }
        metadata[METADATA_KEY] = json.dumps(described, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in state_dict_of(backbone, patch).items()}
    return safetensors.torch.save(tensors, metadata)


def _as_graph(form: str, backbone: Backbone, patch: Patch) -> bytes:
    images = {"images": torch.zeros(2, *patch.preprocessing.input_size)}
    facts = {"task": patch.task.name, "kind": patch.task.kind, "classes": json.dumps(patch.task.classes)}
    if patch.task.options:
        facts["options"] = json.dumps(patch.task.options)
    facts["preprocessing"] = patch.preprocessing.model_dump_json()
    owner = f"the {patch.method.name} patch of {patch.task.name}"
    return write_graph(fold(backbone.patched(patch)).cpu(), images, ["logits"], facts, form, owner)


@dataclass(frozen=True)
class Agreement:
    """An exported graph beside PyTorch: the largest absolute difference of a logit, and images with the same best class.

    `largest` is the largest output, 1 at least: numbers may be in any unit.
    """

    images: int
    max_difference: float
    equal_answers: int
    largest: float = 1.0

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> Self:
        """That of a batch of answers (B, K, ...)."""
        equal = (ours.argmax(1) == theirs.argmax(1)).view(len(ours), -1).all(1).sum()
        return cls(len(ours), float((ours - theirs).abs().max()), int(equal), max(float(ours.abs().max()), 1.0))

    def __add__(self, other: "Agreement") -> "Agreement":
        difference = max(self.max_difference, other.max_difference)
        equal, largest = self.equal_answers + other.equal_answers, max(self.largest, other.largest)
        return Agreement(self.images + other.images, difference, equal, largest)

    @property
    def holds(self) -> bool:
        """True if all answers are equal and no output differs by 1e-3 of the largest or more."""
        return self.equal_answers == self.images and self.max_difference < 1e-3 * self.largest


def check_onnx(path: str | Path, model: nn.Module, images: Tensor, batch: int = 32) -> Agreement:
    """onnxruntime beside `model` on the CPU for normalised images (N, 3, H, W). Raises `MissingExtraError`."""
    session, found = _open(path), Agreement(0, 0.0, 0)
    with torch.no_grad():
        for piece in images.split(batch):
            (theirs,) = session.run(None, {"images": piece.contiguous().numpy()})
            found += Agreement.of(model(piece), torch.from_numpy(theirs))
    return found


def check_graph(
    path: str | Path, engine: Engine, tasks: Sequence[str], sources: Sequence[ImageSource], batch: int = 32
) -> dict[str, Agreement]:
    """onnxruntime on a graph of `tasks` beside the engine that wrote it, by task. Raises `MissingExtraError`."""
    session, found = _open(path), dict.fromkeys(tasks, Agreement(0, 0.0, 0))
    inputs, outputs = ([one.name for one in side] for side in (session.get_inputs(), session.get_outputs()))
    for start in range(0, len(sources), batch):
        images = engine.read(sources[start : start + batch], only=tasks)
        ours = engine(images, only=tasks)
        given = dict(zip(inputs, (one.cpu().contiguous().numpy() for one in images.values()), strict=True))
        for name, theirs in zip(outputs, session.run(None, given), strict=True):
            found[name] += Agreement.of(ours[name].cpu(), torch.from_numpy(theirs))
    return found


def _open(path: str | Path) -> Any:
    onnxruntime = require("onnxruntime", "export", "Checking an ONNX file")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common class
        raise PatchError(f"onnxruntime cannot read {path}: {' '.join(str(error).split())[:300]}") from error
