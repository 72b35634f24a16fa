"""PAINT: weights between the base's and the fine-tuned ones, and three ways to patch several tasks.

    curve      one task patched: supported, patched and mean accuracy along alpha, and at the alpha that held-out images choose
    modes      several tasks patched jointly, one after another, in parallel; one after another without interpolation

Ilharco et al.: *Patching open-vocabulary models by interpolating weights* (NeurIPS 2022). Its recipe: AdamW at 1e-5, weight
decay 0.1, batches of 128, 2,000 steps of which 200 warm up, cosine, under heads that class names make and that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import cast

from modelpatch.methods import Paint
from modelpatch.reproduce.bench import Bench
from modelpatch.reproduce.parts import names
from modelpatch.reproduce.recipe import Claim, Figures, Part, Recipe, Scale
from modelpatch.train import Painting, PaintSettings, paint
from modelpatch.train.tradeoff import alphas

SUPPORTED, PATCHED, MEAN, CHOSEN = "supported", "patched", "mean of both", "mean of both, alpha chosen"
JOINT, SEQUENTIAL, PARALLEL, PLAIN = "joint", "sequential", "parallel", "sequential, no interpolation"
EXPLORATIONS = {
    JOINT: PaintSettings(mode="joint"),
    SEQUENTIAL: PaintSettings(mode="sequential"),
    PARALLEL: PaintSettings(mode="parallel"),
    PLAIN: PaintSettings(mode="sequential", interpolate=False),
}
CLOSED = (
    "Heads are linear probes of the base's features that stay, not class names in a text tower, and BatchNorm's statistics "
    "are the base's: PAINT for a closed vocabulary. Alpha is chosen on a fifth of the training images."
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


def painted(bench: Bench, patched: tuple[str, ...], exploration: PaintSettings, seed: int) -> Painting:
    """PAINT on some data sets, the scale's supported one held."""
    tasks = [bench.task(name) for name in patched]
    longest = max(tasks, key=lambda data: len(data.train))
    settings = bench.settings(longest, seed)
    method = cast(Paint, bench.method(PATCHED))
    supported = bench.task(bench.scale.options["supported"])
    exploration = replace(exploration, steps=bench.scale.options["alphas"])
    return paint(bench.backbone(), tasks, supported, method=method, exploration=exploration, **settings)


# the curve --------------------------------------------------------------------------------------------------------------


def curve_parts(bench: Bench) -> Iterator[Part]:
    """The rows of one curve, which is the mean of those of every data set."""
    columns = tuple(f"{alpha:g}" for alpha in alphas(bench.scale.options["alphas"]))
    for seed in bench.seeds:
        for row in (SUPPORTED, PATCHED, MEAN, CHOSEN):
            yield Part(row, columns, seed, partial(_row, bench, row, columns, seed))


def _row(bench: Bench, row: str, columns: tuple[str, ...], seed: int) -> Figures:
    curves = bench.latest("curves", seed, lambda: [_curve(bench, name, seed) for name in names(bench)])
    sums = [[curve[row][place] for curve in curves] for place in range(len(columns))]
    return {column: 100 * sum(values) / len(values) for column, values in zip(columns, sums, strict=True)}


def _curve(bench: Bench, name: str, seed: int) -> dict[str, list[float]]:
    """Accuracies along alpha by row; the chosen one is as high everywhere."""
    painting = painted(bench, (name,), PaintSettings(mode="joint"), seed)
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
        "small": Scale(
            data=("imagenette", "gtsrb", "rsscn7"),
            backbones=("bundled:tiny",),
            methods={PATCHED: "paint"},
            fit={"image_size": 32, "batch_size": 32, "augment": "light"},
            seeds=2,
            images=430,
            tested=300,
            steps=60,
            options={"supported": "imagenette", "alphas": 11},
        ),
        "paper": PAPER,
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
        ),
    ),
    parts=curve_parts,
)


# several tasks ------------------------------------------------------------------------------------------------------------


def mode_parts(bench: Bench) -> Iterator[Part]:
    """Every way to patch all tasks."""
    for seed in bench.seeds:
        for row in EXPLORATIONS:
            yield Part(row, (SUPPORTED, PATCHED, MEAN), seed, partial(_mode, bench, row, seed))


def _mode(bench: Bench, row: str, seed: int) -> Figures:
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
        "small": Scale(
            data=("imagenette", "gtsrb", "rsscn7"),
            backbones=("bundled:tiny",),
            methods={PATCHED: "paint"},
            fit={"image_size": 32, "batch_size": 32, "augment": "light"},
            seeds=2,
            images=300,
            tested=250,
            steps=40,
            options={"supported": "imagenette", "alphas": 6},
        ),
        "paper": PAPER,
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
    parts=mode_parts,
)
