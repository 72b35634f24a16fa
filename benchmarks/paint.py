"""PAINT on real images with a real open-vocabulary model: MobileNetV2, whose head is made of words by a sentence encoder.

    curve         the trade-off over alpha for one task, with imagenette and caltech101 supported; picture and table
    modes         three tasks: joint, sequential (several orders), parallel (scalar, search), and specialists
    split         patch on half of the classes, test on the other half, for several data sets
    pairs         patch on one data set, test on the others
    supported     alpha that different supported sets choose
    frontier      early stopping, EMA, L2, EWC, LwF, mixing, learning rates beside the alpha-curve
    closed        the same curve with a closed vocabulary: naive, frozen probe, refit, statistics measured again
    families      several backbones: distance to optimal, CKA and weight cosine
    typographic   photos with the wrong words, patched on them
    counting      some counts of drawn objects patched, the others tested
    choice        questions with a choice of answers as prompts

    python benchmarks/paint.py curve --task gtsrb --json benchmarks/results/paint_curve.json --plot docs/paint-curve.png

The sentence encoder comes with the extra `minilm`. `--images N` takes at most N training and N test images of every task.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import modelpatch as mp
from common import mobilenet, report, unpack
from modelpatch.data.task import Task
from modelpatch.methods.paint import Paint
from modelpatch.methods.vocabulary import Vocabulary, read_words, vocabulary_of
from modelpatch.recipes.frontier import BASELINES, frontier
from modelpatch.recipes.painting import Painting, PaintSettings
from modelpatch.recipes.tradeoff import Point
from modelpatch.report.paint import plot_tradeoff
from modelpatch.train import harmonic_mean
from modelpatch_studies.made_tasks import (
    counting_task,
    multiple_choice,
    split_classes,
    take_classes,
    transfer_accuracy,
    write_words,
)

SUPPORTED = ("imagenette", "caltech101")
THREE = ("gtsrb", "mnist", "rsscn7")
SPLITS = ("gtsrb", "mnist", "rsscn7", "dtd10")
Rows = list[Sequence[Any]]


class Study:
    """The backbone, the vocabulary and the tasks that one run uses."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.backbone = mp.load_backbone(arguments.backbone or mobilenet())
        if arguments.device != "cpu":
            self.backbone.to(arguments.device)
        self.vocabulary: Vocabulary = vocabulary_of(
            self.backbone, arguments.text, arguments.template or (), read_words(Path(__file__).parent / "words.json")
        )
        self.settings: dict[str, Any] = {
            "epochs": arguments.epochs,
            "batch_size": arguments.batch_size,
            "image_size": arguments.image_size,
            "seed": arguments.seed,
        }
        self.method = Paint(lr=arguments.lr)

    def task(self, name: str) -> Task:
        """A real task by its name."""
        return self.small(mp.load_task(unpack(name, self.arguments.cache)))

    def small(self, data: Task) -> Task:
        """At most `--images` training and test images."""
        count = self.arguments.images
        if count is None:
            return data
        rows = np.random.default_rng(0).permutation(len(data.test))[:count]
        seen = {int(label) for label in data.test.labels[rows]}
        cut = replace(data.subsample(max(count, 2 * len(data.classes))), test=data.test.take(np.sort(rows)))
        return cut if seen else data

    def supported(self) -> list[Task]:
        return [self.task(name) for name in self.arguments.supported]

    def paint(self, tasks: Sequence[Task], supported: Sequence[Task] | None = None, **exploration: Any) -> Painting:
        """One PAINT run; heads of words unless `closed`."""
        heads = None if exploration.pop("closed", False) else self.vocabulary.head
        chosen = PaintSettings(**{"rule": self.arguments.rule, "steps": self.arguments.steps, **exploration})
        kept = self.supported() if supported is None else supported
        return mp.paint(
            self.backbone,
            tasks,
            kept,
            method=self.method,
            heads=heads,
            exploration=chosen,
            progress=True,
            **self.settings,
        )


def shares(*values: float) -> list[str]:
    """Percent with one digit."""
    return [f"{100 * value:.1f}" for value in values]


def row_of(name: str, painting: Painting) -> list[Any]:
    """Test accuracies before and at the chosen point."""
    base, chosen = painting.base, painting.chosen
    weights = ", ".join(f"{weight:.2f}" for weight in chosen.weights)
    means = (base.mean("patched"), chosen.mean("patched"), base.mean("supported"), chosen.mean("supported"))
    return [name, weights, *shares(*means, chosen.combined())]


CHOSEN = ("", "alpha", "patched before", "patched", "supported before", "supported", "combined")


