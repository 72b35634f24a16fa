"""Patches of scale, bias and statistics of normalisation layers, and of depthwise filters.

    transfer         over pretrained weights: patches of one kind and several, with the last layer and without training it
    section-5.1      over random weights that stay: the last layer, with a scale and bias of every channel, and those alone
    table-6          over pretrained weights: the last layer, with the task's own statistics, with scale and bias as well
    learning-rates   scale and bias, and full fine-tuning, along the rate; the best rate of one beside that of the other

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning* (ICLR
2019). Its recipe: RMSProp at a rate of 0.045 that falls to 0.98 every 2.5 epochs, for 50,000 steps and more, at 224 px;
decay and momentum 0.9 and epsilon 1 are TF-slim's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from modelpatch.errors import DivergedError
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import each, held_and_test, top1, top1_over_random
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale

SETS = ("flowers102", "stanford_cars", "fgvc_aircraft", "cifar100")
RMSPROP = "optimizer=rmsprop,head_lr=0.045"
SLIM = {"schedule": "exponential", "warmup": 0.0, "batch_size": 32, "image_size": 224, "augment": "standard"}
LAST, BOTH, ALONE = "last layer", "last layer + S/B", "S/B, random last layer"
FILTERS, EVERY, TUNED = "last layer + DW", "last layer + S/B + DW", "full fine-tuning"
STATISTICS, ALL = "last layer + statistics", "last layer + statistics + S/B"
SMALL = Scale(
    data=("rsscn7", "gtsrb"),
    backbones=("bundled:tiny",),
    methods={
        LAST: "linear-probe(solver=steps)",
        BOTH: "scale-bias(statistics=learned)",
        TUNED: "full-finetune(lr=0.001)",
    },
    fit={"image_size": 32, "batch_size": 64},
    seeds=2,
    images=430,
    tested=300,
    steps=30,
)
PAPER = Scale(
    data=SETS,
    backbones=("timm:mobilenetv2_100.ra_in1k",),
    methods={
        LAST: f"linear-probe({RMSPROP})",
        BOTH: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})",
        TUNED: f"full-finetune(lr=0.045,statistics=learned,{RMSPROP})",
    },
    fit=SLIM,
    seeds=3,
    steps=50_000,
)

TRANSFER = Recipe(
    paper="k-for-1",
    table="transfer",
    title="Transfer with patches of scale and bias, and of depthwise filters",
    section="section 5.2: transfer learning",
    notes="Batch size and data sets are not all stated in the paper; batches are of 32 at its scale, of 64 at the small one.",
    scales={
        "small": replace(
            SMALL,
            methods={
                LAST: SMALL.methods[LAST],
                ALONE: "scale-bias(statistics=learned,head=random)",
                BOTH: SMALL.methods[BOTH],
                FILTERS: "depthwise",
                EVERY: "scale-bias(statistics=learned)+depthwise",
                TUNED: SMALL.methods[TUNED],
            },
            steps=100,  # statistics that are learned take longer than weights
        ),
        "paper": replace(
            PAPER,
            methods={
                LAST: PAPER.methods[LAST],
                ALONE: f"scale-bias(statistics=learned,lr=0.045,head=random,{RMSPROP})",
                BOTH: PAPER.methods[BOTH],
                FILTERS: f"depthwise(lr=0.045,{RMSPROP})",
                EVERY: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})+depthwise(lr=0.045,{RMSPROP})",
                TUNED: PAPER.methods[TUNED],
            },
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
    jobs=each(top1),
)

RANDOM = Recipe(
    paper="k-for-1",
    table="section-5.1",
    title="Scale and bias over random, frozen weights",
    section="section 5.1",
    notes="Batch size and data sets are not all stated in the paper; batches are of 32. Every seed draws its own weights.",
    scales={
        "small": replace(
            SMALL,
            data=("mnist", "bundled:digits", "gtsrb"),
            methods={
                LAST: SMALL.methods[LAST],
                BOTH: SMALL.methods[BOTH],
                ALONE: "scale-bias(statistics=learned,head=random)",
            },
            images=900,
            tested=500,
            steps=150,
        ),
        "paper": replace(
            PAPER,
            methods={
                LAST: PAPER.methods[LAST],
                BOTH: PAPER.methods[BOTH],
                ALONE: f"scale-bias(statistics=learned,lr=0.045,head=random,{RMSPROP})",
            },
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
    jobs=each(top1_over_random),
)

TABLE_6 = Recipe(
    paper="k-for-1",
    table="table-6",
    title="The task's own statistics, without and with scale and bias",
    section="Table 6",
    notes="Batch size and data sets are not all stated in the paper; batches are of 32 at its scale, of 64 at the small one.",
    scales={
        "small": replace(
            SMALL,
            data=("imagenette", "rsscn7", "gtsrb", "mnist"),
            methods={
                LAST: SMALL.methods[LAST],
                STATISTICS: "scale-bias(statistics=learned,affine=false)",
                ALL: SMALL.methods[BOTH],
            },
            images=640,
            tested=400,
            steps=80,
        ),
        "paper": replace(
            PAPER,
            methods={
                LAST: PAPER.methods[LAST],
                STATISTICS: f"scale-bias(statistics=learned,affine=false,{RMSPROP})",
                ALL: PAPER.methods[BOTH],
            },
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
    jobs=each(top1),
)

# learning rates -----------------------------------------------------------------------------------------------------

BELOW, FROM = "full fine-tuning, best rate below S/B's", "full fine-tuning, best rate from S/B's on"
ABOVE, UP_TO = "S/B, best rate above full fine-tuning's", "S/B, best rate up to full fine-tuning's"


def rate_jobs(bench: Workbench) -> Iterator[Job]:
    """Every row at every rate, as the mean over data sets; what does not depend on the rate is as high everywhere."""
    rates = bench.scale.options["learning_rates"]
    for seed, row, rate in itertools.product(bench.seeds, (LAST, BOTH, TUNED, BELOW, FROM, ABOVE, UP_TO), rates):
        yield Job(row, (f"{rate:g}",), seed, partial(_at_rate, bench, row, rate, seed))


def _at_rate(bench: Workbench, row: str, rate: float, seed: int) -> Figures:
    found = [_rated(bench, row, name, rate, seed) for name in bench.scale.data]
    return {f"{rate:g}": sum(found) / len(found)}


def _rated(bench: Workbench, row: str, name: str, rate: float, seed: int) -> float:
    def fitted(row: str, rate: float) -> tuple[float, float]:
        return bench.once(("rate", row, name, rate, seed), partial(_fitted, bench, row, name, rate, seed))

    def best(row: str, rates: Sequence[float]) -> float:
        return max(rates, key=lambda rate: fitted(row, rate)[0])

    if row == LAST:
        return fitted(LAST, 0)[1]
    if row in bench.scale.methods:
        return fitted(row, rate)[1]
    rates = bench.scale.options["learning_rates"]
    own, other = (TUNED, BOTH) if row in (BELOW, FROM) else (BOTH, TUNED)
    bar = best(other, rates)
    groups = {
        BELOW: [one for one in rates if one < bar],
        FROM: [one for one in rates if one >= bar],
        ABOVE: [one for one in rates if one > bar],
        UP_TO: [one for one in rates if one <= bar],
    }
    return fitted(own, best(own, groups[row]))[1] if groups[row] else fitted(LAST, 0)[1]


def _fitted(bench: Workbench, row: str, name: str, rate: float, seed: int) -> tuple[float, float]:
    """Top-1 in percent on held-out and on test images of a row at a rate, 0 where the training diverges."""
    method = replace(bench.method(row), lr=rate) if rate else bench.method(row)
    try:
        return held_and_test(bench, name, method, seed)
    except DivergedError:
        return 0.0, 0.0


RATES = Recipe(
    paper="k-for-1",
    table="learning-rates",
    title="Scale and bias, and full fine-tuning, along the learning rate",
    section="sensitivity to the learning rate",
    notes=(
        "The rate is that of what is tuned before the last layer, whose own rate stays. Best rates are those of held-out "
        "images, a fifth of the training images that no row trains on: full fine-tuning's best rate below that of scale and "
        "bias stands beside its best one from there on, and the other way round. Where no rate is left the last layer alone "
        "stands for the rate of nought, and a training that diverges has 0 %. Rates rise by 3."
    ),
    numeric=True,
    scales={
        "small": replace(
            SMALL, data=("rsscn7",), options={"learning_rates": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)}
        ),
        "paper": replace(PAPER, options={"learning_rates": (0.0045, 0.0135, 0.0405, 0.1215, 0.3645)}),
    },
    claims=(
        Claim(
            "K4",
            "full fine-tuning does best below the best rate of scale and bias",
            ((BELOW, FROM),),
            "the best rate of full fine-tuning is the lower one",
        ),
        Claim(
            "K4",
            "scale and bias do best above the best rate of full fine-tuning",
            ((ABOVE, UP_TO),),
            "the best rate of full fine-tuning is the lower one",
            small=True,
        ),
    ),
    jobs=rate_jobs,
)
