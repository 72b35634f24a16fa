"""What scale, bias, statistics of normalisation layers and depthwise filters do alone.

    transfer      over pretrained weights: patches of one kind and several, with the last layer and without training it
    section-5.1   over random weights that stay: the last layer, with a scale and bias of every channel, and those alone
    table-6       over pretrained weights: the last layer, with the task's own statistics, with scale and bias as well

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning* (ICLR
2019). Its recipe: RMSProp at a rate of 0.045 that falls to 0.98 every 2.5 epochs, for 50,000 steps and more, at 224 px;
decay and momentum 0.9 and epsilon 1 are TF-slim's.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelpatch.reproduce.parts import each, top1, top1_over_random
from modelpatch.reproduce.recipe import Claim, Recipe, Scale

SETS = ("flowers102", "stanford_cars", "fgvc_aircraft", "cifar100")
RMSPROP = "optimizer=rmsprop,head_lr=0.045"
SLIM = {"schedule": "exponential", "warmup": 0.0, "batch_size": 32, "image_size": 224, "augment": "standard"}
LAST, BOTH, ALONE = "last layer", "last layer + S/B", "S/B, random last layer"
FILTERS, EVERY, TUNED = "last layer + DW", "last layer + S/B + DW", "full fine-tuning"
STATISTICS, ALL = "last layer + statistics", "last layer + statistics + S/B"


def _paper(methods: Mapping[str, str]) -> Scale:
    return Scale(
        data=SETS, backbones=("timm:mobilenetv2_100.ra_in1k",), methods=methods, fit=SLIM, seeds=3, steps=50_000
    )


TRANSFER = Recipe(
    paper="k-for-1",
    table="transfer",
    title="Transfer with patches of scale and bias, and of depthwise filters",
    section="section 5.2: transfer learning",
    notes="Batch size and data sets are not all stated in the paper; batches are of 32 at its scale, of 64 at the small one.",
    scales={
        "small": Scale(
            data=("rsscn7", "gtsrb"),
            backbones=("bundled:tiny",),
            methods={
                LAST: "linear-probe",
                ALONE: "scale-bias(statistics=learned,head=random)",
                BOTH: "scale-bias(statistics=learned)",
                FILTERS: "depthwise",
                EVERY: "scale-bias(statistics=learned)+depthwise",
                TUNED: "full-finetune(lr=0.001)",
            },
            fit={"image_size": 32, "batch_size": 64},
            seeds=2,
            images=430,
            tested=300,
            steps=30,
        ),
        "paper": _paper(
            {
                LAST: f"linear-probe({RMSPROP})",
                ALONE: f"scale-bias(statistics=learned,lr=0.045,head=random,{RMSPROP})",
                BOTH: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})",
                FILTERS: f"depthwise(lr=0.045,{RMSPROP})",
                EVERY: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})+depthwise(lr=0.045,{RMSPROP})",
                TUNED: f"full-finetune(lr=0.045,statistics=learned,{RMSPROP})",
            }
        ),
    },
    claims=(
        Claim(
            "K1",
            "scale and bias with the last layer are above the last layer",
            ((BOTH, LAST),),
            "+5.9, +26, +24.8",
            small=True,
        ),
        Claim(
            "K2",
            "scale and bias alone come near the last layer with 6 to 11 times fewer parameters",
            ((ALONE, LAST),),
            "-5.0, -22, +6.4",
            margin=-22,
        ),
        Claim("K1", "depthwise filters with the last layer are above the last layer", ((FILTERS, LAST),), ""),
    ),
    parts=each(top1),
)

RANDOM = Recipe(
    paper="k-for-1",
    table="section-5.1",
    title="Scale and bias over random, frozen weights",
    section="section 5.1",
    notes="Batch size and data sets are not all stated in the paper; batches are of 32. Every seed draws its own weights.",
    scales={
        "small": Scale(
            data=("mnist", "bundled:digits", "gtsrb"),
            backbones=("bundled:tiny",),
            methods={
                LAST: "linear-probe",
                BOTH: "scale-bias(statistics=learned)",
                ALONE: "scale-bias(statistics=learned,head=random)",
            },
            fit={"image_size": 32, "batch_size": 64},
            seeds=2,
            images=900,
            tested=500,
            steps=150,
        ),
        "paper": _paper(
            {
                LAST: f"linear-probe({RMSPROP})",
                BOTH: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})",
                ALONE: f"scale-bias(statistics=learned,lr=0.045,head=random,{RMSPROP})",
            }
        ),
    },
    claims=(
        Claim(
            "K8",
            "scale and bias and the last layer are far above the last layer alone",
            ((BOTH, LAST),),
            "≫",
            margin=10,
        ),
    ),
    parts=each(top1_over_random),
)

TABLE_6 = Recipe(
    paper="k-for-1",
    table="table-6",
    title="The task's own statistics, without and with scale and bias",
    section="Table 6",
    notes="Batch size and data sets are not all stated in the paper; batches are of 32 at its scale, of 64 at the small one.",
    scales={
        "small": Scale(
            data=("imagenette", "rsscn7", "gtsrb", "mnist"),
            backbones=("bundled:tiny",),
            methods={
                LAST: "linear-probe",
                STATISTICS: "scale-bias(statistics=learned,affine=false)",
                ALL: "scale-bias(statistics=learned)",
            },
            fit={"image_size": 32, "batch_size": 64},
            seeds=2,
            images=640,
            tested=400,
            steps=80,
        ),
        "paper": _paper(
            {
                LAST: f"linear-probe({RMSPROP})",
                STATISTICS: f"scale-bias(statistics=learned,affine=false,{RMSPROP})",
                ALL: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})",
            }
        ),
    },
    claims=(
        Claim(
            "K3",
            "statistics alone hurt the last layer",
            ((LAST, STATISTICS),),
            "on 3 of 4 sets; CIFAR-100 gains 12",
            small=True,
        ),
        Claim(
            "K1",
            "scale and bias with the last layer are above the last layer",
            ((ALL, LAST),),
            "+5.9, +26, +24.8",
            small=True,
        ),
    ),
    parts=each(top1),
)