def curve(study: Study) -> tuple[Sequence[str], Rows]:
    """One task over alpha."""
    painting = study.paint([study.task(study.arguments.task)])
    tasks = list(painting.chosen.tasks)

    def cells(point: Point) -> list[str]:
        return shares(*(point.tasks[task].test for task in tasks), point.mean("supported"), point.combined())

    rows: Rows = [["base", *cells(painting.base)]]
    rows += [[f"{p.weights[0]:g}" + " *" * (p is painting.chosen), *cells(p)] for p in painting.curve]
    print(f"distance to optimal {painting.distance:.4f}, CKA {painting.cka:.4f}, cosine {painting.cosine:.6f}")
    if study.arguments.plot:
        title = f"{study.arguments.task} on MobileNetV2 with a head of words"
        plot_tradeoff({"paint": painting.curve}, painting.base, painting.chosen, title, study.arguments.plot)
    return ("alpha", *tasks, "supported", "combined"), rows


def modes(study: Study) -> tuple[Sequence[str], Rows]:
    """Three tasks in every way."""
    tasks, kept = [study.task(name) for name in study.arguments.tasks], study.supported()
    rows: Rows = [row_of("joint", study.paint(tasks, kept))]
    for interpolate in (True, False):
        painting = study.paint(tasks, kept, mode="sequential", orders=study.arguments.orders, interpolate=interpolate)
        for order in painting.orders:
            name = f"sequential{'' if interpolate else ' without interpolation'}: {', '.join(order.tasks)}"
            cells = row_of(name, replace(painting, chosen=order.point))
            rows.append([cells[0], ", ".join(f"{alpha:g}" for alpha in order.alphas), *cells[2:]])
    for mixing in ("scalar", "search"):
        trials = study.arguments.trials
        painting = study.paint(tasks, kept, mode="parallel", mixing=mixing, trials=trials)
        rows.append(row_of(f"parallel, {mixing}", painting))
    rows += [row_of(f"specialist {task.task.name}", study.paint([task], kept, rule="drop=100")) for task in tasks]
    return CHOSEN, rows


def split(study: Study) -> tuple[Sequence[str], Rows]:
    """Patch on half A, test on half B."""
    rows: Rows = []
    for name in study.arguments.splits:
        for seed in range(study.arguments.seeds):
            first, second = split_classes(study.task(name), seed)
            painting = study.paint([first])
            base, patched = (
                transfer_accuracy(study.backbone, patch, study.vocabulary, second)
                for patch in (painting.patch.at_strength(0), painting.patch)
            )
            chosen = painting.chosen
            values = (painting.base.mean("patched"), chosen.mean("patched"), base, patched)
            rows.append([name, seed, f"{chosen.weights[0]:g}", *shares(*values, chosen.mean("supported"))])
    return ("data", "seed", "alpha", "half A before", "half A", "half B before", "half B", "supported"), rows


def pairs(study: Study) -> tuple[Sequence[str], Rows]:
    """Patch on one data set, test on the others."""
    rows: Rows = []
    tasks = {name: study.task(name) for name in study.arguments.tasks}
    for name, data in tasks.items():
        painting = study.paint([data])
        for other, target in tasks.items():
            if other != name:
                accuracy = partial(transfer_accuracy, study.backbone, vocabulary=study.vocabulary, data=target)
                rows.append([name, other, *shares(accuracy(painting.patch.at_strength(0)), accuracy(painting.patch))])
    return ("patched on", "tested on", "before", "after"), rows


def supported(study: Study) -> tuple[Sequence[str], Rows]:
    """Which alpha every supported set chooses."""
    data = study.task(study.arguments.task)
    sets = [*([one] for one in study.supported()), study.supported()]
    return CHOSEN, [row_of("+".join(one.task.name for one in kept), study.paint([data], kept)) for kept in sets]


def rivals(study: Study) -> tuple[Sequence[str], Rows]:
    """The alpha-curve beside what trades off while training."""
    chosen = PaintSettings(rule=study.arguments.rule, steps=study.arguments.steps)
    result = frontier(
        study.backbone,
        study.task(study.arguments.task),
        study.supported(),
        study.arguments.baselines,
        method=study.method,
        heads=study.vocabulary.head,
        exploration=chosen,
        progress=True,
        **study.settings,
    )
    if study.arguments.plot:
        plot_tradeoff(result.curves, result.base, None, f"{study.arguments.task}: trade-offs", study.arguments.plot)
    rows: Rows = [
        ["base", "", *shares(result.base.mean("patched"), result.base.mean("supported"), result.base.combined())]
    ]
    for name, points in result.curves.items():
        rows += [
            [name, f"{p.weights[0]:g}", *shares(p.mean("patched"), p.mean("supported"), p.combined())] for p in points
        ]
    return ("", "at", "patched", "supported", "combined"), rows


def closed(study: Study) -> tuple[Sequence[str], Rows]:
    """A closed vocabulary, from the naive way to the fair ones."""
    data, kept = study.task(study.arguments.task), [study.task("imagenette")]
    kinds: dict[str, dict[str, Any]] = {
        "naive": {"naive": True},
        "frozen probe": {},
        "frozen probe, refit": {"refit": True},
        "frozen probe, statistics of all tasks": {"norms": "shared"},
        "frozen probe, statistics of each task": {"norms": "task"},
        "naive, statistics of each task": {"naive": True, "norms": "task"},
    }
    rows: Rows = []
    for name, options in kinds.items():
        painting = study.paint([data], kept, closed=True, **{"rule": "harmonic", **options})
        rows.append(
            row_of(name, painting)
            + shares(harmonic_mean(painting.chosen.mean("patched"), painting.chosen.mean("supported")))
        )
    return (*CHOSEN, "harmonic mean"), rows


