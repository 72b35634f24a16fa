"""Transfer learning with an unfrozen backbone: Δ-modules beside full fine-tuning, from few images and from none before.

    low-data       15, 30, 50 and 100 % of the training images: Δ trained with the network, and on top of the fine-tuned one
    table-7        losses that hold a network to what it was, each with and without Δ: L2-SP, DELTA, BSS, LwF, a contrast
    from-scratch   random weights, trained with and without Δ

Devaguptapu et al.: *Δ-Networks for Efficient Model Patching* (2023), Table 7 and the experiments around it, in the protocol of
the transfer learning library TLL: SGD with Nesterov's momentum 0.9, rate 0.01 (0.001 for the backbone), weight decay 5e-4,
batches of 48, 10,000 steps, a tenth of the rate after 60 % of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

from modelpatch import Backbone, Task
from modelpatch.methods import L2, Custom, Hook, LinearProbe, LwF, Method, with_loss
from modelpatch_studies.backbones import retrained
from modelpatch_studies.bench import Workbench
from modelpatch_studies.jobs import each, top1_over_random
from modelpatch_studies.losses import BSS, DELTA, contrast_classes
from modelpatch_studies.recipe import Claim, Figures, Job, Recipe, Scale

FINE = ("cub200", "stanford_cars", "fgvc_aircraft")
RATES = (15, 30, 50, 100)  # percent
SGD = "optimizer=sgd,weight_decay=0.0005,head_lr=0.01"
TLL = {"batch_size": 48, "schedule": "step", "drops": (0.6,), "warmup": 0.0, "augment": "standard", "cache": False}
TUNED, JOINT, TOP, HEAD = "fine-tuning", "fine-tuning + Δ", "fine-tuned, then Δ", "fine-tuned, then a head"


def sample(data: Task, percent: int, seed: int) -> Task:
    """The task with this share of every class's training images."""
    return data.subsample(round(len(data.train) * percent / 100), seed)


def _column(bench: Workbench, name: str, percent: int) -> str:
    return f"{percent} %" if len(bench.scale.data) == 1 else f"{name} {percent} %"


# few images ---------------------------------------------------------------------------------------------------------


def low_data_jobs(bench: Workbench) -> Iterator[Job]:
    """The fits of every data set and share of its images; what goes on top of the fine-tuned network shares that one."""
    for seed, name, percent in itertools.product(bench.seeds, bench.scale.data, bench.scale.options["rates"]):
        column = _column(bench, name, percent)
        for row in bench.scale.methods:
            yield Job(row, (column,), seed, partial(_low_data, bench, row, name, percent, seed, column))


def _low_data(bench: Workbench, row: str, name: str, percent: int, seed: int, column: str) -> Figures:
    backbone, data = bench.backbone(), sample(bench.task(name), percent, seed)

    def tune() -> tuple[Backbone, float]:
        patch = bench.fit(backbone, data, bench.method(TUNED), seed)
        return retrained(backbone, patch), 100 * patch.metrics["test_top1"]

    tuned, top1 = bench.latest("tuned", (name, percent, seed), tune) if row != JOINT else (backbone, 0.0)
    if row == TUNED:
        return {column: top1}
    return {column: bench.accuracy(tuned, data, bench.method(row), seed)}


UNFROZEN = (
    "Likely because an unfrozen network of this size gains nothing from weighing its few skips: all its weights move."
)


LOW_DATA = Recipe(
    paper="delta-networks",
    table="low-data",
    title="Δ-modules beside and on top of full fine-tuning, from 15 to 100 % of the images",
    section="transfer learning; Table 7's sampling rates",
    notes=(
        "A fine-tuned network that gets Δ-modules on top is frozen then and trains as long again; the same with a head alone "
        "says how much of it is the longer training. Figures are of the last epoch, not of the best on the test images."
    ),
    scales={
        "small": Scale(
            data=("rsscn7",),
            backbones=("bundled:tiny",),
            methods={
                TUNED: "full-finetune(lr=0.001)",
                JOINT: "full-finetune(lr=0.001)+delta(modules=4,start=identity)",
                TOP: "delta(modules=4,start=identity)",
                HEAD: "linear-probe(solver=steps)",
            },
            fit={"batch_size": 32, "image_size": 32, "augment": "light"},
            seeds=3,
            steps=60,
            options={"rates": RATES},
        ),
        "paper": Scale(
            data=FINE,
            backbones=("timm:resnet50.tv_in1k",),
            methods={
                TUNED: f"full-finetune(lr=0.001,statistics=learned,{SGD})",
                JOINT: f"full-finetune(lr=0.001,statistics=learned,{SGD})+delta(modules=4,lr=0.01,{SGD})",
                TOP: f"delta(modules=4,lr=0.01,{SGD})",
                HEAD: f"linear-probe({SGD})",
            },
            fit=TLL,
            seeds=3,
            steps=10_000,
            options={"rates": RATES},
        ),
    },
    claims=(
        Claim(
            "D8",
            "Δ-modules in an unfrozen network are at least as good",
            ((JOINT, TUNED),),
            "80.2 → 85.3",
            doubt=UNFROZEN,
        ),
        Claim(
            "D8",
            "Δ-modules on top of a fine-tuned network are at least as good",
            ((TOP, TUNED),),
            "",
            doubt=UNFROZEN,
        ),
        Claim(
            "control",
            "Δ-modules on top are at least as good as as many steps for a new head",
            ((TOP, HEAD),),
            "",
            doubt="Likely because, once the network is fine-tuned, weighing its few skips anew changes little.",
        ),
    ),
    jobs=low_data_jobs,
    numeric=True,
)


