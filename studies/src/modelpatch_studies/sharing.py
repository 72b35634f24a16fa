"""One network for several resolutions or tasks: what is shared, and what each has of its own.

    multi-resolution   scale, bias and statistics private to a resolution, beside sharing all and sharing nothing
    cascade            the private patches of those resolutions in turns, beside the best of them alone
    multi-task         scale, bias and head private to a task, beside heads alone and networks of their own

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning* (ICLR
2019), whose settings are those of `normalisation.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from modelpatch import cascade
from modelpatch.methods import FullFinetune
from modelpatch.recipes import MultiResolution, fit_multires, fit_multitask
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import short
from modelpatch_studies.normalisation import RMSPROP, SLIM
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale, mobilenet

PRIVATE, SHARED, INDEPENDENT = "private S/B", "all shared", "independent"
SHARINGS = {PRIVATE: "private", SHARED: "shared", INDEPENDENT: "independent"}
MOBILENET = ("timm:mobilenetv2_100.ra_in1k",)
SEVERAL_SIZES = {name: value for name, value in SLIM.items() if name != "image_size"}


def at_real_scales(rows: Iterable[str], **options: Any) -> dict[str, Scale]:
    """Four tasks over an ImageNet MobileNetV2, a fifth of the images held out."""
    tasks = {
        "": ("gtsrb", (32, 48, 64), 0.001, 6, None),
        "-digits": ("mnist", (32, 48, 64), 0.001, 4, None),
        "-photos": ("imagenette", (64, 96, 128), 0.0001, 4, None),
        "-few": ("imagenette", (48, 64, 96), 0.0003, 5, 800),
    }
    return {
        f"mobilenet{more}": mobilenet(
            data=(name,),
            methods=dict.fromkeys(rows, f"full-finetune(lr={rate},statistics=learned)"),
            fit={"epochs": epochs, "validation": 0.2},
            images=images,
            options={"resolutions": resolutions, **options},
        )
        for more, (name, resolutions, rate, epochs, images) in tasks.items()
    }


def at_resolutions(bench: Workbench, sharing: str, seed: int) -> MultiResolution:
    """The scale's first data set at its resolutions."""
    data, method = bench.task(bench.scale.data[0]), bench.method(sharing)
    assert isinstance(method, FullFinetune)
    resolutions, settings = bench.scale.options["resolutions"], bench.settings(data, seed)
    return fit_multires(bench.backbone(), data, resolutions, sharing=SHARINGS[sharing], method=method, **settings)


# resolutions --------------------------------------------------------------------------------------------------------------


def resolution_jobs(bench: Workbench) -> Iterator[Job]:
    """One training a way of sharing."""
    columns = tuple(str(pixels) for pixels in bench.scale.options["resolutions"])
    for seed in bench.seeds:
        for row in bench.scale.methods:
            yield Job(row, columns, seed, partial(_resolutions, bench, row, seed))


def _resolutions(bench: Workbench, row: str, seed: int) -> Figures:
    return {str(pixels): 100 * top1 for pixels, top1 in at_resolutions(bench, row, seed).top1.items()}


RESOLUTIONS = Recipe(
    paper="k-for-1",
    table="multi-resolution",
    title="One network at several resolutions",
    section="section 5.4: multiple resolutions",
    notes="A step sees the same images at all resolutions; the head is shared. The paper trains from random weights.",
    numeric=True,
    scales={
        "small": Scale(
            data=("rsscn7",),
            backbones=("bundled:tiny",),
            methods=dict.fromkeys(SHARINGS, "full-finetune(lr=0.001,statistics=learned)"),
            fit={"batch_size": 32, "augment": "light"},
            seeds=2,
            images=430,
            tested=350,
            steps=32,
            options={"resolutions": (32, 48, 64)},
        ),
        "paper": Scale(
            data=("imagenet",),
            backbones=MOBILENET,
            methods=dict.fromkeys(SHARINGS, f"full-finetune(lr=0.045,statistics=learned,{RMSPROP})"),
            fit=SEVERAL_SIZES,
            seeds=3,
            steps=200_000,
            options={"resolutions": (96, 128, 160, 192, 224)},
        ),
        **at_real_scales(SHARINGS),
    },
    claims=(
        Claim(
            "K6", "private scale and bias are above sharing all", ((PRIVATE, SHARED),), "+7.7 at 96 px to +1.2 at 224"
        ),
        Claim("K6", "and come near independent networks", ((PRIVATE, INDEPENDENT),), "within a point", margin=-1),
    ),
    jobs=resolution_jobs,
)


