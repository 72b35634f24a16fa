"""Measuring a patch on its task, the base on its own, and the harmonic mean of the two."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.images import open_images, pieces
from modelpatch.data.splits import Split
from modelpatch.data.task import Task, check_classification, check_same_split
from modelpatch.errors import CheckpointMismatchError, DataError
from modelpatch.patch.contents import Patch
from modelpatch.tasks.classification import Evaluation
from modelpatch.tasks.kind import Result, kind_of
from modelpatch.train.batches import place

MEMORY = 2 * 2**30
Advance = Callable[[int], None]  # is told of every batch's images


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b): high only if the new task and the base task are both solved (Δ-Networks, section 4)."""
    return 2 * first * second / (first + second) if first + second else 0.0


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error, None for one seed."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.fmean(values), standard_error(values))

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


def evaluate(backbone: Backbone, patch: Patch, data: Task, advance: Advance = lambda _: None) -> Result:
    """A patch on the test images of its task: an `Evaluation`, `SegmentationResult`, `DetectionResult`.

    Raises `DataError` for data of another kind, of other classes, or of another split than was trained on.
    """
    check_same_split(facts_of(patch), data)
    if data.task.kind != patch.task.kind:
        raise DataError(
            f"{data.task.name} is a {data.task.kind} task, the patch answers a {patch.task.kind} task. Evaluate it on its own."
        )
    if data.classes != patch.task.classes:
        raise DataError(
            f"{data.task.name} has {len(data.classes)} classes ({', '.join(data.classes[:3])}, ...), the patch answers "
            f"{len(patch.task.classes)} ({', '.join(patch.task.classes[:3])}, ...). Evaluate it on its own task."
        )
    kind, model = kind_of(patch.task.kind), backbone.patched(patch)
    answers = answers_of(model, data.test, patch.preprocessing, advance)
    return kind.measure(patch.task.classes, answers, patch.task.options, with_interval=True)


def facts_of(patch: Patch) -> Mapping[str, Any]:
    """Return the recorded facts of the data that a patch was fitted on, empty without any."""
    said = patch.created.get("data")
    return said if isinstance(said, dict) else {}


def with_result(patch: Patch, result: Result) -> Patch:
    """Return the patch with figures on the test images among its metrics: `test_top1`, the ends `test_top1_low` and
    `test_top1_high` of its 95 % interval, and others."""
    figures, ends = dict(result.figures), result.interval
    if ends is not None:
        score = next(iter(figures))
        figures |= {f"{score}_low": ends[0], f"{score}_high": ends[1]}
    return patch.with_metrics(**{f"test_{name}": value for name, value in figures.items()})


def store_as(backbone: Backbone, patch: Patch, data: Task, dtype: str) -> Patch:
    """The patch stored as `dtype`, measured again: `test_top1` (or the task's own metric) is that of the numbers in the file,
    `float32_top1` before. A patch that is stored so already is returned as it is."""
    stored, metric = patch.astype(dtype), patch.task.metric
    if stored.int8 == patch.int8 and all(tensor is patch.tensors[name] for name, tensor in stored.tensors.items()):
        return patch
    stored = with_result(stored, evaluate(backbone, stored, data))
    before = patch.metrics.get(f"test_{metric}", None) or evaluate(backbone, patch, data).score
    return stored.with_metrics(**{f"float32_{metric}": before})


def evaluate_base(backbone: Backbone, data: Task, preprocessing: Preprocessing | None = None) -> Evaluation:
    """The backbone's own head on a task whose classes are among its outputs.

    They are matched by name; where the base names none, WordNet ids are those of ImageNet's 1,000 classes, and other
    classes are matched by position. Raises `DataError` if they cannot be matched.
    """
    check_classification(data, "the base's own head")
    names, count = _name_outputs(backbone, data.classes)
    if set(data.classes) <= set(names):
        rows = [names.index(name) for name in data.classes]
    elif not names and len(data.classes) == count:
        rows = list(range(count))
    else:
        raise DataError(
            f"the base has {count} outputs{' named ' + ', '.join(names[:3]) + ', ...' if names else ''}; "
            f"{data.task.name} has {len(data.classes)} classes ({', '.join(data.classes[:3])}, ...) that cannot be matched "
            "to them. Give data of the base's own classes."
        )
    logits = logits_of(backbone.module, data.test, preprocessing or backbone.preprocessing)
    labels = torch.tensor(rows)[torch.from_numpy(data.test.labels)]
    return Evaluation.of(logits, labels, names or tuple(map(str, range(count))))


def own_classes(backbone: Backbone, classes: tuple[str, ...]) -> Tensor | None:
    """Return the outputs (K,) of the base's own head for these classes, by name; None where it does not name them all."""
    names, _ = _name_outputs(backbone, classes)
    return torch.tensor([names.index(name) for name in classes]) if set(classes) <= set(names) else None


def _name_outputs(backbone: Backbone, classes: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The names of the base's outputs, and their number; WordNet ids for an unnamed thousand that have all `classes`."""
    with torch.no_grad():
        count = int(backbone(torch.zeros(1, *backbone.input_size, device=backbone.device)).shape[1])
    if backbone.classes or count != 1000:
        return backbone.classes, count
    from timm.data.imagenet_info import ImageNetInfo

    ids = tuple(ImageNetInfo("imagenet-1k").label_names())
    return ids if set(classes) <= set(ids) else (), count


def logits_of(
    module: nn.Module, split: Split, preprocessing: Preprocessing, advance: Advance = lambda _: None
) -> Tensor:
    """The logits (N, K) that a module gives a split's images, not augmented, float32 on the CPU."""
    return torch.cat([answers for answers, _ in answers_of(module, split, preprocessing, advance)])


def answers_of(
    module: nn.Module, split: Split, preprocessing: Preprocessing, advance: Advance = lambda _: None
) -> Iterator[tuple[Tensor, Any]]:
    """Batches of what a module answers for a split's images, float32 on the CPU, with their labels or targets."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    for images, targets in open_images(split, preprocessing, 0, once=True).plain_batches():
        with torch.no_grad():
            answers = torch.cat([module(piece).float().cpu() for piece in pieces(place(images, device))])
        yield answers, targets
        advance(len(images))


def read_patch(path: Path, digest: str, backbone: Backbone) -> Patch:
    """Read the patch of a run on a backbone from its file. Raises `CheckpointMismatchError` for one of another run, and
    `WrongBackboneError` for one of a backbone that computes something else."""
    patch = Patch.load(path)
    if patch.created.get("run") != digest:
        raise CheckpointMismatchError(
            f"{path} is of a run with another backbone, method, settings or images. Name another "
            "place, or replace it: --force, or --restart for what an interrupted run left."
        )
    backbone.check_computation(patch.backbone.computation, str(path), patch.backbone.spec, patch.backbone.arguments)
    return patch
