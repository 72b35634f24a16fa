"""SubTuning: which blocks to tune, alone or in pairs, and how that moves with the number of images.

    pairs      the best pair of neighbours, of blocks apart, of all; the best block among the last two and among the others
    samples    the best block among the last and among the earlier ones, from a tenth of the images to all

    best = argmax_u accuracy(u) on held-out images;  figures are the test accuracies of the best, trained once more

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), whose settings are those of `subtuning.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from modelpatch import Task
from modelpatch.methods import confine
from modelpatch.select import profile
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import held_out, names, short
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe
from modelpatch_studies.subtuning import (
    BLOCK,
    BY_FOLDS,
    OVERFITTING,
    PAPER,
    PAPER_BLOCKS,
    PROBE,
    SMALL,
    SMALL_BLOCKS,
    STAGES,
    SUBTUNING,
    TUNED,
    subtuned,
)

Unit = tuple[str, ...]  # the names of blocks that are tuned together


def winners(bench: Workbench, data: Task, groups: Mapping[str, Sequence[Unit]], seed: int) -> dict[str, Unit]:
    """The unit of every group that does best on held-out images."""
    how = {"folds": bench.scale.options["folds"], "same_steps": True, **bench.settings(data, seed)}
    sizes = {len(unit) for group in groups.values() for unit in group}
    profiles = [profile(bench.backbone(), data, bench.method(BLOCK), pairs=size == 2, **how) for size in sorted(sizes)]
    score = {row.blocks: row.score.top1 for one in profiles for row in one.rows}
    return {name: max(group, key=score.__getitem__) for name, group in groups.items()}


# pairs --------------------------------------------------------------------------------------------------------------

ADJACENT, APART, PAIR = "best pair of neighbours", "best pair apart", "best pair"
LAST_TWO, OTHERS = "best of the last two blocks", "best of the other blocks"


def pair_jobs(bench: Workbench) -> Iterator[Job]:
    """Both ends, and the best of every group of units."""
    for seed, name in itertools.product(bench.seeds, names(bench)):
        for row in (PROBE, TUNED, OTHERS, LAST_TWO, ADJACENT, APART, PAIR):
            yield Job(row, (short(name),), seed, partial(_pair, bench, row, name, seed))


def _pair(bench: Workbench, row: str, name: str, seed: int) -> Figures:
    backbone, data = bench.backbone(), bench.task(name)
    if row in bench.scale.methods:
        return {short(name): bench.accuracy(backbone, data, bench.method(row), seed)}
    found = bench.once(("winners", name, seed), lambda: winners(bench, data, groups_of(bench), seed))
    tune = partial(bench.accuracy, backbone, data, confine(bench.method(BLOCK), found[row]), seed)
    return {short(name): bench.once(("top1", name, seed, found[row]), tune)}


def groups_of(bench: Workbench) -> dict[str, Sequence[Unit]]:
    """The units to choose among, by the row."""
    names = [block.name for block in bench.backbone().chain.blocks]
    singles = [(name,) for name in names]
    pairs, neighbours = list(itertools.combinations(names, 2)), list(itertools.pairwise(names))
    apart = [pair for pair in pairs if pair not in neighbours]
    return {OTHERS: singles[:-2], LAST_TWO: singles[-2:], ADJACENT: neighbours, APART: apart, PAIR: pairs}


PAIRS = Recipe(
    paper="subtuning",
    table="pairs",
    title="Pairs of blocks, and the first block of a greedy search",
    section="section 2.1: the profile of pairs; the order of greedy selection",
    notes=(
        "The best of a group is chosen on held-out images, a fifth of the training images at the small scale, five folds at "
        "the paper's, and trained once more on all of them. A greedy search takes the better of the best of the last two "
        "blocks and of the others first."
    ),
    scales={
        "small": replace(SMALL, data=("rsscn7",), images=350, steps=36, options={"folds": 1}),
        "paper": replace(PAPER, options={"folds": 5}),
    },
    claims=(
        Claim(
            "T2",
            "the best pair apart is above the best pair of neighbours",
            ((APART, ADJACENT),),
            "B2 with B14",
            doubt="Of eight blocks few lie far apart: the best of both kinds differ by less than two seeds do.",
        ),
        Claim(
            "T6",
            "two blocks are above full fine-tuning",
            ((PAIR, TUNED),),
            "two blocks above all",
            doubt=OVERFITTING,
        ),
        Claim(
            "T7",
            "the first block of a greedy search is the last or the one before it",
            ((LAST_TWO, OTHERS),),
            "the last or the one before it",
        ),
    ),
    jobs=pair_jobs,
)


# numbers of images --------------------------------------------------------------------------------------------------

LATE, EARLIER = "best of the last quarter of the blocks", "best of the earlier blocks"


def sample_jobs(bench: Workbench) -> Iterator[Job]:
    """Every row from every share of the images, as the mean over data sets; the greedy search from all of them."""
    shares = bench.scale.options["shares"]
    for seed, share in itertools.product(bench.seeds, shares):
        for row in (PROBE, TUNED, EARLIER, LATE, *((SUBTUNING,) if share == max(shares) else ())):
            yield Job(row, (f"{share} %",), seed, partial(_sampled, bench, row, share, seed))


def _sampled(bench: Workbench, row: str, share: int, seed: int) -> Figures:
    found = [_from_share(bench, row, name, share, seed) for name in names(bench)]
    return {f"{share} %": sum(found) / len(found)}


def _from_share(bench: Workbench, row: str, name: str, share: int, seed: int) -> float:
    whole = held_out(bench, name, seed)
    data = whole.subsample(round(len(whole.train) * share / 100), seed)
    if row == SUBTUNING:
        return subtuned(bench, data, seed)
    method = bench.method(row if row in bench.scale.methods else BLOCK)
    if row in (EARLIER, LATE):
        singles = [(block.name,) for block in bench.backbone().chain.blocks]
        late = max(1, len(singles) // 4)
        groups = {EARLIER: singles[:-late], LATE: singles[-late:]}
        found = bench.once(("winners", name, share, seed), lambda: winners(bench, data, groups, seed))
        method = confine(method, found[row])
    return bench.accuracy(bench.backbone(), data, method, seed)


SAMPLES = Recipe(
    paper="subtuning",
    table="samples",
    title="The best block by the number of images",
    section="the number of training images",
    notes=(
        "The best block of a group is chosen on held-out images, the same fifth of all training images for every share, "
        "which no row trains on. The last quarter is the last two of the bundled network's 8 blocks, the last four of "
        "ResNet-50's 16. At the small scale steps are as many for every share, and SubTuning's search, which runs on all "
        "images alone, is over stages. The paper counts images, from 100 to 10,000 and all of CIFAR-10; here they are shares."
    ),
    numeric=True,
    scales={
        "small": replace(
            SMALL,
            data=("rsscn7",),
            methods={**SMALL.methods, SUBTUNING: SMALL_BLOCKS},
            images=None,
            steps=32,
            options={**STAGES, "folds": 1, "shares": (10, 30, 100)},
        ),
        "paper": replace(
            PAPER,
            data=("cifar10",),
            methods={**PAPER.methods, SUBTUNING: PAPER_BLOCKS},
            options={**BY_FOLDS, "shares": (1, 2, 10, 30, 100)},
        ),
    },
    claims=(
        Claim(
            "T4",
            "late blocks are further ahead of earlier ones with few images than with all",
            ((LATE, EARLIER),),
            "the best block: B16 with 100 and 500 images, B7 with 1,000, B6 or B9 with 10,000",
            columns=("10 %",),
            than=("100 %",),
        ),
        Claim(
            "T8",
            "with all images SubTuning is about as good as full fine-tuning",
            ((SUBTUNING, TUNED),),
            "about equal",
            margin=-1,
            doubt=OVERFITTING,
        ),
    ),
    jobs=sample_jobs,
)
