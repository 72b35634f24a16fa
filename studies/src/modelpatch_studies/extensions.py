"""SubTuning beyond accuracy and plain tuning: what tuned blocks cost beside the base, and how else to tune or use them.

    inference         what the fork and merge of each block adds to the base, in multiply-adds and in time, and what it gains
    siamese           a block tuned plainly, with a head that reads the base's features too, and from random values
    pruning           the last three blocks, whole and pruned to ever fewer parameters
    active-learning   which images to label next: small margins beside a random draw

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), whose settings are those of `subtuning.py`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from modelpatch import Engine, Patch
from modelpatch.backbone import Tuning
from modelpatch.methods import Method, confine
from modelpatch.select import added_latency, simulate
from modelpatch_studies.backbones import untrained_patch
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import names, short
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, mobilenet
from modelpatch_studies.subtuning import (
    ADAMW,
    BLOCK,
    PAPER,
    PAPER_BLOCKS,
    PAPER_ENDS,
    PROBE,
    SMALL,
    SMALL_ENDS,
    TUNED,
)


def _top1(bench: Workbench, row: str, blocks: tuple[str, ...], seed: int) -> float:
    """The mean over data sets of a row's method, confined to these blocks, to none where it tunes none."""
    method = confine(bench.method(row), blocks) if blocks else bench.method(row)
    found = [bench.accuracy(bench.backbone(), bench.task(name), method, seed) for name in names(bench)]
    return statistics.fmean(found)


# inference ----------------------------------------------------------------------------------------------------------

OPERATIONS, TIME, SECOND = "multiply-adds added", "time added", "multiply-adds of a second network"
TOP1, PROBE_TOP1 = "top-1 of the block", "top-1 of the linear probe"
LAST_BUT_ONE, LAST = "last but one", "last"


def inference_jobs(bench: Workbench) -> Iterator[Job]:
    """Costs and accuracy of every block of the chain."""
    count = bench.scale.options["blocks"]
    columns = [*(str(number) for number in range(1, count - 1)), LAST_BUT_ONE, LAST]
    work: dict[str, Callable[[str, int], float]] = {
        OPERATIONS: lambda block, seed: added_operations(bench, confine(bench.method(BLOCK), (block,))),
        TIME: lambda block, seed: _added_time(bench, confine(bench.method(BLOCK), (block,))),
        SECOND: lambda block, seed: added_operations(bench, bench.method(TUNED)),
        TOP1: lambda block, seed: _top1(bench, BLOCK, (block,), seed),
        PROBE_TOP1: lambda block, seed: bench.once(("probe", seed), partial(_top1, bench, PROBE, (), seed)),
    }
    for seed, row, (place, column) in itertools.product(bench.seeds, work, enumerate(columns)):
        yield Job(row, (column,), seed, partial(_cell, bench, work[row], column, place - count, seed))


def _cell(bench: Workbench, measure: Callable[[str, int], float], column: str, place: int, seed: int) -> Figures:
    return {column: measure(bench.backbone().chain.blocks[place].name, seed)}


def _draft(bench: Workbench, method: Method) -> Patch:
    """An untrained patch, seen at the backbone's own size."""
    return untrained_patch(bench.backbone(), bench.task(bench.scale.data[0]).task, method)


def added_operations(bench: Workbench, method: Method) -> float:
    """The multiply-adds of the patch beside the base, in percent of the base's: what both share counts once."""
    engine = Engine(bench.backbone(), {"patch": _draft(bench, method)}, tuning=Tuning())
    alone = engine.plan_for(only=["base"]).flops
    return 100 * (engine.plan.flops - alone) / alone


def _added_time(bench: Workbench, method: Method) -> float:
    return 100 * added_latency(bench.backbone(), _draft(bench, method), runs=bench.scale.options["runs"])


INFERENCE = Recipe(
    paper="subtuning",
    table="inference",
    title="What a block beside the base costs and gains, by its place",
    section="inference of several tasks",
    unit="%",
    notes=(
        "One image, answered by the base and by one patch that owns one block: both run the blocks before it once, and the "
        "blocks after it on a batch of two. Multiply-adds are those of the engine's plan, at the backbone's own image size, "
        "and the same for every seed; time is measured on the machine that ran this, where other work adds to it. Claims "
        "rest on multiply-adds, and on time by a wide margin."
    ),
    numeric=True,
    scales={
        "small": replace(SMALL, data=("rsscn7",), images=350, steps=30, options={"blocks": 8, "runs": 31}),
        "paper": replace(PAPER, data=("cifar10",), options={"blocks": 16, "runs": 300}),
    },
    claims=(
        Claim(
            "T9",
            "one of the last two blocks adds at most a fifth to the base",
            ((SECOND, OPERATIONS),),
            "5 to 19 % of its time",
            margin=80,
            columns=(LAST_BUT_ONE, LAST),
            small=True,
        ),
        Claim(
            "T9",
            "and in time at most half",
            ((SECOND, TIME),),
            "5 to 19 % of its time",
            margin=50,
            columns=(LAST_BUT_ONE, LAST),
        ),
        Claim(
            "T9",
            "the last block but one gains more over the linear probe than the last",
            ((TOP1, PROBE_TOP1),),
            "best trade-off at B13 to B15 of 16",
            columns=(LAST_BUT_ONE,),
            than=(LAST,),
        ),
    ),
    jobs=inference_jobs,
)


