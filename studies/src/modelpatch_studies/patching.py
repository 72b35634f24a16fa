"""Δ-Networks beside PAINT: one task patched with the base's own kept, and several tasks, one after another or jointly.

    HM = 2 a b / (a + b)        a top-1 on the base's task, b on the patched one

Rows that leave the base as it is, Δ-modules and the linear probe, have its whole accuracy as a. PAINT gives some of it up:
`naive` trains its head along, as the paper's baseline does, `fair` has the linear probe's, which stays.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 2: 50 epochs, Δ and the last layer trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

from modelpatch import evaluate, paint
from modelpatch.data import accuracy_by_task, join_tasks
from modelpatch.methods import Paint
from modelpatch.recipes import PaintSettings
from modelpatch.tasks import Evaluation
from modelpatch.train import harmonic_mean
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import each, names, short, top1
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale

PROBE, NAIVE, FAIR = "linear probe", "PAINT, naive", "PAINT, fair"
ONE, TWO, FOUR = "Δ(1)", "Δ(2)", "Δ(4)"


def base_top1(bench: Workbench, name: str, seed: int) -> float:
    """Top-1 in percent of the untouched base on its own task, as PAINT scores it."""
    data, supported = bench.task(name), bench.task(bench.scale.options["supported"])

    def score() -> float:
        exploration = PaintSettings(steps=2)
        settings = {**bench.settings(data, seed), "epochs": 1}
        return 100 * paint(bench.backbone(), data, supported, exploration=exploration, **settings).base.mean(
            "supported"
        )

    return bench.latest("base", seed, score)


def measure(bench: Workbench, row: str, name: str, seed: int) -> float:
    """The harmonic mean of both tasks, in percent."""
    if row not in (NAIVE, FAIR):
        return harmonic_mean(base_top1(bench, name, seed), top1(bench, row, name, seed))
    data, supported = bench.task(name), bench.task(bench.scale.options["supported"])
    exploration = PaintSettings(rule="harmonic", naive=row == NAIVE, steps=bench.scale.options["alphas"])
    settings = bench.settings(data, seed)
    method = cast(Paint, bench.method(row))
    chosen = paint(bench.backbone(), data, supported, method=method, exploration=exploration, **settings).chosen
    return 100 * harmonic_mean(chosen.mean("supported"), chosen.mean("patched"))


TABLE_2 = Recipe(
    paper="delta-networks",
    table="table-2",
    title="Δ-modules beside PAINT: harmonic mean of the base's and the patched task",
    section="Table 2: single-task patching",
    unit="harmonic mean, %",
    notes=(
        "The base's task is answered by the base's own classifier, or where that has other classes by a linear probe of its "
        "features, under every row. The naive baseline falls behind because its head is trained at alpha 1; the fair one and "
        "the linear probe stand beside it. Learning rates are unstated in the paper."
    ),
    scales={
        "small": Scale(
            data=("imagenette", "gtsrb", "rsscn7"),
            backbones=("bundled:tiny",),
            methods={
                PROBE: "linear-probe(solver=steps)",
                NAIVE: "paint",
                FAIR: "paint",
                ONE: "delta(modules=1)",
                TWO: "delta(modules=2)",
                FOUR: "delta(modules=4)",
            },
            fit={"image_size": 32, "batch_size": 32, "augment": "light"},
            seeds=2,
            images=430,
            tested=250,
            steps=200,
            options={"supported": "imagenette", "alphas": 6},
        ),
        "paper": Scale(
            data=("imagenet", "stanford_cars", "dtd", "flowers102", "fgvc_aircraft", "cub200", "stl10"),
            backbones=("timm:resnet18.tv_in1k",),
            methods={
                PROBE: "linear-probe(solver=steps)",
                NAIVE: "paint(lr=0.00001,weight_decay=0.1)",
                FAIR: "paint(lr=0.00001,weight_decay=0.1)",
                ONE: "delta(modules=1)",
                TWO: "delta(modules=2)",
                FOUR: "delta(modules=4)",
            },
            fit={"epochs": 50, "batch_size": 128, "augment": "standard"},
            seeds=3,
            options={"supported": "imagenet", "alphas": 11},
        ),
    },
    claims=(
        Claim(
            "D2",
            "one Δ-module is above naive PAINT",
            ((ONE, NAIVE),),
            "on all sets; ResNet-18 to ConvNeXt",
            doubt="Likely because one module weighs only the skips of the last stage, of which the bundled network has one.",
        ),
        Claim("control", "one Δ-module is above fair PAINT", ((ONE, FAIR),), "", doubt="As for naive PAINT."),
        Claim(
            "D3",
            "more modules are at least as good",
            ((FOUR, TWO), (TWO, ONE)),
            "on average",
            small=True,
            doubt="Likely because four modules start from skips of a half in every stage and take the most steps.",
        ),
    ),
    jobs=each(measure),
)


# several tasks ------------------------------------------------------------------------------------------------------------

IN_TURN, JOINTLY = "one after another", "jointly"


def several_jobs(bench: Workbench) -> Iterator[Job]:
    """Every method in both ways, all tasks at once."""
    columns = tuple(short(name) for name in names(bench))
    for seed in bench.seeds:
        for row in bench.scale.methods:
            for way, work in ((IN_TURN, _in_turn), (JOINTLY, _jointly)):
                yield Job(f"{row}, {way}", columns, seed, partial(work, bench, row, seed))


def _in_turn(bench: Workbench, row: str, seed: int) -> Figures:
    """Top-1 in percent of every task's own patch; the call names the task, and no patch changes what others answer."""
    return {short(name): top1(bench, row, name, seed) for name in names(bench)}