# the cascade --------------------------------------------------------------------------------------------------------------

CASCADE, BEST = "cascade", "best resolution alone"
TOP1, COST = "top-1", "cost of the best, %"
RULES: Mapping[str, Mapping[str, Any]] = {CASCADE: {"confidence": "fitted", "caution": 0.0}}
ALL_RULES: Mapping[str, Mapping[str, Any]] = {
    CASCADE: {"caution": 0.0},  # thresholds as in the paper
    f"{CASCADE}, cautious": {},
    f"{CASCADE}, cautious and fitted": {"confidence": "fitted"},
}


def cascade_jobs(bench: Workbench) -> Iterator[Job]:
    """The cascade and the reference that it is held to."""
    for seed in bench.seeds:
        for row in (*bench.scale.options.get("rules", RULES), BEST):
            yield Job(row, (TOP1, COST), seed, partial(_cascaded, bench, row, seed))


def _cascaded(bench: Workbench, row: str, seed: int) -> Figures:
    def build() -> dict[str, Figures]:
        made, data = at_resolutions(bench, PRIVATE, seed), bench.task(bench.scale.data[0])
        named = {f"{pixels} px": patch for pixels, patch in made.patches.items()}
        rules = bench.scale.options.get("rules", RULES)
        found = {row: cascade(made.backbone, named, data, seed=seed, **rule) for row, rule in rules.items()}
        result = next(iter(found.values()))
        alone = next(single for single in result.singles if single.name == result.reference).test.top1
        rows = {row: {TOP1: 100 * one.test.top1, COST: 100 * (1 - one.saved)} for row, one in found.items()}
        return {**rows, BEST: {TOP1: 100 * alone, COST: 100.0}}

    return bench.latest("cascade", seed, build)[row]


RESOLUTION_CASCADE = Recipe(
    paper="k-for-1",
    table="cascade",
    title="A cascade of one network's resolutions",
    section="section 5.4: model cascades",
    unit="%",
    notes=(
        "Thresholds are set on a fifth of the training images, which nothing trains on, so that accuracy there is that of "
        "the best resolution; figures are of test images. Cost counts multiply-adds."
    ),
    scales={
        "small": Scale(
            data=("rsscn7",),
            backbones=("bundled:tiny",),
            methods={PRIVATE: "full-finetune(lr=0.001,statistics=learned)"},
            fit={"batch_size": 32, "augment": "light", "validation": 0.2},
            seeds=2,
            tested=350,
            steps=80,
            options={"resolutions": (32, 48, 64)},
        ),
        "paper": Scale(
            data=("imagenet",),
            backbones=MOBILENET,
            methods={PRIVATE: f"full-finetune(lr=0.045,statistics=learned,{RMSPROP})"},
            fit={**SEVERAL_SIZES, "validation": 0.05},
            seeds=3,
            steps=200_000,
            options={"resolutions": (96, 128, 160, 192, 224)},
        ),
        **at_real_scales([PRIVATE], rules=ALL_RULES),
    },
    claims=(
        Claim("K7", "the cascade costs less than the best resolution", ((BEST, CASCADE),), "-15.2 %", columns=(COST,)),
        Claim("K7", "and is within a point of it", ((CASCADE, BEST),), "equal accuracy", margin=-1, columns=(TOP1,)),
    ),
    jobs=cascade_jobs,
)


