"""Δ-Networks, the skips themselves: what weighs them, what they learn to weigh, and what that costs.

    table-5         learned, unit and random weights, with and without norms, beside Δ-modules
    skip-weights    the mean λ that trained Δ-modules give every skip of every stage
    size            parameters and file bytes of one, two and four Δ-modules beside the backbone's

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 5 and the analyses around it: 50 epochs, all four
stages. Where its ablations put their BatchNorm it does not say; here it normalises every sum before its activation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from modelpatch.methods import SkipWeights, skip_weights
from modelpatch.patch import BackboneRecord
from modelpatch.tasks import TaskRecord
from modelpatch_studies.backbones import untrained_patch
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import each, names, top1
from modelpatch_studies.patching import FOUR, ONE, PROBE, TWO
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale

CARS_TO_STL = ("stanford_cars", "dtd", "flowers102", "fgvc_aircraft", "cub200", "stl10")

# Table 5 ------------------------------------------------------------------------------------------------------------

EXISTING, ALL, LEARNED, RANDOM = "learnable skips", "all skips", "all skips learnable", "random skips + BN"
ALL_NORM, LEARNED_NORM, FOUR_NORM = f"{ALL} + BN", f"{LEARNED} + BN", f"{FOUR} + BN"
UNCHANGED = "unchanged skips + BN"
NUMBERS = "lr=0.03"  # one number a skip or a channel
ABLATIONS = {
    PROBE: "linear-probe(solver=steps)",
    EXISTING: f"delta(modules=4,skips=existing,{NUMBERS})",
    ALL: "delta(modules=4,skips=all)",
    ALL_NORM: "delta(modules=4,skips=all,batch_norm=true)",
    LEARNED: f"delta(modules=4,skips=learned,{NUMBERS})",
    LEARNED_NORM: f"delta(modules=4,skips=learned,batch_norm=true,{NUMBERS},norm_lr=0.03)",
    FOUR: "delta(modules=4)",
    FOUR_NORM: "delta(modules=4,batch_norm=true)",
    UNCHANGED: "delta(modules=4,skips=unchanged,batch_norm=true)",
    RANDOM: "delta(modules=4,skips=random,batch_norm=true)",
}

TABLE_5 = Recipe(
    paper="delta-networks",
    table="table-5",
    title="What weighs the skips: ablations beside Δ-modules",
    section="Table 5",
    notes=(
        "The paper does not say where its ablations have their BatchNorm: here it is on every node's sum, before the "
        "activation. Random skips are drawn anew for every image in every pass, and have that BatchNorm. Unchanged skips with "
        "it are a control of ours: what those norms do without any new wiring. Numbers that weigh skips or channels learn at "
        "0.03, Δ-modules at 0.003. 'Far' below is 5 points here; the paper gives no number."
    ),
    scales={
        "small": Scale(
            data=("mnist", "rsscn7"),
            backbones=("bundled:tiny",),
            methods=ABLATIONS,
            fit={"image_size": 32, "batch_size": 16, "augment": "light"},
            seeds=2,
            images=700,
            tested=350,
            steps=200,
        ),
        "paper": Scale(
            data=CARS_TO_STL,
            backbones=("timm:resnet18.tv_in1k",),
            methods=ABLATIONS,
            fit={"epochs": 50, "batch_size": 128, "augment": "standard"},
            seeds=3,
        ),
    },
    claims=(
        Claim(
            "D4",
            "Δ-modules are above every ablation without BN",
            ((FOUR, EXISTING), (FOUR, ALL), (FOUR, LEARNED)),
            "on all sets",
            small=True,
            doubt="Skips that all weigh 1 are near Δ-modules, above them on one data set and below on the other.",
        ),
        Claim(
            "D5",
            "BN on the sums helps",
            ((ALL_NORM, ALL), (LEARNED_NORM, LEARNED), (FOUR_NORM, FOUR)),
            "above the same without",
            small=True,
        ),
        Claim(
            "D6",
            "random skips are far below unit ones",
            ((ALL_NORM, RANDOM),),
            "far below all skips + BN",
            margin=5,
            small=True,
        ),
        Claim(
            "control",
            "Δ-modules + BN are above BN on unchanged skips",
            ((FOUR_NORM, UNCHANGED),),
            "",
            doubt="What BN on the sums gains is largely a scale and bias of every channel, which the control has too.",
        ),
        Claim(
            "control",
            "new skips + BN are above BN on unchanged skips",
            ((ALL_NORM, UNCHANGED), (LEARNED_NORM, UNCHANGED)),
            "",
        ),
    ),
    jobs=each(top1),
)


# learned weights ----------------------------------------------------------------------------------------------------

MEAN, LOWEST = "mean", "lowest skip before the last stage"


def weight_jobs(bench: Workbench) -> Iterator[Job]:
    """A row for every stage, columns for the mean of its skips and for each (i, j); all of a seed from the same fits."""
    depths = bench.scale.options["depths"]
    for seed in bench.seeds:
        for number, depth in enumerate(depths):
            columns = (MEAN, *(_arrow((i, j)) for j in range(1, depth + 1) for i in range(j)))
            yield Job(_stage(number), columns, seed, partial(_stage_weights, bench, number, seed))
        yield Job(LOWEST, (MEAN,), seed, partial(_lowest, bench, seed))


def _stage(number: int) -> str:
    return f"stage {number + 1}"


def _arrow(edge: tuple[int, int]) -> str:
    return f"{edge[0]}→{edge[1]}"


Weights = list[dict[str, float]]  # mean λ in percent of every skip, stage by stage


def _weights(bench: Workbench, seed: int) -> list[Weights]:
    """Mean weights of the skips over each task's test images."""

    def measure(name: str) -> Weights:
        data, backbone = bench.task(name), bench.backbone()
        model = backbone.patched(bench.fit(backbone, data, bench.method(FOUR), seed))
        batches = [skip_weights(model, images) for images, _ in bench.reader(backbone, seed).images(data.test)]
        records = [SkipWeights.join(stage) for stage in zip(*batches, strict=True)]
        means = [100 * record.weights.mean(0) for record in records]
        return [dict(zip(map(_arrow, r.edges), m.tolist(), strict=True)) for r, m in zip(records, means, strict=True)]

    return bench.latest("skip weights", seed, lambda: [measure(name) for name in names(bench)])


