"""PAINT: weights between the base's and the fine-tuned ones, and three ways to patch several tasks.

    curve            one task patched: accuracies along alpha, and at the alpha that held-out images choose
    modes            several tasks patched jointly, one after another, in parallel; one after another without interpolation
    transfer         half of the classes patched, the other half tested
    supported-sets   alpha as different supported sets choose it

Ilharco et al.: *Patching open-vocabulary models by interpolating weights* (NeurIPS 2022). Its recipe: AdamW at 1e-5, weight
decay 0.1, batches of 128, 2,000 steps of which 200 warm up, cosine, under heads that class names make and that stay.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from modelpatch import Task, paint
from modelpatch.heads import CosineHead
from modelpatch.methods import Paint, Vocabulary, vocabulary_of
from modelpatch.recipes import Painting, PaintSettings, Point, Rule
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import names, short
from modelpatch_studies.made_tasks import split_classes
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale, mobilenet

SUPPORTED, PATCHED, MEAN, CHOSEN = "supported", "patched", "mean of both", "mean of both, alpha chosen"
JOINT, SEQUENTIAL, PARALLEL, PLAIN = "joint", "sequential", "parallel", "sequential, no interpolation"
JOINTLY = PaintSettings(mode="joint")
SCALE = 100.0  # of cosines, as of words in CLIP
EXPLORATIONS = {
    JOINT: JOINTLY,
    SEQUENTIAL: PaintSettings(mode="sequential"),
    PARALLEL: PaintSettings(mode="parallel"),
    PLAIN: PaintSettings(mode="sequential", interpolate=False),
}
CLOSED = (
    "Heads are linear probes of the base's features that stay, not class names in a text tower, and BatchNorm's statistics "
    "are the base's: PAINT for a closed vocabulary. Alpha is chosen on a fifth of the training images."
)
SMALL = Scale(
    data=("imagenette", "gtsrb", "rsscn7"),
    backbones=("bundled:tiny",),
    methods={PATCHED: "paint"},
    fit={"image_size": 32, "batch_size": 32, "augment": "light"},
    seeds=2,
    images=430,
    tested=300,
    steps=60,
    options={"supported": "imagenette", "alphas": 11},
)
PAPER = Scale(
    data=("imagenet", "stanford_cars", "dtd", "eurosat", "gtsrb", "kitti", "mnist", "resisc45", "sun397", "svhn"),
    backbones=("openclip:ViT-L-14/openai",),
    methods={PATCHED: "paint(lr=0.00001,weight_decay=0.1)"},
    fit={"batch_size": 128, "warmup": 0.1, "clip": 1.0, "augment": "none"},
    seeds=3,
    steps=2000,
    options={"supported": "imagenet", "alphas": 11},
)


WORDS: Mapping[str, str] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
BY_WORDS = {"supported": "imagenette", "alphas": 11, "heads": "words", "text": "minilm"}
MOBILENET = mobilenet(
    data=("imagenette", "gtsrb"),
    methods={PATCHED: "paint(lr=0.0003)"},
    fit={"image_size": 96, "epochs": 8},
    images=400,
    options=BY_WORDS,
)


def vocabulary(bench: Workbench) -> Vocabulary:
    """Heads of words from the backbone's own text tower, or from the sentence encoder that the scale names."""
    text = bench.scale.options.get("text", "own")
    return vocabulary_of(bench.backbone(), text, words=None if text == "own" else WORDS)


def painted(
    bench: Workbench,
    patched: tuple[str, ...],
    exploration: PaintSettings,
    seed: int,
    supported: Sequence[Task] = (),
) -> Painting:
    """PAINT on some data sets, the scale's supported one held, or those given."""
    tasks = [bench.task(name) for name in patched]
    longest = max(tasks, key=lambda data: len(data.train))
    settings = bench.settings(longest, seed)
    method = cast(Paint, bench.method(PATCHED))
    kept = supported or [bench.task(bench.scale.options["supported"])]
    exploration = replace(exploration, steps=bench.scale.options["alphas"])
    heads = vocabulary(bench).head if bench.scale.options.get("heads") == "words" else None
    return paint(bench.backbone(), tasks, kept, method=method, heads=heads, exploration=exploration, **settings)