# ways to tune a block -----------------------------------------------------------------------------------------------

PLAIN, SIAMESE, RESET = "tuned", "tuned, siamese head", "tuned from random values"
EARLY_STAGES, LATE_STAGES = ("stage 1", "stage 2"), ("stage 3", "stage 4")


def way_jobs(bench: Workbench) -> Iterator[Job]:
    """Every way in every stage of the chain: the mean over its blocks, each tuned alone, and over data sets."""
    for seed, row in itertools.product(bench.seeds, bench.scale.methods):
        for number in range(4):
            yield Job(row, (f"stage {number + 1}",), seed, partial(_in_stage, bench, row, number, seed))


def _in_stage(bench: Workbench, row: str, number: int, seed: int) -> Figures:
    if row == PROBE:
        top1 = bench.once(("probe", seed), partial(_top1, bench, PROBE, (), seed))
    else:
        blocks = bench.backbone().chain.stages[number][: bench.scale.options["per_stage"]]
        top1 = statistics.fmean(_top1(bench, row, (block.name,), seed) for block in blocks)
    return {f"stage {number + 1}": top1}


SIAMESE_WAYS = Recipe(
    paper="subtuning",
    table="siamese",
    title="Blocks tuned alone: plainly, beside the base's features, from random values",
    section="section 4.1: siamese SubTuning; re-initialised blocks",
    notes=(
        "A figure is the mean over a stage's blocks, each tuned alone: all of them at the paper's scale, the first one at the "
        "small one. The siamese head reads the base's features beside the patch's, twice as many. Random values are those "
        "that layers are made with; frozen statistics stay. The paper trains those 80 epochs as well; here all rows train "
        "as long."
    ),
    scales={
        "small": replace(
            SMALL,
            data=("rsscn7",),
            methods={
                PROBE: SMALL_ENDS[PROBE],
                PLAIN: "subset(lr=0.001)",
                SIAMESE: "subset(lr=0.001,head=siamese)",
                RESET: "subset(lr=0.001,reinitialize=true)",
            },
            images=320,
            tested=250,
            steps=36,
            options={"per_stage": 1},
        ),
        "paper": replace(
            PAPER,
            methods={
                PROBE: PAPER_ENDS[PROBE],
                PLAIN: PAPER_BLOCKS,
                SIAMESE: f"subset(lr=0.001,statistics=learned,head=siamese,{ADAMW})",
                RESET: f"subset(lr=0.001,statistics=learned,reinitialize=true,{ADAMW})",
            },
            options={"per_stage": None},
        ),
    },
    claims=(
        Claim("T10", "a siamese head is at least as good", ((SIAMESE, PLAIN),), "for most blocks"),
        Claim("T12", "random values are worse", ((PLAIN, RESET),), "worse"),
        Claim(
            "T12",
            "most of all in early blocks",
            ((PLAIN, RESET),),
            "most for early blocks",
            columns=EARLY_STAGES,
            than=LATE_STAGES,
        ),
    ),
    jobs=way_jobs,
)


# pruned blocks ------------------------------------------------------------------------------------------------------

WHOLE, HALFWAY = "whole blocks", "halfway from the probe to whole blocks"
HALF, TENTH, LEAST = "pruned by half", "pruned by 90 %", "pruned the most"
GLOBAL, L1 = "pruned by 90 %, all blocks together", "pruned by 90 %, L1 norm"
PARAMETERS = "parameters"


def _pruned(tune: str, least: float) -> dict[str, str]:
    ways = {HALF: "0.5", TENTH: "0.9", GLOBAL: "0.9,scope=global", L1: "0.9,norm=l1", LEAST: f"{least:g}"}
    return {WHOLE: f"subset({tune})", **{row: f"pruned(ratio={how},{tune})" for row, how in ways.items()}}


def pruning_jobs(bench: Workbench) -> Iterator[Job]:
    """Top-1 of every row, and how many parameters of the blocks it has left."""
    rows = (PROBE, HALFWAY, WHOLE, *(row for row in bench.scale.methods if row not in (PROBE, WHOLE)))
    for seed, row in itertools.product(bench.seeds, rows):
        for name in names(bench):
            yield Job(row, (short(name),), seed, partial(_pruned_top1, bench, row, name, seed))
        if row not in (PROBE, HALFWAY):
            yield Job(row, (PARAMETERS,), seed, partial(_left, bench, row))


def _blocks(bench: Workbench, row: str) -> Method:
    """The row's method, confined to the last blocks of the chain."""
    if row == PROBE:
        return bench.method(row)
    return confine(
        bench.method(row), [block.name for block in bench.backbone().chain.blocks[-bench.scale.options["blocks"] :]]
    )


def _pruned_top1(bench: Workbench, row: str, name: str, seed: int) -> Figures:
    def top1(row: str) -> float:
        tune = partial(bench.accuracy, bench.backbone(), bench.task(name), _blocks(bench, row), seed)
        return bench.once(("top1", row, name, seed), tune)

    return {short(name): statistics.fmean(map(top1, (PROBE, WHOLE) if row == HALFWAY else (row,)))}