# losses -------------------------------------------------------------------------------------------------------------

HOSTS = ("fine-tuning", "L2-SP", "DELTA", "BSS", "LwF", "contrast")


def loss_jobs(bench: Workbench) -> Iterator[Job]:
    """A fit for every data set, share of its images, host and kind of network."""
    for seed, name, percent in itertools.product(bench.seeds, bench.scale.data, bench.scale.options["rates"]):
        column = _column(bench, name, percent)
        for host, kind in itertools.product(HOSTS, bench.scale.methods):
            row = host if kind == "network" else f"{host} + Δ"
            yield Job(row, (column,), seed, partial(_with_host, bench, host, kind, name, percent, seed, column))


def _with_host(bench: Workbench, host: str, kind: str, name: str, percent: int, seed: int, column: str) -> Figures:
    backbone, data = bench.backbone(), sample(bench.task(name), percent, seed)
    method: Method = bench.method(kind)
    keeper = keepers(bench, backbone, data, seed).get(host)
    return {column: bench.accuracy(backbone, data, with_loss(method, keeper()) if keeper else method, seed)}


def keepers(bench: Workbench, backbone: Backbone, data: Task, seed: int) -> dict[str, Callable[[], Hook]]:
    """Makers of each host's loss, at usual strengths."""
    reader = bench.reader(backbone, seed)

    def delta() -> Hook:
        probe = backbone.patched(bench.fit(backbone, data, LinearProbe(solver="steps"), seed)).head
        return DELTA(backbone, probe, lambda: reader.images(data.train, bench.batch_size, shuffle=True))

    def lwf() -> Hook:
        assert backbone.classifier is not None
        own = nn.Sequential(nn.Flatten(), backbone.module.get_submodule(backbone.classifier))
        return LwF(4.0, [own], temperature=4.0)

    return {
        "L2-SP": lambda: L2(0.01, head_strength=0.01),
        "DELTA": delta,
        "BSS": lambda: BSS(0.001),
        "LwF": lwf,
        "contrast": lambda: Custom(contrast_classes),
    }


TABLE_7 = Recipe(
    paper="delta-networks",
    table="table-7",
    title="Δ-modules beside losses of transfer learning",
    section="Table 7",
    notes=(
        "Bi-Tuning's host is a contrast of classes within the batch, without its queue, projection and slowly moving copy. "
        "LwF softens both answers with temperature 4 and keeps the base's own classifier frozen. The "
        "strengths are usual ones, not the paper's, which states none: 0.01 for L2-SP and DELTA, 0.001 for BSS, 4 for LwF."
    ),
    scales={
        "small": Scale(
            data=("rsscn7",),
            backbones=("bundled:tiny",),
            methods={
                "network": "full-finetune(lr=0.001)",
                "network + Δ": "full-finetune(lr=0.001)+delta(modules=4,start=identity)",
            },
            fit={"batch_size": 32, "image_size": 32, "augment": "light"},
            seeds=3,
            steps=50,
            options={"rates": (30,)},
        ),
        "paper": Scale(
            data=FINE,
            backbones=("timm:resnet50.tv_in1k",),
            methods={
                "network": f"full-finetune(lr=0.001,statistics=learned,{SGD})",
                "network + Δ": f"full-finetune(lr=0.001,statistics=learned,{SGD})+delta(modules=4,lr=0.01,{SGD})",
            },
            fit=TLL,
            seeds=3,
            steps=10_000,
            options={"rates": RATES},
        ),
    },
    claims=(
        Claim(
            "D8",
            "Δ-modules on every host are at least as good as the host alone",
            tuple((f"{host} + Δ", host) for host in HOSTS),
            "80.2 → 85.3 for fine-tuning",
            doubt=UNFROZEN,
        ),
    ),
    jobs=loss_jobs,
)


# random weights -----------------------------------------------------------------------------------------------------


SCRATCH = Recipe(
    paper="delta-networks",
    table="from-scratch",
    title="Training from scratch with and without Δ-modules",
    section="training from scratch",
    notes="The paper states no optimizer for these runs; its scale takes that of Table 7, at 0.01 for all weights.",
    scales={
        "small": Scale(
            data=("mnist", "rsscn7"),
            backbones=("bundled:tiny",),
            methods={
                "network": "full-finetune(lr=0.003,statistics=learned)",
                "network + Δ": "full-finetune(lr=0.003,statistics=learned)+delta(modules=4)",
            },
            fit={"batch_size": 32, "image_size": 32, "augment": "light"},
            seeds=3,
            steps=150,
            images=700,
            tested=350,
        ),
        "paper": Scale(
            data=FINE,
            backbones=("timm:resnet50.tv_in1k",),
            methods={
                "network": f"full-finetune(lr=0.01,statistics=learned,{SGD})",
                "network + Δ": f"full-finetune(lr=0.01,statistics=learned,{SGD})+delta(modules=4,lr=0.01,{SGD})",
            },
            fit=TLL,
            seeds=3,
            steps=10_000,
        ),
    },
    claims=(
        Claim(
            "D11",
            "Δ-modules help a network that is trained from scratch",
            (("network + Δ", "network"),),
            "+0.3 to +11",
            doubt="Likely because so short a training is slowed by what is learned besides: the paper's has 50 epochs of "
            "thousands of images.",
        ),
    ),
    jobs=each(top1_over_random),
)
