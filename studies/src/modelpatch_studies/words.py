"""PAINT's smaller experiments over an ImageNet MobileNetV2 whose head a sentence encoder makes of words (extra `words`).

    unseen      typographic attacks, counting, multiple choice: patched on some classes, tested on others
    pairs       patched on one data set, tested on the others
    closed      a closed vocabulary: naive heads, frozen probes, probes fitted again, statistics measured again
    families    several backbones: distance to the optimum, similarity of features (CKA), cosine of weights

Ilharco et al.: *Patching open-vocabulary models by interpolating weights* (NeurIPS 2022), sections 5 and 6 and the appendix.
None of these is a claim with a number, so that they have one scale and no verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

from modelpatch import Task, paint
from modelpatch.methods import Paint, Vocabulary
from modelpatch.recipes import Painting, PaintSettings
from modelpatch.train import harmonic_mean
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import names
from modelpatch_studies.made_tasks import (
    counting_task,
    multiple_choice,
    split_classes,
    take_classes,
    transfer_accuracy,
    write_words,
)
from modelpatch_studies.painting import MEAN, MOBILENET, PATCHED, SUPPORTED, WORDS, vocabulary
from modelpatch_studies.recipe import Figures, Job, Recipe

SECTION, NOTES = (
    "sections 5 and 6, appendix",
    "Ours: an ImageNet MobileNetV2 and drawn pictures in place of CLIP and CLEVR.",
)


def _before_and_after(painting: Painting) -> Figures:
    """Accuracies in percent at the base and at the chosen point."""
    found = {}
    for name, point in ((", base", painting.base), ("", painting.chosen)):
        found[f"{SUPPORTED}{name}"] = 100 * point.mean("supported")
        found[f"{PATCHED}{name}"] = 100 * point.mean("patched")
    return found


# classes that were not patched -----------------------------------------------------------------------------------------


def typographic(bench: Workbench, seed: int) -> tuple[Task, Task]:
    """Photographs with a wrong word written across them: half of the classes and the other half."""
    photos = bench.task(bench.scale.data[1])
    attacked = write_words(photos, {name: WORDS.get(name, name.replace("_", " ")) for name in photos.classes}, seed)
    return split_classes(attacked, seed)


def counting(bench: Workbench, seed: int) -> tuple[Task, Task]:
    """Pictures of 4, 5, 6, 8 or 9 drawn objects, and of 3, 7 or 10."""
    every = counting_task([3, 4, 5, 6, 7, 8, 9, 10], images=100, seed=seed)
    return take_classes(every, [1, 2, 3, 5, 6], "seen counts"), take_classes(every, [0, 4, 7], "unseen counts")


def choice(bench: Workbench, seed: int) -> tuple[Task, Task]:
    """Questions about drawn circles and squares, and about triangles."""
    every = multiple_choice(images=60, seed=seed)
    third = [number for number, name in enumerate(every.classes) if name.endswith("triangle")]
    others = [number for number in range(len(every.classes)) if number not in third]
    return take_classes(every, others, "two shapes"), take_classes(every, third, "the third shape")


MADE: dict[str, Callable[[Workbench, int], tuple[Task, Task]]] = {
    "typographic attacks": typographic,
    "counting": counting,
    "multiple choice": choice,
}
UNSEEN = (f"{SUPPORTED}, base", f"{PATCHED}, base", SUPPORTED, PATCHED, "unseen, base", "unseen")


def unseen_jobs(bench: Workbench) -> Iterator[Job]:
    """One patch for every experiment."""
    for seed in bench.seeds:
        for row in MADE:
            yield Job(row, UNSEEN, seed, partial(_unseen, bench, row, seed))


def _unseen(bench: Workbench, row: str, seed: int) -> Figures:
    first, second = MADE[row](bench, seed)
    words = replace(vocabulary(bench), templates=("{}",)) if row == "multiple choice" else vocabulary(bench)
    painting = _painted(bench, first, words, seed)
    base, after = (
        100 * transfer_accuracy(bench.backbone(), patch, words, second)
        for patch in (painting.patch.at_strength(0), painting.patch)
    )
    return {**_before_and_after(painting), "unseen, base": base, "unseen": after}


def _painted(
    bench: Workbench, data: Task, words: Vocabulary | None, seed: int, exploration: PaintSettings | None = None
) -> Painting:
    """PAINT on one task, the scale's supported one held; linear probes without words."""
    exploration = replace(exploration or PaintSettings(), steps=bench.scale.options["alphas"])
    kept, heads = bench.task(bench.scale.options["supported"]), None if words is None else words.head
    settings = {"method": bench.method(PATCHED), "exploration": exploration, **bench.settings(data, seed)}
    return paint(bench.backbone(), data, kept, heads=heads, **settings)


