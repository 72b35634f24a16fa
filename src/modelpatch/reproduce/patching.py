"""The main table of Δ-Networks: one task patched, the base's own task kept.

    HM = 2 a b / (a + b)        a top-1 on the base's task, b on the patched one

Rows that leave the base as it is, Δ-modules and the linear probe, have its whole accuracy as a. PAINT gives some of it up:
`naive` trains its head along, as the paper's baseline does, `fair` has the linear probe's, which stays.

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 2: 50 epochs, Δ and the last layer trained.
"""

from __future__ import annotations

from typing import cast

from modelpatch.methods import Paint
from modelpatch.reproduce.bench import Bench
from modelpatch.reproduce.parts import each, top1
from modelpatch.reproduce.recipe import Claim, Recipe, Scale
from modelpatch.train import PaintSettings, harmonic_mean, paint
from modelpatch.train.paint import Painter

PROBE, NAIVE, FAIR = "linear probe", "PAINT, naive", "PAINT, fair"
ONE, TWO, FOUR = "Δ(1)", "Δ(2)", "Δ(4)"


def base_top1(bench: Bench, name: str, seed: int) -> float:
    """Top-1 in percent of the untouched base on its own task, as PAINT scores it."""
    data, supported = bench.task(name), bench.task(bench.scale.options["supported"])

    def score() -> float:
        settings = bench.settings(data, seed)
        painter = Painter(bench.backbone(), [data], [supported], Paint(), None, PaintSettings(), False, settings)
        return 100 * painter.base().mean("supported")

    return bench.latest("base", seed, score)


def measure(bench: Bench, row: str, name: str, seed: int) -> float:
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
                PROBE: "linear-probe",
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
            steps=50,
            options={"supported": "imagenette", "alphas": 6},
        ),
        "paper": Scale(
            data=("imagenet", "stanford_cars", "dtd", "flowers102", "fgvc_aircraft", "cub200", "stl10"),
            backbones=("timm:resnet18.tv_in1k",),
            methods={
                PROBE: "linear-probe",
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
        Claim("D2", "one Δ-module is above naive PAINT", ((ONE, NAIVE),), "on all sets; ResNet-18 to ConvNeXt"),
        Claim("control", "one Δ-module is above fair PAINT", ((ONE, FAIR),), ""),
        Claim("D3", "more modules are at least as good", ((FOUR, TWO), (TWO, ONE)), "on average", small=True),
    ),
    parts=each(measure),
)
