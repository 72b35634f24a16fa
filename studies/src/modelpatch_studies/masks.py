"""Piggyback's masks themselves: what they leave out, what they leave alone, and what they weigh.

    sparsity     the share of weights that masks leave out, from the input to the output; harder and easier tasks
    order        tasks learned in two orders: what that changes in their patches and in the base; PackNet beside masks
    overhead     bytes a task adds to the network, beside one bit a weight

Mallya, Davis, Lazebnik: *Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights* (ECCV 2018),
whose settings are those of `piggyback.py`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from modelpatch import Patch, load_backbone
from modelpatch.errors import TrainingError
from modelpatch.methods import PackNet
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import each, short, top1
from modelpatch_studies.piggyback import CLASSIFIER, MASKS, NORMS, PACKNET, PAPER, SGD, SMALL
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe

# zeros ----------------------------------------------------------------------------------------------------------------------

HARDER, EASIER = "harder tasks", "easier tasks"
EARLY, LATE = "first half of the network", "last half of the network"
ALL = "all"


def sparsity_jobs(bench: Workbench) -> Iterator[Job]:
    """A row for every data set along the network, and rows over all of it that claims compare."""
    depth = [str(number + 1) for number in range(bench.scale.options["depth"])]
    for seed in bench.seeds:
        for name in bench.scale.data:
            yield Job(short(name), (*depth, ALL), seed, partial(_along, bench, name, seed))
        for row in (HARDER, EASIER):
            yield Job(row, (ALL,), seed, partial(_by_difficulty, bench, row, seed))
        for row in (EARLY, LATE):
            yield Job(row, (ALL,), seed, partial(_by_half, bench, row, seed))


def masked_out(bench: Workbench, name: str, seed: int) -> np.ndarray:
    """(D, 2): weights that the mask leaves out, and weights, of D runs of segments from the input to the output.

    Raises `TrainingError` for a network with fewer segments that have weights.
    """

    def count() -> np.ndarray:
        backbone, depth = bench.backbone(), bench.scale.options["depth"]
        patch = bench.fit(backbone, bench.task(name), bench.method(MASKS), seed)
        counts: dict[int, np.ndarray] = {}
        for key, mask in patch.tensors.items():
            kind, _, weight = key.partition("/")
            if kind == "mask":
                index = backbone.chain.segment_of(weight).index
                counts[index] = counts.get(index, 0) + np.array([int((mask == 0).sum()), mask.numel()])
        if len(counts) < depth:
            raise TrainingError(f"{backbone.spec} has weights in {len(counts)} segments; expected at least {depth}.")
        runs = np.array_split(np.array([counts[index] for index in sorted(counts)]), depth)
        return np.array([run.sum(0) for run in runs])

    return bench.once(("masked out", name, seed), count)


def _percent(counts: np.ndarray) -> float:
    zeros, weights = counts.reshape(-1, 2).sum(0)
    return 100 * float(zeros / weights)


def _along(bench: Workbench, name: str, seed: int) -> Figures:
    counts = masked_out(bench, name, seed)
    return {**{str(number + 1): _percent(run) for number, run in enumerate(counts)}, ALL: _percent(counts)}


def _by_difficulty(bench: Workbench, row: str, seed: int) -> Figures:
    """Half of the tasks, by the accuracy of the classifier alone; of an odd number the middle one is in both halves."""
    tasks = bench.scale.data
    accuracy = bench.once(("classifier", seed), lambda: {name: top1(bench, CLASSIFIER, name, seed) for name in tasks})
    ordered = sorted(tasks, key=lambda name: accuracy[name], reverse=row == EASIER)[: (len(tasks) + 1) // 2]
    return {ALL: statistics.fmean(_percent(masked_out(bench, name, seed)) for name in ordered)}


def _by_half(bench: Workbench, row: str, seed: int) -> Figures:
    """The mean over tasks and over the runs of half of the network: every run counts the same, whatever its size."""
    half = bench.scale.options["depth"] // 2
    taken = slice(None, half) if row == EARLY else slice(-half, None)
    runs = [run for name in bench.scale.data for run in masked_out(bench, name, seed)[taken]]
    return {ALL: statistics.fmean(map(_percent, runs))}


SPARSITY = Recipe(
    paper="piggyback",
    table="sparsity",
    title="Weights that masks leave out, from the input to the output",
    section="section 5: sparsity of masks",
    unit="% of weights",
    notes=(
        "Tasks are harder or easier by the error of the classifier alone. Columns are segments of the network that have "
        "masks; halves of the network are means over its segments, whatever their sizes."
    ),
    numeric=True,
    scales={
        "small": replace(
            SMALL,
            data=("gtsrb", "rsscn7", "mnist"),
            methods={MASKS: SMALL.methods[MASKS], CLASSIFIER: SMALL.methods[CLASSIFIER]},
            options={"depth": 12},
        ),
        "paper": replace(
            PAPER,
            backbones=("timm:vgg16.tv_in1k",),
            methods={MASKS: PAPER.methods[MASKS], CLASSIFIER: PAPER.methods[CLASSIFIER]},
            options={"depth": 15},
        ),
    },
    claims=(
        Claim(
            "P4",
            "masks of harder tasks leave out more",
            ((HARDER, EASIER),),
            "rank correlation 0.7 with the classifier's error",
            columns=(ALL,),
            small=True,
            doubt="Digits, which are easy and unlike the photos that the network knows, have the masks that leave out most.",
        ),
        Claim(
            "P5",
            "masks leave out more in deep layers",
            ((LATE, EARLY),),
            "on every task",
            columns=(ALL,),
            doubt="Likely because tasks unlike the photos that the bundled network knows change its first layers as well.",
        ),
    ),
    jobs=sparsity_jobs,
)


# order ----------------------------------------------------------------------------------------------------------------------

BEFORE, AFTER = "base, before all tasks", "base, after all tasks"
TOP1, CHANGED = "mean top-1", "numbers changed"


def order_jobs(bench: Workbench) -> Iterator[Job]:
    """Every task where it comes earlier and where it comes later of two opposite orders, and the base before and after."""
    for seed in bench.seeds:
        for method in (MASKS, PACKNET):
            for place in ("earlier", "later"):
                yield Job(f"{method}, {place}", (TOP1, CHANGED), seed, partial(_place, bench, method, place, seed))
        for row in (BEFORE, AFTER):
            yield Job(row, (CHANGED,), seed, partial(_base, bench, row, seed))


def _learned(bench: Workbench, method: str, names: Sequence[str], seed: int) -> dict[str, Patch]:
    """Patches of the tasks, one after another; PackNet packs each after those before it."""
    patches: dict[str, Patch] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = None
        for number, name in enumerate(names):
            maker = bench.method(method)
            if isinstance(maker, PackNet):
                maker = replace(maker, after=before)
            patches[name] = bench.fit(bench.backbone(), bench.task(name), maker, seed)
            before = str(Path(folder) / f"{number}.safetensors")
            patches[name].save(before)
    return patches


def both_orders(bench: Workbench, method: str, seed: int) -> dict[str, tuple[Patch, Patch]]:
    """Every task's patch where it comes earlier, and where it comes later."""

    def learn() -> dict[str, tuple[Patch, Patch]]:
        names = bench.scale.data
        forth, back = (_learned(bench, method, order, seed) for order in (names, names[::-1]))
        first = set(names[: (len(names) + 1) // 2])
        return {name: (forth[name], back[name]) if name in first else (back[name], forth[name]) for name in names}

    return bench.latest(method, seed, learn)


def changed(first: Patch, second: Patch) -> float:
    """Percent of the numbers of a patch, mask bits among them, that are others in the second one."""
    count = sum(int((tensor != second.tensors[name]).sum()) for name, tensor in first.tensors.items())
    return 100 * count / sum(tensor.numel() for tensor in first.tensors.values())


def _place(bench: Workbench, method: str, place: str, seed: int) -> Figures:
    pairs = both_orders(bench, method, seed).values()
    number = ("earlier", "later").index(place)
    return {
        TOP1: 100 * statistics.fmean(pair[number].metrics["test_top1"] for pair in pairs),
        CHANGED: statistics.fmean(changed(pair[0], pair[number]) for pair in pairs),
    }


def _base(bench: Workbench, row: str, seed: int) -> Figures:
    """Percent of the logits of test images that are not those of the network as it is loaded."""
    spec = bench.scale.backbones[0]
    own = load_backbone(spec).to(bench.device)
    used = bench.backbone() if row == AFTER else own
    if row == AFTER:
        for method in (MASKS, PACKNET):
            both_orders(bench, method, seed)
    split = bench.task(bench.scale.data[0]).test
    images, _ = next(bench.reader(own, seed).images(split, bench.batch_size))
    with torch.no_grad():
        different = own(images) != used(images)
    return {CHANGED: 100 * float(different.double().mean())}


ORDER = Recipe(
    paper="piggyback",
    table="order",
    title="What the order of tasks changes",
    section="independence of the order of tasks; PackNet's dependence on it",
    unit="%",
    notes=(
        "Tasks come in one order and in the opposite one; with an odd number of them the middle one counts as earlier in the "
        "first. PackNet packs each task into what those before it left. Numbers changed are those of a task's patch that "
        "differ in the other order, and logits of test images that differ from those of the network as it is loaded."
    ),
    scales={
        "small": replace(SMALL, methods={MASKS: SMALL.methods[MASKS], PACKNET: "packnet"}, tested=None),
        "paper": replace(PAPER, methods={MASKS: PAPER.methods[MASKS], PACKNET: f"packnet(lr=0.001,{SGD})"}),
    },
    claims=(
        Claim(
            "P6",
            "masks are the same in either order, bit for bit",
            ((f"{MASKS}, earlier", f"{MASKS}, later"),),
            "no dependence on the order",
            columns=(CHANGED,),
            small=True,
        ),
        Claim(
            "P6",
            "no bit of the base's answers changes",
            ((BEFORE, AFTER),),
            "no forgetting",
            columns=(CHANGED,),
            small=True,
        ),
        Claim(
            "row 95",
            "PackNet is better at tasks that come earlier",
            ((f"{PACKNET}, earlier", f"{PACKNET}, later"),),
            "later tasks have fewer weights",
            columns=(TOP1,),
        ),
    ),
    jobs=order_jobs,
)


# bytes ----------------------------------------------------------------------------------------------------------------------

BIT, TERNARY = "one bit a weight", "Piggyback, ternary"


def overhead(bench: Workbench, row: str, name: str, seed: int) -> float:
    """Percent of the network's bytes that a task's patch takes in its file, without its classifier."""
    if row == BIT:
        return 100 / 32
    patch = bench.fit(bench.backbone(), bench.task(name), bench.method(row), seed)
    inspection = patch.inspect()
    return 100 * sum(part.bytes for part in inspection.parts if part.kind != "head") / inspection.backbone_bytes


OVERHEAD = Recipe(
    paper="piggyback",
    table="overhead",
    title="Bytes that a task adds to the network",
    section="Table 1: sizes of networks with masks",
    unit="% of the network's bytes",
    notes=(
        "An individual network adds 100 %. The last layer, which every task has, does not count. Files keep masks at their "
        "entropy with the extra compress, else as packed bits; weights that no mask covers take none."
    ),
    scales={
        scale: replace(shared, methods={**{row: shared.methods[row] for row in (MASKS, NORMS)}, TERNARY: ternary})
        for scale, shared, ternary in (
            ("small", SMALL, "piggyback(lr=0.0005,ternary=true)"),
            ("paper", PAPER, f"{PAPER.methods[MASKS][:-1]},ternary=true)"),
        )
    },
    claims=(
        Claim("P7", "masks take at most one bit a weight", ((BIT, MASKS),), "1/32 of the weights", small=True),
        Claim("P7", "ternary masks take at most two", ((BIT, TERNARY),), "2/32", margin=-100 / 32, small=True),
    ),
    jobs=each(overhead, BIT),
)