# between data sets ------------------------------------------------------------------------------------------------------


def pair_jobs(bench: Workbench) -> Iterator[Job]:
    """The base, and a patch for every data set, tested on the other ones."""
    for seed in bench.seeds:
        for name in names(bench):
            others = tuple(other for other in names(bench) if other != name)
            yield Job(f"patched on {name}", others, seed, partial(_pairs, bench, name, others, seed, 1.0))
            yield Job(f"patched on {name}, base", others, seed, partial(_pairs, bench, name, others, seed, 0.0))


def _pairs(bench: Workbench, name: str, others: tuple[str, ...], seed: int, strength: float) -> Figures:
    words = vocabulary(bench)
    painting = bench.latest("pair", (name, seed), lambda: _painted(bench, bench.task(name), words, seed))
    patch = painting.patch if strength else painting.patch.at_strength(0)
    return {one: 100 * transfer_accuracy(bench.backbone(), patch, words, bench.task(one)) for one in others}


# closed vocabularies ----------------------------------------------------------------------------------------------------

WAYS = {
    "naive": PaintSettings(rule="harmonic", naive=True),
    "frozen probe": PaintSettings(rule="harmonic"),
    "frozen probe, fitted again": PaintSettings(rule="harmonic", refit=True),
    "frozen probe, statistics of all tasks": PaintSettings(rule="harmonic", norms="shared"),
    "frozen probe, statistics of each task": PaintSettings(rule="harmonic", norms="task"),
    "naive, statistics of each task": PaintSettings(rule="harmonic", naive=True, norms="task"),
}


def closed_jobs(bench: Workbench) -> Iterator[Job]:
    """Every way to answer a closed vocabulary."""
    for seed in bench.seeds:
        for row in WAYS:
            yield Job(row, (SUPPORTED, PATCHED, MEAN, "harmonic mean"), seed, partial(_closed, bench, row, seed))


def _closed(bench: Workbench, row: str, seed: int) -> Figures:
    chosen = _painted(bench, bench.task(names(bench)[0]), None, seed, WAYS[row]).chosen
    means = {role: 100 * chosen.mean(role) for role in ("supported", "patched")}
    return {
        SUPPORTED: means["supported"],
        PATCHED: means["patched"],
        MEAN: 100 * chosen.combined(),
        "harmonic mean": harmonic_mean(*means.values()),
    }


# sizes of networks ------------------------------------------------------------------------------------------------------


def family_jobs(bench: Workbench) -> Iterator[Job]:
    """A row for every backbone of the scale."""
    columns = (PATCHED, SUPPORTED, "distance to the optimum", "CKA, %", "cosine of weights, %")
    for seed in bench.seeds:
        for number, spec in enumerate(bench.scale.backbones):
            yield Job(spec.rpartition(":")[2], columns, seed, partial(_family, bench, number, seed))


def _family(bench: Workbench, number: int, seed: int) -> Figures:
    data, kept = bench.task(names(bench)[0]), bench.task(bench.scale.options["supported"])
    painting = paint(
        bench.backbone(number), data, kept, method=cast(Paint, bench.method(PATCHED)), **bench.settings(data, seed)
    )
    return {
        PATCHED: 100 * painting.chosen.mean("patched"),
        SUPPORTED: 100 * painting.chosen.mean("supported"),
        "distance to the optimum": 100 * painting.distance,
        "CKA, %": 100 * painting.cka,
        "cosine of weights, %": 100 * painting.cosine,
    }


def _recipe(table: str, title: str, jobs: Callable[[Workbench], Iterator[Job]], **changes: object) -> Recipe:
    scale = replace(MOBILENET, **changes)  # type: ignore[arg-type]
    return Recipe(
        paper="paint",
        table=table,
        title=title,
        section=SECTION,
        notes=NOTES,
        scales={"mobilenet": scale},
        claims=(),
        jobs=jobs,
        unit="%",
    )


EXPERIMENTS = (
    _recipe("unseen", "Patched on some classes, tested on others", unseen_jobs, data=("caltech101", "imagenette"),
            options={**MOBILENET.options, "supported": "caltech101"}),
    _recipe("pairs", "Patched on one data set, tested on the others", pair_jobs, 
            data=("imagenette", "gtsrb", "mnist", "rsscn7")),
    _recipe("closed", "Ways to answer a closed vocabulary", closed_jobs),
    _recipe("families", "Networks of several sizes", family_jobs,
            backbones=(*MOBILENET.backbones, "timm:resnet18.tv_in1k", "timm:resnet50.tv_in1k")),
)  # fmt: skip
