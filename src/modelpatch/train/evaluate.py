"""Measuring a patch: top-1, top-5, per class, confusion, and the harmonic mean with the base task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone import Backbone, Preprocessing
from modelpatch.errors import DataError
from modelpatch.patch import Patch
from modelpatch.train.data import Split, TaskData
from modelpatch.train.images import ImageStore, pieces

MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1]. `confusion[i][j]` counts images of class i that were answered as class j."""

    top1: float
    top5: float
    images: int
    per_class: dict[str, float]
    confusion: list[list[int]]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Evaluation:
        """From logits (N, K) and labels (N,). Classes without an image have no entry in `per_class`."""
        answers, count = logits.argmax(1), len(classes)
        best = logits.topk(min(5, count), dim=1).indices
        confusion = torch.bincount(labels * count + answers, minlength=count * count).view(count, count)
        totals, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        return cls(
            top1=float((answers == labels).double().mean()),
            top5=float((best == labels[:, None]).any(1).double().mean()),
            images=len(labels),
            per_class={name: r / t for name, r, t in zip(classes, right, totals, strict=True) if t},
            confusion=confusion.tolist(),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b): high only if the new task and the base task are both solved (Δ-Networks, section 4)."""
    return 2 * first * second / (first + second) if first + second else 0.0


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def evaluate(
    backbone: Backbone, patch: Patch, data: TaskData, advance: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """A patch on the test images of its task. Raises `DataError` if the data's classes are not the patch's."""
    if data.classes != patch.task.classes:
        raise DataError(
            f"{data.task.name} has {len(data.classes)} classes ({', '.join(data.classes[:3])}, ...), the patch answers "
            f"{len(patch.task.classes)} ({', '.join(patch.task.classes[:3])}, ...). Evaluate it on its own task."
        )
    return evaluate_module(backbone.patched(patch), data.test, data.classes, patch.preprocessing, advance)


def evaluate_base(backbone: Backbone, data: TaskData, preprocessing: Preprocessing | None = None) -> Evaluation:
    """The backbone's own head on a task whose classes are among its outputs.

    They are matched by name; where the base names none, WordNet ids are those of ImageNet's 1,000 classes, and other
    classes are matched by position. Raises `DataError` if they cannot be matched.
    """
    count = _outputs(backbone)
    names = backbone.classes or _imagenet_ids(count, data.classes)
    outputs = tuple(names) or tuple(map(str, range(count)))
    rows = own_classes(backbone, data.classes)
    if rows is None and not names and len(data.classes) == len(outputs):
        rows = torch.arange(len(outputs))
    if rows is None:
        raise DataError(
            f"the base has {len(outputs)} outputs{' named ' + ', '.join(names[:3]) + ', ...' if names else ''}; "
            f"{data.task.name} has {len(data.classes)} classes ({', '.join(data.classes[:3])}, ...) that cannot be matched "
            "to them. Give data of the base's own classes."
        )
    split = Split(data.test.images, rows.numpy()[data.test.labels])
    return evaluate_module(backbone.module, split, outputs, preprocessing or backbone.preprocessing)


def own_classes(backbone: Backbone, classes: tuple[str, ...]) -> Tensor | None:
    """Which outputs (K,) of the base's own head are these classes, by name; None where it does not name them all."""
    names = backbone.classes or _imagenet_ids(_outputs(backbone), classes)
    return torch.tensor([names.index(name) for name in classes]) if names and set(classes) <= set(names) else None


def evaluate_module(
    module: nn.Module,
    split: Split,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    advance: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Any module from normalised images to logits, on a split."""
    logits = logits_of(module, split, preprocessing, advance)
    return Evaluation.of(logits, torch.from_numpy(split.labels), classes)


def logits_of(
    module: nn.Module, split: Split, preprocessing: Preprocessing, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """The logits (N, K) that a module gives a split's images, not augmented, float32 on the CPU."""
    store = ImageStore(split, preprocessing, MEMORY)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    outputs = []
    with torch.no_grad():
        for rows in torch.arange(len(store)).split(64):
            images = store.plain(rows).to(device).contiguous(memory_format=torch.channels_last)
            outputs += [module(piece).float().cpu() for piece in pieces(images)]
            advance(len(rows))
    return torch.cat(outputs)


def _imagenet_ids(outputs: int, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes in the order all zoos use, if `classes` are among them; else none."""
    if outputs != 1000:
        return ()
    from timm.data.imagenet_info import ImageNetInfo

    ids = tuple(ImageNetInfo("imagenet-1k").label_names())
    return ids if set(classes) <= set(ids) else ()


def _outputs(backbone: Backbone) -> int:
    with torch.no_grad():
        return int(backbone(torch.zeros(1, *backbone.input_size, device=backbone.device)).shape[1])


def store_as(backbone: Backbone, patch: Patch, data: TaskData, dtype: str) -> Patch:
    """The patch stored as `dtype`, measured again: `test_top1` is that of the numbers in the file, `float32_top1` before."""
    stored = patch.astype(dtype)
    result = evaluate(backbone, stored, data)
    before = patch.metrics.get("test_top1", None) or evaluate(backbone, patch, data).top1
    return stored.with_metrics(test_top1=result.top1, test_top5=result.top5, float32_top1=before)