# the curve --------------------------------------------------------------------------------------------------------------


def curve_jobs(bench: Workbench) -> Iterator[Job]:
    """The rows of one curve, which is the mean of those of every data set."""
    columns = tuple(f"{alpha:g}" for alpha in np.linspace(0, 1, bench.scale.options["alphas"]).round(6))
    for seed in bench.seeds:
        for row in (SUPPORTED, PATCHED, MEAN, CHOSEN):
            yield Job(row, columns, seed, partial(_row, bench, row, columns, seed))


def _row(bench: Workbench, row: str, columns: tuple[str, ...], seed: int) -> Figures:
    curves = bench.latest("curves", seed, lambda: [_curve(bench, name, seed) for name in names(bench)])
    sums = [[curve[row][place] for curve in curves] for place in range(len(columns))]
    return {column: 100 * sum(values) / len(values) for column, values in zip(columns, sums, strict=True)}


def _curve(bench: Workbench, name: str, seed: int) -> dict[str, list[float]]:
    """Accuracies along alpha by row; the chosen one is as high everywhere."""
    painting = painted(bench, (name,), JOINTLY, seed)
    points = painting.curve
    return {
        SUPPORTED: [point.mean("supported") for point in points],
        PATCHED: [point.mean("patched") for point in points],
        MEAN: [point.combined() for point in points],
        CHOSEN: [painting.chosen.combined()] * len(points),
    }


CURVE = Recipe(
    paper="paint",
    table="curve",
    title="Supported and patched accuracy along alpha",
    section="section 4: patching on a single task",
    notes=f"{CLOSED} The chosen alpha is drawn as a line of one height. Curves are means over the patched tasks.",
    numeric=True,
    scales={
        "small": SMALL,
        "paper": PAPER,
        "mobilenet": MOBILENET,
        "mobilenet-digits": replace(MOBILENET, data=("imagenette", "mnist"), images=600),
        "mobilenet-closed": replace(MOBILENET, options={"supported": "imagenette", "alphas": 11}),
    },
    claims=(
        Claim(
            "I1",
            "the chosen mixture is above the base",
            ((CHOSEN, MEAN),),
            "+15 to +60 on the patched task for at most 1 on supported ones",
            columns=("0",),
            small=True,
        ),
        Claim(
            "I7",
            "the chosen mixture is at least as good as fine-tuning",
            ((CHOSEN, MEAN),),
            "on every task",
            columns=("1",),
            small=True,
            doubt="Alpha is chosen on held-out images, 1 among the choices: on test images it can be below by what that errs.",
        ),
    ),
    jobs=curve_jobs,
)


# several tasks ------------------------------------------------------------------------------------------------------------


def mode_jobs(bench: Workbench) -> Iterator[Job]:
    """Every way to patch all tasks."""
    for seed in bench.seeds:
        for row in EXPLORATIONS:
            yield Job(row, (SUPPORTED, PATCHED, MEAN), seed, partial(_mode, bench, row, seed))


def _mode(bench: Workbench, row: str, seed: int) -> Figures:
    chosen = painted(bench, names(bench), EXPLORATIONS[row], seed).chosen
    return {
        SUPPORTED: 100 * chosen.mean("supported"),
        PATCHED: 100 * chosen.mean("patched"),
        MEAN: 100 * chosen.combined(),
    }


MODES = Recipe(
    paper="paint",
    table="modes",
    title="Several tasks patched jointly, one after another and in parallel",
    section="section 5: patching on several tasks",
    notes=f"{CLOSED} One order of tasks a seed; the paper takes three. Parallel patches get one alpha.",
    scales={
        "small": replace(SMALL, images=300, tested=250, steps=40, options={"supported": "imagenette", "alphas": 6}),
        "paper": PAPER,
        "mobilenet": replace(
            MOBILENET, data=("imagenette", "gtsrb", "mnist", "rsscn7"), fit={"image_size": 64, "epochs": 8}
        ),
    },
    claims=(
        Claim(
            "I4",
            "joint is at least as good as one after another, and that as parallel",
            ((JOINT, SEQUENTIAL), (SEQUENTIAL, PARALLEL)),
            "joint within 0.5 of specialists",
            columns=(MEAN,),
            small=True,
        ),
        Claim(
            "I5",
            "one after another without interpolation is worse than with",
            ((SEQUENTIAL, PLAIN),),
            "-4.6 to +11 for ViT-B/32",
            columns=(MEAN,),
            small=True,
        ),
    ),
    jobs=mode_jobs,
)