def _stage_weights(bench: Workbench, number: int, seed: int) -> Figures:
    """The means over tasks of a stage's weights, and of all of them."""
    own = [weights[number] for weights in _weights(bench, seed)]
    found = {edge: statistics.fmean(weights[edge] for weights in own) for edge in own[0]}
    return {**found, MEAN: statistics.fmean(found.values())}


def _lowest(bench: Workbench, seed: int) -> Figures:
    """The lowest weight of any skip before the last stage, a mean over tasks."""
    lowest = [min(min(stage.values()) for stage in weights[:-1]) for weights in _weights(bench, seed)]
    return {MEAN: statistics.fmean(lowest)}


WEIGHTS = Recipe(
    paper="delta-networks",
    table="skip-weights",
    title="What Δ-modules learn to weigh: mean λ of every skip",
    section="the figure of mean λ",
    unit="mean λ, %",
    notes=(
        "Means over the test images, then over the tasks, each of which has Δ-modules of its own. i→i+1 is a skip that the "
        "network has, weighed 100 % there; all others are new, 0 % there; untrained Δ-modules weigh all about 50 %. 'Near 1' "
        "and 'near 0' are 80 points apart here; the paper gives no number."
    ),
    scales={
        "small": Scale(
            data=("mnist", "rsscn7"),
            backbones=("bundled:tiny",),
            methods={FOUR: "delta(modules=4)"},
            fit={"image_size": 32, "batch_size": 16, "augment": "light"},
            seeds=2,
            images=700,
            tested=350,
            steps=300,
            options={"depths": (2, 2, 3, 1)},
        ),
        "paper": Scale(
            data=CARS_TO_STL,
            backbones=("timm:resnet18.tv_in1k",),
            methods={FOUR: "delta(modules=4)"},
            fit={"epochs": 50, "batch_size": 128, "augment": "standard"},
            seeds=3,
            options={"depths": (2, 2, 2, 2)},
        ),
    },
    claims=(
        Claim(
            "D12",
            "the last stage weighs its skips more than each before it",
            tuple((_stage(3), _stage(number)) for number in range(3)),
            "near 1 in the last stage",
            columns=(MEAN,),
        ),
        Claim(
            "D12",
            "the last stage is near 1, some skip before it near 0",
            ((_stage(3), LOWEST),),
            "near 1 in the last stage, some near 0 before",
            margin=80,
            columns=(MEAN,),
            doubt="Weights start at a half and move toward both ends; 300 steps do not take them there.",
        ),
    ),
    jobs=weight_jobs,
)