def _jointly(bench: Workbench, row: str, seed: int) -> Figures:
    """Top-1 in percent by task of one patch whose head answers all classes of all tasks."""
    data = join_tasks([bench.task(name) for name in names(bench)])
    patch = bench.fit(bench.backbone(), data, bench.method(row), seed)
    measured = cast(Evaluation, evaluate(bench.backbone(), patch, data))
    found = accuracy_by_task(measured, data) or {data.task.name: measured.top1}
    return {short(name): 100 * value for name, value in zip(names(bench), found.values(), strict=True)}


SEVERAL = Recipe(
    paper="delta-networks",
    table="several-tasks",
    title="Several tasks patched one after another and jointly",
    section="sequential and joint patching",
    notes=(
        "One after another every task has Δ-modules and a last layer of its own, and the call says which task it asks; no "
        "patch changes another. Jointly there is one patch, whose head answers all classes of all tasks."
    ),
    scales={
        "small": Scale(
            data=("gtsrb", "rsscn7"),
            backbones=("bundled:tiny",),
            methods={PROBE: "linear-probe(solver=steps)", ONE: "delta(modules=1)", FOUR: "delta(modules=4)"},
            fit={"image_size": 32, "batch_size": 32, "augment": "light"},
            seeds=2,
            images=430,
            tested=250,
            steps=200,
        ),
        "paper": Scale(
            data=("stanford_cars", "dtd", "flowers102", "fgvc_aircraft", "cub200", "stl10"),
            backbones=("timm:resnet18.tv_in1k",),
            methods={PROBE: "linear-probe(solver=steps)", ONE: "delta(modules=1)", FOUR: "delta(modules=4)"},
            fit={"epochs": 50, "batch_size": 128, "augment": "standard"},
            seeds=3,
        ),
    },
    claims=(
        Claim(
            "row 12",
            "tasks patched one after another are above joint ones",
            ((f"{ONE}, {IN_TURN}", f"{ONE}, {JOINTLY}"), (f"{FOUR}, {IN_TURN}", f"{FOUR}, {JOINTLY}")),
            "the task is known, and nothing is forgotten",
        ),
        Claim(
            "row 12",
            "Δ-modules are above linear probes",
            ((f"{FOUR}, {IN_TURN}", f"{PROBE}, {IN_TURN}"), (f"{FOUR}, {JOINTLY}", f"{PROBE}, {JOINTLY}")),
            "on the mean of the tasks",
        ),
    ),
    jobs=several_jobs,
)
