"""Export a patched model for other runtimes.

    safetensors    the state dict that the network's own library loads (timm, torchvision): weights changed, head in place
    torch-export   a program of torch.export with a free batch size: `torch.export.load(path).module()(images)`
    onnx           an ONNX graph, input `images` (B, 3, H, W) float32 normalised, output `logits` (B, K)

The file is complete: neither the patch nor the backbone is needed to run it.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import METADATA_KEY
from modelpatch.errors import PatchError, require
from modelpatch.patch.changes import resolve
from modelpatch.patch.contents import Patch
from modelpatch.text import first_line

MOST_ONNX = 2**31 - 2**24  # bytes of weights: protobuf writes less than 2 GiB, the graph included
SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}


def export(backbone: Backbone, patch: Patch, path: str | Path, form: str) -> Path:
    """Write the patched model in a format of `SUFFIXES`, atomically. Returns the path.

    Raises `PatchError` for a format that cannot hold this patch, `MissingExtraError` without the `export` extra for ONNX,
    `WrongBackboneError` and `ForeignTensorError` for a patch of another backbone.
    """
    if form not in SUFFIXES:
        raise PatchError(f"unknown format {form!r}. Expected one of: {', '.join(SUFFIXES)}.")
    writer = {"safetensors": _as_state_dict, "torch-export": _as_program, "onnx": _as_onnx}[form]
    write_bytes(Path(path), writer(backbone, patch))
    return Path(path)


def state_dict_of(backbone: Backbone, patch: Patch) -> dict[str, Tensor]:
    """The network's own state dict with the patch's weights and head in place, on the CPU.

    Raises `PatchError` for a patch that adds modules, and for heads that are not one linear layer of features.
    """
    patch.check_backbone(backbone)
    classifier = backbone.classifier and backbone.module.get_submodule(backbone.classifier)
    reasons = [f"adds modules ({graft.kind})" for graft in patch.grafts]
    reasons += [f"has a {patch.head.kind} head"] if patch.head.kind != "linear" else []
    if not isinstance(classifier, nn.Linear):
        reasons.append("has a head that the network has no linear layer for")
    if reasons:
        raise PatchError(
            f"the patch {reasons[0]}, which a state dict of {backbone.spec} cannot hold. Use the format torch-export or onnx."
        )
    state = {name: tensor.detach().cpu().clone() for name, tensor in backbone.module.state_dict().items()}
    for name, tensor in resolve(patch.tensors, backbone.chain, patch.strength).items():
        place = name.removeprefix("replace/") if name.startswith("replace/") else None
        state[place or f"{backbone.classifier}.{name.removeprefix('head.')}"] = tensor.detach().cpu().float().clone()
    return state


def _as_state_dict(backbone: Backbone, patch: Patch) -> bytes:
    """A state dict; its metadata let `load_backbone("file:...")` build the network if timm knows it by name."""
    metadata = {"format": "pt", "classes": json.dumps(patch.task.classes)}
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


def _as_program(backbone: Backbone, patch: Patch) -> bytes:
    stream = io.BytesIO()
    with _reported("torch.export", patch):
        torch.export.save(_trace(backbone, patch), stream)
    return stream.getvalue()


def _as_onnx(backbone: Backbone, patch: Patch) -> bytes:
    onnx = require("onnx", "export", "The format onnx")
    require("onnxscript", "export", "The format onnx")  # torch.onnx needs it
    with _reported("torch.onnx", patch):
        traced = _trace(backbone, patch)
    if (size := sum(tensor.nbytes for tensor in traced.state_dict.values())) > MOST_ONNX:
        raise PatchError(
            f"the model has {size:,} bytes of weights; a file of the format onnx holds {MOST_ONNX:,}. Use torch-export."
        )
    with _reported("torch.onnx", patch):
        program = torch.onnx.export(traced, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
        assert program is not None
        model = program.model_proto
    facts = {"task": patch.task.name, "classes": json.dumps(patch.task.classes)}
    onnx.helper.set_model_props(model, {**facts, "preprocessing": patch.preprocessing.model_dump_json()})
    return model.SerializeToString()


def _trace(backbone: Backbone, patch: Patch) -> torch.export.ExportedProgram:
    """The model as a program over images of the patch's size, in batches of any size."""
    model, example = backbone.patched(patch).cpu(), torch.zeros(2, *patch.preprocessing.input_size)
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


@contextmanager
def _reported(tool: str, patch: Patch) -> Iterator[None]:
    """Silence the exporter's logs and turn its errors into one `PatchError`."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, KeyError) as error:
        reason = first_line(error)[:300]
        raise PatchError(f"{tool} cannot trace the {patch.method.name} patch of {patch.task.name}: {reason}") from error
    finally:
        logging.disable(level)


@dataclass(frozen=True)
class Agreement:
    """An exported graph beside PyTorch: the largest absolute difference of a logit, and images with the same best class."""

    images: int
    max_difference: float
    equal_answers: int

    @property
    def holds(self) -> bool:
        """True if all answers are equal and no logit differs by 1e-3 or more."""
        return self.equal_answers == self.images and self.max_difference < 1e-3


def check_onnx(path: str | Path, model: nn.Module, images: Tensor, batch: int = 32) -> Agreement:
    """onnxruntime beside `model` on the CPU for normalised images (N, 3, H, W). Raises `MissingExtraError`."""
    onnxruntime = require("onnxruntime", "export", "Checking an ONNX file")
    try:
        session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common class
        raise PatchError(f"onnxruntime cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    difference, equal = 0.0, 0
    with torch.no_grad():
        for piece in images.split(batch):
            ours = model(piece)
            theirs = torch.from_numpy(session.run(None, {"images": piece.contiguous().numpy()})[0])
            difference = max(difference, float((ours - theirs).abs().max()))
            equal += int((ours.argmax(1) == theirs.argmax(1)).view(len(ours), -1).all(1).sum())
    return Agreement(len(images), difference, equal)