# size ---------------------------------------------------------------------------------------------------------------

BACKBONE, LIMIT, SHARE = "backbone", "31 % of the backbone", 0.31


def size_jobs(bench: Workbench) -> Iterator[Job]:
    """The backbone, the paper's bound and every number of Δ-modules, for every network of the scale."""
    for seed in bench.seeds:
        for number, spec in enumerate(bench.scale.backbones):
            name = spec.rpartition(":")[2].partition(".")[0]
            yield Job(BACKBONE, (name, f"{name}, file"), seed, partial(_backbone_size, bench, number, name))
            yield Job(LIMIT, (name,), seed, partial(_limit, bench, number, name))
            for row in bench.scale.methods:
                yield Job(row, (name, f"{name}, file"), seed, partial(_patch_size, bench, number, name, row))


def _backbone_size(bench: Workbench, number: int, name: str) -> Figures:
    """Thousands of parameters without those of the classifier, kilobytes with them."""
    backbone = bench.backbone(number)
    record = BackboneRecord.of(backbone)
    classifier = [] if backbone.classifier is None else backbone.module.get_submodule(backbone.classifier).parameters()
    own = record.parameters - sum(parameter.numel() for parameter in classifier)
    return {name: own / 1000, f"{name}, file": record.bytes / 1000}


def _limit(bench: Workbench, number: int, name: str) -> Figures:
    return {name: SHARE * _backbone_size(bench, number, name)[name]}


def _patch_size(bench: Workbench, number: int, name: str, row: str) -> Figures:
    """Thousands of parameters without those of the head, kilobytes of the file with them."""
    backbone, method = bench.backbone(number), bench.method(row)
    classes = tuple(map(str, range(bench.scale.options["classes"])))
    size = untrained_patch(backbone, TaskRecord(name="size", classes=classes), method).inspect().file_bytes
    return {name: method.count_parameters(backbone) / 1000, f"{name}, file": size / 1000}


MODULES = {ONE: "delta(modules=1)", TWO: "delta(modules=2)", FOUR: "delta(modules=4)"}
PRINTED = {  # millions of parameters of Δ(1), Δ(2), Δ(4)
    "resnet18": (0.4, 0.6, 0.6),
    "resnet34": (0.4, 0.6, 0.6),
    "resnet50": (7.1, 8.9, 9.3),
    "resnet101": (7.1,),
    "convnext_tiny": (4.0, 5.0, 5.3),
    "convnext_small": (4.0,),
    "convnext_base": (7.1,),
    "convnext_large": (15.9,),
}

SIZE = Recipe(
    paper="delta-networks",
    table="size",
    title="How large Δ-modules are beside the backbone",
    section="the tables' columns of parameters",
    unit="1,000 parameters; kB of file",
    notes=(
        "Nothing is trained, and seeds agree: sizes follow from shapes, and the networks of the paper's scale have random "
        "weights, so that none is downloaded. Parameters are counted without last layers, files with them, and a patch's "
        "has one of 100 classes. The paper prints millions to one decimal."
    ),
    scales={
        "small": Scale(
            data=(), backbones=("bundled:tiny",), methods=MODULES, fit={}, seeds=2, options={"classes": 100}
        ),
        "paper": Scale(
            data=(),
            backbones=tuple(f"timm:{name}.{'tv' if 'resnet' in name else 'fb'}_in1k" for name in PRINTED),
            methods=MODULES,
            fit={},
            seeds=2,
            options={"classes": 100, "pretrained": False},
        ),
    },
    claims=(
        Claim(
            "D7",
            "one Δ-module has at most 31 % of the backbone's parameters",
            ((LIMIT, ONE),),
            "2 to 31 %",
            small=True,
        ),
    ),
    jobs=size_jobs,
    published={
        (row, name): 1000 * millions
        for name, printed in PRINTED.items()
        for row, millions in zip(MODULES, printed, strict=False)
    },
    logarithmic=True,
)