# classes that were not patched ----------------------------------------------------------------------------------------------

HALF_BASE, HALF_PATCHED = "patched half, base", "patched half, patched"
OTHER_BASE, OTHER_PATCHED = "other half, base", "other half, patched"


def transfer_jobs(bench: Workbench) -> Iterator[Job]:
    """One patch for half of every data set's classes; each seed draws halves of its own."""
    for seed in bench.seeds:
        for name in names(bench):
            for row in (HALF_BASE, HALF_PATCHED, OTHER_BASE, OTHER_PATCHED):
                yield Job(row, (short(name),), seed, partial(_transferred, bench, row, name, seed))


def _transferred(bench: Workbench, row: str, name: str, seed: int) -> Figures:
    found = bench.latest("transfer", (name, seed), lambda: transferred(bench, name, seed))
    return {short(name): 100 * found[row]}


def transferred(bench: Workbench, name: str, seed: int) -> dict[str, float]:
    """Top-1 in [0, 1] by row, each half answered among its own classes."""
    first, second = split_classes(bench.task(name), seed)
    supported = bench.task(bench.scale.options["supported"])
    heads = open_heads(bench, (first, second, supported), seed)
    exploration = PaintSettings(steps=bench.scale.options["alphas"])
    method = cast(Paint, bench.method(PATCHED))
    settings = bench.settings(first, seed)
    painting = paint(
        bench.backbone(), first, supported, method=method, heads=heads, exploration=exploration, **settings
    )
    reader, labels = bench.reader(bench.backbone(), seed), torch.from_numpy(second.test.labels)
    model, head = bench.backbone().patched(painting.patch), heads(second.classes).cpu()
    found = {
        row: float((head(features).argmax(1) == labels).double().mean())
        for row, features in (
            (OTHER_BASE, reader.base_features(second.test)),
            (OTHER_PATCHED, reader.features(model, second.test)),
        )
    }
    return {
        HALF_BASE: painting.base.mean("patched"),
        HALF_PATCHED: painting.chosen.mean("patched"),
        **found,
    }


def open_heads(bench: Workbench, tasks: Sequence[Task], seed: int) -> Callable[[Sequence[str]], CosineHead]:
    """Heads of any of these tasks' classes that nothing trains: of words, or of the means of the base's features.

    Means are of features of unit length over a class's training images; what all of them have in common is taken away.
    """
    if bench.scale.options["heads"] == "words":
        return vocabulary(bench).head
    reader, means = bench.reader(bench.backbone(), seed), {}
    for data in tasks:
        features, labels = F.normalize(reader.base_features(data.train), dim=1), torch.from_numpy(data.train.labels)
        means.update({name: features[labels == number].mean(0) for number, name in enumerate(data.classes)})
    middle = torch.stack(list(means.values())).mean(0)

    def head(classes: Sequence[str]) -> CosineHead:
        rows = F.normalize(torch.stack([means[name] for name in classes]) - middle, dim=1)
        made = CosineHead(rows.shape[1], len(rows))
        with torch.no_grad():
            made.weight.copy_(SCALE * rows)
        return made.to(bench.device).eval().requires_grad_(False)

    return head


TRANSFER = Recipe(
    paper="paint",
    table="transfer",
    title="Half of the classes patched, the other half tested",
    section="section 6: broad transfer",
    notes=(
        "Each half is answered among its own classes by heads that nothing trains: of words at the paper's scale, at the "
        "small one of the nearest mean of the base's features over a class's training images, because the bundled backbone "
        "knows ten words."
    ),
    scales={
        "small": replace(
            SMALL,
            data=("imagenette", "gtsrb", "mnist", "dtd10"),
            images=600,
            options={"supported": "imagenette", "alphas": 6, "heads": "means"},
        ),
        "paper": replace(PAPER, options={**PAPER.options, "heads": "words"}),
        "mobilenet": replace(MOBILENET, data=("imagenette", "gtsrb", "mnist", "rsscn7", "dtd10")),
    },
    claims=(
        Claim(
            "I6",
            "patching half of the classes improves the other half",
            ((OTHER_PATCHED, OTHER_BASE),),
            "9 of 9 splits",
            doubt="Likely because heads at the small scale are means of the base's features, which the patched network gives "
            "no longer; the paper's are of words, over a network that knows thousands.",
        ),
        Claim("control", "and the patched half", ((HALF_PATCHED, HALF_BASE),), "", small=True),
    ),
    jobs=transfer_jobs,
)


