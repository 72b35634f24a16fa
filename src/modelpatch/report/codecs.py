"""Accuracy and bytes of an extracted patch under every codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.convert.calibrate import calibrate
from modelpatch.convert.extraction import DELTA_CODECS, extract
from modelpatch.data.images import ImageStore
from modelpatch.data.task import Task
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.report.tables import new_table, percent
from modelpatch.train.evaluation import MEMORY, evaluate, with_result

SIZED = ("sign", "two-bit")  # codecs whose sizes can be learned
CALIBRATED = ", calibrated"  # what their rows are called then
BATCH = 32


@dataclass(frozen=True)
class CodecRow:
    """One codec: top-1 in [0, 1] on the task's test images, bytes of the file, and their share of the checkpoint's tensors."""

    codec: str
    top1: float
    file_bytes: int
    share: float


def compare_codecs(
    backbone: Backbone,
    state: Mapping[str, Tensor],
    data: Task,
    codecs: Sequence[str] = DELTA_CODECS,
    advance: Callable[[int], None] = lambda _: None,
    calibration: int = 0,
    **options: Any,
) -> tuple[list[CodecRow], dict[str, Patch]]:
    """Rows and patches of the same checkpoint under several codecs; `options` go to `extract`.

    With `calibration`, a number of steps, the sizes of `sign` and `two-bit` are learned on training images, in rows of
    their own.
    """
    size = sum(tensor.nbytes for tensor in state.values())
    rows, patches = [], {}

    def made(codec: str) -> Patch:
        return extract(backbone, state, codec=codec, name=data.task.name, classes=data.classes, **options)

    for codec in [*codecs, *(f"{one}{CALIBRATED}" for one in SIZED if calibration and one in codecs)]:
        patch = made(codec.removesuffix(CALIBRATED))
        if codec.endswith(CALIBRATED):
            patch = _calibrated(backbone, patch, made("exact"), data, calibration)
        patch = with_result(patch, evaluate(backbone, patch, data))
        file_bytes = patch.inspect().file_bytes
        rows.append(CodecRow(codec, patch.metrics["test_top1"], file_bytes, file_bytes / size))
        patches[codec] = patch
        advance(1)
    return rows, patches


def _calibrated(backbone: Backbone, patch: Patch, exact: Patch, data: Task, steps: int) -> Patch:
    """The patch with sizes that were learned on the task's training images."""
    store = ImageStore(data.train, patch.preprocessing, MEMORY)

    def batches(epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(BATCH):
            yield store.plain(rows).to(backbone.device)

    better = calibrate(backbone, patch, backbone.patched(exact), batches, steps)
    used = {**patch.method.hyperparameters, "calibration": steps}
    return replace(better, method=MethodRecord(name=patch.method.name, hyperparameters=used))


def codec_table(title: str, rows: Sequence[CodecRow]) -> Table:
    """One row a codec."""
    return new_table(
        title,
        "bytes beside those of all tensors of the checkpoint",
        texts=("codec",),
        figures=("top-1", "file bytes", "%"),
        rows=[(row.codec, percent(row.top1), f"{row.file_bytes:,}", percent(row.share)) for row in rows],
    )