# tasks --------------------------------------------------------------------------------------------------------------------

HEADS, PATCHES, OWN = "shared, own last layers", "shared, own S/B and last layers", "independent"


def task_jobs(bench: Workbench) -> Iterator[Job]:
    """One training of all tasks for each private patch, and a network for each task."""
    for seed in bench.seeds:
        columns = tuple(short(name) for name in bench.scale.data)
        for row in (HEADS, PATCHES):
            yield Job(row, columns, seed, partial(_together, bench, row, seed))
        for name in bench.scale.data:
            yield Job(OWN, (short(name),), seed, partial(_alone, bench, name, seed))


def _together(bench: Workbench, row: str, seed: int) -> Figures:
    """Rounds of one batch a task, about as many as the fit of a task alone has steps."""
    tasks = [bench.task(name) for name in bench.scale.data]
    settings = bench.settings(max(tasks, key=lambda data: len(data.train)), seed)
    shared = bench.scale.options["shared"]
    result = fit_multitask(bench.backbone(), tasks, bench.method(row), shared=shared, **settings)
    return {name: 100 * patch.metrics["test_top1"] for name, patch in result.patches.items()}


def _alone(bench: Workbench, name: str, seed: int) -> Figures:
    return {short(name): bench.accuracy(bench.backbone(), bench.task(name), bench.method(OWN), seed)}


TASKS = Recipe(
    paper="k-for-1",
    table="multi-task",
    title="Several tasks trained together",
    section="section 5.3: multi-task learning",
    notes=(
        "The paper trains ImageNet and Places together from random weights, with workers that write as they come; here a "
        "round takes a batch of every task, over pretrained weights, whose statistics stay: in so few rounds others cannot "
        "be learned."
    ),
    scales={
        "small": Scale(
            data=("rsscn7", "gtsrb", "imagenette"),
            backbones=("bundled:tiny",),
            methods={
                HEADS: "linear-probe(solver=steps)",
                PATCHES: "scale-bias(lr=0.001)",
                OWN: "full-finetune(lr=0.001,statistics=learned)",
            },
            fit={"image_size": 32, "batch_size": 32, "augment": "light"},
            seeds=2,
            images=430,
            tested=300,
            steps=60,
            options={"shared": "full-finetune(lr=0.001)"},
        ),
        "paper": Scale(
            data=("imagenet", "places365"),
            backbones=MOBILENET,
            methods={
                HEADS: f"linear-probe({RMSPROP})",
                PATCHES: f"scale-bias(statistics=learned,lr=0.045,{RMSPROP})",
                OWN: f"full-finetune(lr=0.045,statistics=learned,{RMSPROP})",
            },
            fit=SLIM,
            seeds=3,
            steps=200_000,
            options={"shared": f"full-finetune(lr=0.045,{RMSPROP})"},
        ),
        **{
            f"mobilenet{more}": mobilenet(
                data=("imagenette", "gtsrb"),
                methods={
                    HEADS: "linear-probe(solver=steps)",
                    PATCHES: "scale-bias(lr=0.001)",
                    OWN: f"full-finetune(lr={rate})",
                },
                fit={"image_size": 64, "epochs": 5},
                images=1200,
                options={"shared": f"full-finetune(lr={rate})"},
            )
            for more, rate in (("", 0.0003), ("-slow", 0.0001))
        },
    },
    claims=(
        Claim(
            "K5",
            "own scale and bias are above own last layers",
            ((PATCHES, HEADS),),
            "+5.8 and +2.9",
            doubt="Likely because three small tasks hardly compete for the shared weights in 60 steps.",
        ),
        Claim("K5", "and come near independent networks", ((PATCHES, OWN),), "within 1.6", margin=-1.6),
    ),
    jobs=task_jobs,
)
