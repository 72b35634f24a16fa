"""Patches under decoders: a class of every pixel and boxes, beside the frozen backbone with the same decoder.

    DENSE     Δ-modules: mean IoU of segmentation, mean average precision at IoU 0.5 of detection
    FCN       masks under a fully convolutional decoder, beside a network of the task's own

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), detection and segmentation: DeepLab over ResNet-50,
Faster R-CNN over ResNet-18, on Pascal VOC. Only Δ-modules and what answers are trained. Mallya, Davis, Lazebnik: *Piggyback*
(ECCV 2018), section 4.4: FCN-32s over VGG-16, its new layers trained as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import short
from modelpatch_studies.patching import FOUR
from modelpatch_studies.piggyback import ADAM, INDIVIDUAL, MASKS, PAPER, SGD
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale, mobilenet

FROZEN, SCALED = "frozen backbone", "scale and bias"
METHODS = {FROZEN: "linear-probe(head_lr=0.003)", FOUR: "delta(modules=4,head_lr=0.003)"}
MEASURED = {"segmentation": "miou", "detection": "map50"}


def dense_jobs(bench: Workbench) -> Iterator[Job]:
    """Every data set over the backbone of its place, or the last there is."""
    for seed in bench.seeds:
        for place, name in enumerate(bench.scale.data):
            number = min(place, len(bench.scale.backbones) - 1)
            for row in bench.scale.methods:
                yield Job(row, (short(name),), seed, partial(_score, bench, row, name, number, seed))


def _score(bench: Workbench, row: str, name: str, number: int, seed: int) -> Figures:
    """The figure of the task's kind in percent, on its test images."""
    data = bench.task(name)
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
        "mobilenet": mobilenet(
            data=("bccd_voc",),
            methods={
                FROZEN: "linear-probe(head_lr=0.001)",
                SCALED: "scale-bias(head_lr=0.001)",
                FOUR: "delta(modules=4,lr=0.01,start=identity,head_lr=0.001)",
            },
            fit={"image_size": 160, "epochs": 8, "batch_size": 8, "clip": 5.0, "decoder": "faster-rcnn"},
        ),
    },
    claims=(Claim("D10", "Δ-modules are above the frozen backbone", ((FOUR, FROZEN),), "+1.6, +3.4 and +0.8"),),
    jobs=dense_jobs,
)

FCN = Recipe(
    paper="piggyback",
    table="segmentation",
    title="Masks under a fully convolutional decoder",
    section="section 4.4: semantic segmentation",
    unit="mean IoU, %",
    notes=(
        "Needs the extra `dense`. The decoder, normalised in groups, is trained in every row. The paper adds SBD's masks to "
        "VOC 2011's; here VOC 2012 has its own."
    ),
    scales={
        "small": Scale(
            data=("camvid",),
            backbones=("bundled:tiny",),
            methods={
                FROZEN: "linear-probe(head_lr=0.01)",
                MASKS: "piggyback(lr=0.0005,head_lr=0.01)",
                INDIVIDUAL: "full-finetune(lr=0.001,head_lr=0.01)",
            },
            fit={"image_size": 96, "batch_size": 8, "clip": 5.0, "decoder": "fcn32"},
            seeds=2,
            images=96,
            tested=48,
            steps=60,
        ),
        "paper": Scale(
            data=("voc2012",),
            backbones=("timm:vgg16.tv_in1k",),
            methods={
                FROZEN: f"linear-probe({ADAM})",
                MASKS: f"piggyback(lr=0.0001,{ADAM})",
                INDIVIDUAL: f"full-finetune(lr=0.001,{SGD})",
            },
            fit={**PAPER.fit, "epochs": 15, "image_size": 512, "batch_size": 8, "decoder": "fcn32"},
            seeds=3,
        ),
        "mobilenet": mobilenet(
            data=("camvid",),
            methods={
                FROZEN: "linear-probe(head_lr=0.01)",
                MASKS: "piggyback(norms=trained,lr=0.0003,head_lr=0.01)",
                SCALED: "scale-bias(lr=0.001,head_lr=0.01)",
                FOUR: "delta(modules=4,lr=0.03,start=identity,head_lr=0.01)",
                f"{FOUR} + S/B": "delta(modules=4,lr=0.03,start=identity,head_lr=0.01)+scale-bias(lr=0.001,head_lr=0.01)",
                INDIVIDUAL: "full-finetune(lr=0.0003,head_lr=0.01)",
            },
            fit={"image_size": 128, "epochs": 60, "batch_size": 8, "decoder": "deeplab"},
        ),
    },
    claims=(
        Claim(
            "P8",
            "masks are at least as good as a network of its own",
            ((MASKS, INDIVIDUAL),),
            "61.41 to 61.08",
            doubt="Masks have flipped few bits in so few steps; docs/segmentation.md has longer runs of an ImageNet network.",
        ),
        Claim("P8", "masks are above the frozen backbone", ((MASKS, FROZEN),), "", small=True),
    ),
    jobs=dense_jobs,
    published={(MASKS, "voc2012"): 61.41, (INDIVIDUAL, "voc2012"): 61.08},
)