def families(study: Study) -> tuple[Sequence[str], Rows]:
    """The same study on backbones of other sizes (closed vocabulary, so that any classifier will do)."""
    rows: Rows = []
    for spec in study.arguments.backbones or [mobilenet()]:
        arguments = argparse.Namespace(**{**vars(study.arguments), "backbone": spec})
        other = Study(arguments)
        painting = other.paint([other.task(arguments.task)], [other.task("imagenette")], closed=True)
        size = sum(parameter.numel() for parameter in other.backbone.module.parameters())
        figures = (f"{100 * painting.distance:.2f}", f"{painting.cka:.4f}", f"{painting.cosine:.6f}")
        rows.append([spec.rpartition("/")[2], size, *row_of("", painting)[1:], *figures])
    return ("backbone", "parameters", *CHOSEN[1:], "distance to optimal", "CKA", "cosine"), rows


def typographic(study: Study) -> tuple[Sequence[str], Rows]:
    """Patch on imagenette with wrong words, test on half of its classes that were not patched as well."""
    photos = study.task("imagenette")
    words = {name: study.vocabulary.words.get(name, "") or _word(name) for name in photos.classes}
    first, second = split_classes(write_words(photos, words, seed=0))
    clean = [study.task("caltech101")]
    painting = study.paint([first], clean)
    base, patched = (
        transfer_accuracy(study.backbone, patch, study.vocabulary, second)
        for patch in (painting.patch.at_strength(0), painting.patch)
    )
    return (*CHOSEN, "other classes before", "other classes"), [row_of("typographic", painting) + shares(base, patched)]


def _word(name: str) -> str:
    from modelpatch.methods.vocabulary import spell

    return spell(name)


def counting(study: Study) -> tuple[Sequence[str], Rows]:
    """Patch on 4, 5, 6, 8, 9 objects, test on 3, 7, 10 among all counts of the test."""
    everything = study.small(counting_task([3, 4, 5, 6, 7, 8, 9, 10], images=100))
    seen, unseen = (
        take_classes(everything, [1, 2, 3, 5, 6], "seen counts"),
        take_classes(everything, [0, 4, 7], "unseen counts"),
    )
    painting = study.paint([seen])
    values = [
        transfer_accuracy(study.backbone, patch, study.vocabulary, unseen)
        for patch in (painting.patch.at_strength(0), painting.patch)
    ]
    return (*CHOSEN, "unseen counts before", "unseen counts"), [row_of("counting", painting) + shares(*values)]


def choice(study: Study) -> tuple[Sequence[str], Rows]:
    """Questions with a choice of answers: patched on two shapes, tested on the third as well."""
    asked = replace(study.vocabulary, templates=("{}",))
    data = study.small(multiple_choice(images=60))
    third = [number for number, name in enumerate(data.classes) if name.endswith("triangle")]
    others = [number for number in range(len(data.classes)) if number not in third]
    study.vocabulary = asked
    painting = study.paint([take_classes(data, others, "two shapes")])
    held = take_classes(data, third, "the third shape")
    values = [
        transfer_accuracy(study.backbone, p, asked, held) for p in (painting.patch.at_strength(0), painting.patch)
    ]
    return (*CHOSEN, "third shape before", "third shape"), [row_of("multiple choice", painting) + shares(*values)]


STUDIES: dict[str, Callable[[Study], tuple[Sequence[str], Rows]]] = {
    "curve": curve,
    "modes": modes,
    "split": split,
    "pairs": pairs,
    "supported": supported,
    "frontier": rivals,
    "closed": closed,
    "families": families,
    "typographic": typographic,
    "counting": counting,
    "choice": choice,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--task", default="gtsrb")
    parser.add_argument("--tasks", nargs="+", default=list(THREE))
    parser.add_argument("--splits", nargs="+", default=list(SPLITS))
    parser.add_argument("--supported", nargs="+", default=list(SUPPORTED))
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--backbone", help="default: the real MobileNetV2")
    parser.add_argument("--backbones", nargs="+", help="for families")
    parser.add_argument("--text", default="minilm")
    parser.add_argument("--template", action="append")
    parser.add_argument("--rule", default="drop=1")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40, help="mixtures that the search of parallel patching tries")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    columns, rows = STUDIES[arguments.study](Study(arguments))
    title = (
        f"{arguments.study}: {arguments.image_size} px, {arguments.epochs} epochs, rule {arguments.rule}, test top-1, %"
    )
    report(title, columns, rows, arguments.json)


if __name__ == "__main__":
    main()