def _left(bench: Workbench, row: str) -> Figures:
    """Parameters of the blocks in percent of those of whole ones."""
    counts = [_blocks(bench, one).count_parameters(bench.backbone()) for one in (row, WHOLE)]
    return {PARAMETERS: 100 * counts[0] / counts[1]}


PRUNING = Recipe(
    paper="subtuning",
    table="pruning",
    title="The last three blocks, whole and pruned",
    section="section 4.2: pruning",
    unit="top-1, %; parameters left, %",
    notes=(
        "Inner channels of the last three blocks are pruned once, by their L2 norm and by as much in every block if the row "
        "says nothing else, and what is left is tuned. Parameters are counted with those that cannot be pruned: depthwise "
        "filters, normalisation layers and what leaves a block. The most that is pruned, 98.5 % of the channels at the small "
        "scale and 95 % at the paper's, leaves less than 3 %."
    ),
    scales={
        "small": replace(
            SMALL, methods={PROBE: SMALL_ENDS[PROBE], **_pruned("lr=0.001", 0.985)}, images=350, options={"blocks": 3}
        ),
        "paper": replace(
            PAPER,
            methods={PROBE: PAPER_ENDS[PROBE], **_pruned(f"lr=0.001,statistics=learned,{ADAMW}", 0.95)},
            options={"blocks": 3},
        ),
    },
    claims=(
        Claim(
            "T11",
            "pruned blocks have less than 3 % of the parameters",
            ((WHOLE, LEAST),),
            "less than 3 %",
            97,
            (PARAMETERS,),
            small=True,
        ),
        Claim(
            "T11",
            "and keep most of the gain over the linear probe",
            ((LEAST, HALFWAY),),
            "94 beside 91",
            doubt="The bundled network's depthwise filters cannot be pruned, so that 98.5 % of all other channels go.",
        ),
        Claim("T11", "and are above it", ((LEAST, PROBE),), "94 beside 91"),
    ),
    jobs=pruning_jobs,
)


# which images to label ----------------------------------------------------------------------------------------------

MARGIN, RANDOM = "smallest margins", "random"
STRATEGIES = {MARGIN: "margin", RANDOM: "random"}


def label_jobs(bench: Workbench) -> Iterator[Job]:
    """A curve over numbers of labels for either way to choose, the mean over data sets."""
    columns = tuple(str(count) for count in bench.scale.options["labels"])
    for seed, row in itertools.product(bench.seeds, STRATEGIES):
        yield Job(row, columns, seed, partial(_labelled, bench, row, columns, seed))


def _labelled(bench: Workbench, row: str, columns: tuple[str, ...], seed: int) -> Figures:
    def curves() -> dict[str, list[float]]:
        found = [_curves(bench, name, seed) for name in names(bench)]
        return {
            way: [statistics.fmean(top1s) for top1s in zip(*(one[way] for one in found), strict=True)]
            for way in found[0]
        }

    means = bench.latest("curves", seed, curves)[STRATEGIES[row]]
    return {column: 100 * top1 for column, top1 in zip(columns, means, strict=True)}


def _curves(bench: Workbench, name: str, seed: int) -> dict[str, list[float]]:
    data, labels = bench.task(name), bench.scale.options["labels"]
    found = simulate(bench.backbone(), data, bench.method(BLOCK), labels=labels, **bench.settings(data, seed))
    return {way: found.mean(way) for way in STRATEGIES.values()}


ACTIVE_LEARNING = Recipe(
    paper="subtuning",
    table="active-learning",
    title="Which images to label next: small margins beside a random draw",
    section="section 4.4: active learning",
    notes=(
        "The first images are drawn at random, the same for both rows; every round trains anew from the base. One block is "
        "tuned: B7 of ResNet-50 as in the paper, the fourth of 8 at the small scale. Images are scored as they are, not "
        "augmented."
    ),
    numeric=True,
    scales={
        "small": replace(
            SMALL,
            data=("mnist",),
            methods={BLOCK: "subset(blocks=stages.1.blocks.1,lr=0.001)"},
            fit={**SMALL.fit, "epochs": 15},
            images=1000,
            steps=None,
            options={"labels": (50, 100, 200, 300)},
        ),
        "paper": replace(
            PAPER,
            data=("cifar10",),
            methods={BLOCK: f"subset(blocks=layer2.3,lr=0.001,statistics=learned,{ADAMW})"},
            fit={**PAPER.fit, "epochs": 50},
            options={"labels": (100, 500, 1000, 2500, 5000, 10000)},
        ),
        "mobilenet": mobilenet(
            data=("cifar10_full",),
            methods={BLOCK: "subset"},
            fit={"image_size": 64, "epochs": 10},
            images=2000,
            tested=2000,
            options={"labels": (100, 250, 500, 1000)},
        ),
    },
    claims=(Claim("T13", "small margins are above a random draw", ((MARGIN, RANDOM),), "margins above random"),),
    jobs=label_jobs,
)
