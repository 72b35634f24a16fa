"""Δ-modules under decoders: a class of every pixel and boxes, beside the frozen backbone with the same decoder.

    dense    mean IoU of segmentation, mean average precision at IoU 0.5 of detection

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), detection and segmentation: DeepLab over ResNet-50,
Faster R-CNN over ResNet-18, on Pascal VOC. Only Δ-modules and what answers are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from modelpatch.reproduce.bench import Bench
from modelpatch.reproduce.parts import short
from modelpatch.reproduce.patching import FOUR
from modelpatch.reproduce.recipe import Claim, Figures, Part, Recipe, Scale
from modelpatch.train.measures import check_metrics

FROZEN = "frozen backbone"
METHODS = {FROZEN: "linear-probe(head_lr=0.003)", FOUR: "delta(modules=4,head_lr=0.003)"}
MEASURED = {"segmentation": "miou", "detection": "map50"}


def dense_parts(bench: Bench) -> Iterator[Part]:
    """Every data set over the backbone of its place, or the last there is."""
    for seed in bench.seeds:
        for place, name in enumerate(bench.scale.data):
            number = min(place, len(bench.scale.backbones) - 1)
            for row in bench.scale.methods:
                yield Part(row, (short(name),), seed, partial(_score, bench, row, name, number, seed))


def _score(bench: Bench, row: str, name: str, number: int, seed: int) -> Figures:
    """The figure of the task's kind in percent, on its test images. Raises `MissingExtraError` without what measures it."""
    data = bench.task(name)
    check_metrics(data.task.kind)
    patch = bench.fit(bench.backbone(number), data, bench.method(row), seed)
    return {short(name): 100 * patch.metrics[f"test_{MEASURED[data.task.kind]}"]}


DENSE = Recipe(
    paper="delta-networks",
    table="dense",
    title="Δ-modules under decoders: segmentation and detection",
    section="detection and semantic segmentation",
    unit="mean IoU or mAP at 0.5, %",
    notes=(
        "Needs the extra `dense`. Decoders and detectors are trained in both rows; they are a fourth as wide as the paper's. "
        "DeepLab is V3+ over maps of strides 16 and 32, where the paper dilates the network. Rates are unstated in the "
        "paper."
    ),
    scales={
        "small": Scale(
            data=("camvid", "bccd_voc"),
            backbones=("bundled:tiny",),
            methods=METHODS,
            fit={"image_size": 96, "batch_size": 8, "clip": 5.0},
            seeds=2,
            images=96,
            tested=48,
            steps=48,
        ),
        "paper": Scale(
            data=("voc2012", "voc2007"),
            backbones=("timm:resnet50.tv_in1k", "timm:resnet18.tv_in1k"),
            methods=METHODS,
            fit={"image_size": 512, "epochs": 50, "batch_size": 16, "clip": 5.0},
            seeds=3,
        ),
    },
    claims=(Claim("D10", "Δ-modules are above the frozen backbone", ((FOUR, FROZEN),), "+1.6, +3.4 and +0.8"),),
    parts=dense_parts,
)
