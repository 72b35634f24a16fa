"""Figures that take runs over a task's images, as tables: the weights of skips, and codecs of an extracted patch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.convert.calibrate import calibrate
from modelpatch.convert.extraction import DELTA_CODECS, extract
from modelpatch.data.images import ImageStore
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.errors import MethodError
from modelpatch.methods.delta import GRAFT, SkipWeights, skip_weights
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.report.plots import BLUE, GREY, ORANGE, figure
from modelpatch.report.tables import new_table, percent
from modelpatch.train.evaluation import MEMORY, evaluate, with_result

MAX_LABELS = 60
SIZED = ("sign", "two-bit")  # codecs whose sizes can be learned
CALIBRATED = ", calibrated"  # what their rows are called then
BATCH = 32


def measure_skips(
    backbone: Backbone, patch: Patch, split: Split, advance: Callable[[int], None] = lambda _: None
) -> list[SkipWeights]:
    """λ and variances of every patched stage over a split's images. Raises `MethodError` for a patch that weighs no skips."""
    check_skips(patch)
    model = backbone.patched(patch)
    store = ImageStore(split, patch.preprocessing, MEMORY)
    batches: list[list[SkipWeights]] = []
    for rows in torch.arange(len(store)).split(64):
        batches.append(skip_weights(model, store.plain(rows).to(backbone.device)))
        advance(len(rows))
    return [SkipWeights.join(stage) for stage in zip(*batches, strict=True)]


def check_skips(patch: Patch) -> None:
    """Raises `MethodError` for a patch that weighs no skips."""
    if not any(graft.kind == GRAFT for graft in patch.grafts):
        raise MethodError(f"the patch was made by {patch.method.name}, which weighs no skips. Leave out --data.")


def stage_names(backbone: Backbone, records: Sequence[SkipWeights]) -> list[str]:
    """The names of the first and last block of each stage."""
    ends = [(backbone.chain[start].name, backbone.chain[end - 1].name) for start, end in (r.span for r in records)]
    return [first if first == last else f"{first} to {last}" for first, last in ends]


def skips_table(records: Sequence[SkipWeights], names: Sequence[str]) -> Table:
    """Mean and spread of every weight over the images."""
    rows = [
        (name, f"{edge['from']} → {edge['to']}", "1" if edge["existing"] else "0", f"{edge['mean']:.3f}",
         f"{edge['deviation']:.3f}")
        for record, name in zip(records, names, strict=True)
        for edge in record.as_dict()["edges"]
    ]  # fmt: skip
    figures = ("skip", "in the base", "mean λ", "deviation")
    return new_table("weights of the skips", texts=("stage",), figures=figures, rows=rows)


def variances_table(records: Sequence[SkipWeights], names: Sequence[str]) -> Table:
    """The variance of every node's sum, and how much it is of the node before: about 2 where skips pile up."""
    rows = []
    for record, name in zip(records, names, strict=True):
        for node, (before, variance) in enumerate(zip((0.0, *record.variances), record.variances), 1):  # noqa: B905
            rows.append((name, str(node), f"{variance:.3g}", f"{variance / before:.2f}" if before else ""))
    caption = "of z before its activation, over all images, channels and places"
    figures = ("node", "variance", "times the last")
    return new_table("variance of the nodes", caption, texts=("stage",), figures=figures, rows=rows)


def plot_skip_weights(records: Sequence[SkipWeights], names: Sequence[str], title: str, path: Path) -> None:
    """Draw every stage's weights over the images (quartiles, 5th to 95th percentile, mean), and its nodes' variances."""
    longest = min(max(len(record.edges) for record in records), MAX_LABELS)
    width = min(max((1 + 0.28 * longest) * len(records) + 1, 5), 24)
    every = torch.cat([record.weights.flatten() for record in records])
    low, high = min(every.min().item(), 0), max(every.max().item(), 1)
    dots = {"marker": "o", "markersize": 3, "markerfacecolor": "black", "markeredgecolor": "black"}
    style: dict[str, Any] = {"whis": (5, 95), "showfliers": False, "showmeans": True, "patch_artist": True}
    style |= {"widths": 0.6, "medianprops": {"color": "white"}}
    with figure(path, width, 6, columns=len(records), rows=2) as drawn:
        for axes, below, record, name in zip(*drawn.reshape(2, -1), records, names, strict=True):
            boxes = axes.boxplot(record.weights.float().numpy(), meanprops=dots, **style)
            for box, existing in zip(boxes["boxes"], record.existing, strict=True):
                box.set(facecolor=BLUE if existing else ORANGE, edgecolor="none")
            labels = [f"{i}→{j}" for i, j in record.edges] if len(record.edges) <= MAX_LABELS else []
            axes.set_xticks(range(1, len(labels) + 1), labels, rotation=90, fontsize=7)
            axes.set(title=name, ylabel="λ", ylim=(low - 0.03, high + 0.03))
            axes.title.set_fontsize(9)
            nodes = range(1, len(record.variances) + 1)
            below.bar(nodes, record.variances, color=GREY)
            below.set(xlabel="node", ylabel="variance of z", xticks=nodes if len(nodes) <= MAX_LABELS else [])
        axes.figure.suptitle(f"{title}\nblue: skips of the base, orange: new ones", fontsize=10)


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

    With steps of `calibration`, rows of their own have the sizes of `sign` and `two-bit` learned on training images.
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
    return new_table(
        title,
        "bytes beside those of all tensors of the checkpoint",
        texts=("codec",),
        figures=("top-1", "file bytes", "%"),
        rows=[(row.codec, percent(row.top1), f"{row.file_bytes:,}", percent(row.share)) for row in rows],
    )
