"""Future work of K for the price of 1: clients of different domains with local patches and one shared update.

    dL/dW = mean over clients of dL_c/dW      W shared       dL/dP_c = dL_c/dP_c      P_c never leaves client c

A round takes one batch of every client, averages what they say of the shared weights and steps once: federated SGD, which
`fit_multitask` does as it is. Clients are the domains of one task with the same classes. Several local steps between
averages (federated averaging) would need patches that go on over weights that moved, which no fit does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from modelpatch.recipes import fit_multitask
from modelpatch_studies.adaptation import PACS
from modelpatch_studies.bench import Workbench
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale

ALONE = "alone"
HEADS, PRIVATE = "shared, local heads", "shared, local scale and bias"


def jobs(bench: Workbench) -> Iterator[Job]:
    """One training of all clients for each local patch, and one of every client alone."""
    for seed in bench.seeds:
        for row in (HEADS, PRIVATE):
            yield Job(row, bench.scale.data, seed, partial(_together, bench, row, bench.scale.data, seed))
        for name in bench.scale.data:
            yield Job(ALONE, (name,), seed, partial(_together, bench, PRIVATE, (name,), seed))


def _together(bench: Workbench, row: str, names: tuple[str, ...], seed: int) -> Figures:
    settings = {**bench.scale.fit, "seed": seed, "shared": bench.scale.options["shared"]}
    clients = [bench.task(name) for name in names]
    result = fit_multitask(bench.backbone(), clients, bench.method(row), **settings)
    return {name: 100 * patch.metrics["test_top1"] for name, patch in result.patches.items()}


FEDERATED = Recipe(
    paper="k-for-1",
    table="federated",
    title="Four styles as clients: local patches, one shared update",
    section="future work: federated learning and domains",
    notes=(
        "The paper measures nothing here: at its scale its network and rates. A client alone makes the steps that it makes "
        "with others."
    ),
    scales={
        "small": Scale(
            data=PACS,
            backbones=("bundled:tiny",),
            methods={HEADS: "linear-probe(solver=steps)", PRIVATE: "scale-bias(lr=0.003)"},
            fit={"epochs": 4, "image_size": 32, "batch_size": 32},
            seeds=2,
            options={"shared": "full-finetune(lr=0.001)"},
        ),
        "paper": Scale(
            data=PACS,
            backbones=("timm:mobilenetv2_100.ra_in1k",),
            methods={
                HEADS: "linear-probe(optimizer=rmsprop,head_lr=0.045)",
                PRIVATE: "scale-bias(statistics=learned,lr=0.045,optimizer=rmsprop,head_lr=0.045)",
            },
            fit={"epochs": 100, "image_size": 224, "schedule": "exponential", "warmup": 0.0},
            seeds=3,
            options={"shared": "full-finetune(lr=0.045,optimizer=rmsprop)"},
        ),
    },
    claims=(
        Claim("row 65", "local scale and bias gain over local heads", ((PRIVATE, HEADS),), "future work"),
        Claim("row 65", "the shared update gains over clients alone", ((PRIVATE, ALONE),), "future work"),
    ),
    jobs=jobs,
)