# what must be supported -----------------------------------------------------------------------------------------------------

SETS = ("first supported set", "second supported set", "third supported set")
EVERY = "all three supported sets"
ALPHA, OVERALL = "alpha, %", "mean of patched and all supported, %"


def supported_jobs(bench: Workbench) -> Iterator[Job]:
    """The alpha that each supported set chooses, and all of them; means over the patched tasks."""
    for seed in bench.seeds:
        for row in (*SETS, EVERY):
            yield Job(row, (ALPHA, OVERALL), seed, partial(_supported, bench, row, seed))


def _supported(bench: Workbench, row: str, seed: int) -> Figures:
    """One painting a patched task, whose mixtures every supported set chooses from on its own held-out images."""
    supported = bench.scale.options["sets"]
    patched = [name for name in bench.scale.data if name not in supported]
    sources = [bench.task(name) for name in supported]
    paintings = bench.latest("paintings", seed, lambda: [painted(bench, (n,), JOINTLY, seed, sources) for n in patched])
    kept = supported if row == EVERY else (supported[SETS.index(row)],)
    tasks = [bench.task(name).task.name for name in kept]
    points = [choose_for(one.curve, one.base, str(one.settings.rule), tasks) for one in paintings]
    return {
        ALPHA: 100 * statistics.fmean(point.weights[0] for point in points),
        OVERALL: 100 * statistics.fmean(point.combined() for point in points),
    }


def choose_for(curve: Sequence[Point], base: Point, rule: str, supported: Sequence[str]) -> Point:
    """The point of the curve, or the base, that the rule chooses if only these tasks are supported."""

    def without(point: Point) -> Point:
        tasks = {name: one for name, one in point.tasks.items() if one.role == "patched" or name in supported}
        return replace(point, tasks=tasks)

    seen = [without(point) for point in curve]
    chosen = Rule.parse(rule).choose(seen, without(base))
    return base if chosen not in seen else curve[seen.index(chosen)]


STABLE = Recipe(
    paper="paint",
    table="supported-sets",
    title="Alpha as different supported sets choose it",
    section="appendix: other supported tasks",
    unit="%",
    notes=(
        f"{CLOSED} The supported sets are, in this order, the first three data sets; alphas are means over the patched tasks "
        "and have ten values above 0. Near is taken as two of them."
    ),
    scales={
        "small": replace(
            SMALL,
            data=("imagenette", "pacs_photo", "dtd10", "gtsrb", "rsscn7"),
            tested=200,
            options={"sets": ("imagenette", "pacs_photo", "dtd10"), "alphas": 11},
        ),
        "paper": replace(
            PAPER,
            data=("imagenet", "cifar100", "stl10", *PAPER.data[1:]),
            options={"sets": ("imagenet", "cifar100", "stl10"), "alphas": 11},
        ),
        "mobilenet": replace(
            MOBILENET,
            data=("imagenette", "caltech101", "dtd10", "gtsrb"),
            options={**BY_WORDS, "sets": ("imagenette", "caltech101", "dtd10")},
        ),
    },
    claims=(
        Claim(
            "I8",
            "every supported set chooses an alpha near that of all",
            tuple(pair for row in SETS for pair in ((row, EVERY), (EVERY, row))),
            "stable",
            margin=-20,
            columns=(ALPHA,),
        ),
        Claim(
            "I8",
            "and what it chooses is within a point of what all choose",
            tuple((row, EVERY) for row in SETS),
            "",
            margin=-1,
            columns=(OVERALL,),
        ),
    ),
    jobs=supported_jobs,
)
