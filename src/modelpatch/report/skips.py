"""Weights of the skips of a Δ-Network over a task's images, as figures, a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.images import ImageStore
from modelpatch.data.splits import Split
from modelpatch.errors import MethodError
from modelpatch.methods.delta import GRAFT, SkipWeights, skip_weights
from modelpatch.patch.contents import Patch
from modelpatch.report.plots import BLUE, GREY, ORANGE, figure
from modelpatch.report.tables import new_table

MEMORY = 2 * 2**30
MAX_LABELS = 60


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
    """For every stage its weights over the images: a box from quartile to quartile, whiskers from the 5th to the 95th
    percentile, a dot at the mean, all stages on one scale; and below them the variance of its nodes."""
    longest = min(max(len(record.edges) for record in records), MAX_LABELS)
    width = min(max((1 + 0.28 * longest) * len(records) + 1, 5), 24)
    every = torch.cat([record.weights.flatten() for record in records])
    low, high = min(every.min().item(), 0), max(every.max().item(), 1)
    with figure(path, width, 6, columns=len(records), rows=2) as drawn:
        for axes, below, record, name in zip(*drawn.reshape(2, -1), records, names, strict=True):
            boxes = axes.boxplot(
                record.weights.float().numpy(),
                whis=(5, 95),
                showfliers=False,
                showmeans=True,
                patch_artist=True,
                widths=0.6,
                medianprops={"color": "white"},
                meanprops={"marker": "o", "markersize": 3, "markerfacecolor": "black", "markeredgecolor": "black"},
            )
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
