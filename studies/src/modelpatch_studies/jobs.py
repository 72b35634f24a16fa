"""Parts that many recipes share: every method of a scale, on every data set by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from modelpatch import Task, evaluate
from modelpatch.methods import Method
from modelpatch_studies.backbones import untrained
from modelpatch_studies.bench import Workbench
from modelpatch_studies.recipe import Figures, Job

Measure = Callable[[Workbench, str, str, int], float]  # a row, a data set and a seed to a figure


def short(name: str) -> str:
    """A data set's name in a table: `digits` for `bundled:digits`."""
    return name.rpartition(":")[2]


def names(bench: Workbench) -> tuple[str, ...]:
    """The scale's data sets but the one that is supported while others are patched, if there is one."""
    return tuple(name for name in bench.scale.data if name != bench.scale.options.get("supported"))


def each(measure: Measure, *more: str) -> Callable[[Workbench], Iterator[Job]]:
    """Parts of one figure for every data set and row: the scale's methods, and `more` rows."""

    def jobs(bench: Workbench) -> Iterator[Job]:
        for seed, name, row in itertools.product(bench.seeds, names(bench), (*bench.scale.methods, *more)):
            yield Job(row, (short(name),), seed, partial(_one, measure, bench, row, name, seed))

    return jobs


def _one(measure: Measure, bench: Workbench, row: str, name: str, seed: int) -> Figures:
    return {short(name): measure(bench, row, name, seed)}


def top1(bench: Workbench, row: str, name: str, seed: int) -> float:
    """Top-1 on the test images of the row's method, fitted."""
    return bench.accuracy(bench.backbone(), bench.task(name), bench.method(row), seed)


def top1_over_random(bench: Workbench, row: str, name: str, seed: int) -> float:
    """The same over random weights, the same ones for all rows and data sets of a seed."""
    random = bench.latest("untrained", seed, lambda: untrained(bench.backbone(), seed))
    return bench.accuracy(random, bench.task(name), bench.method(row), seed)


def held_out(bench: Workbench, name: str, seed: int) -> Task:
    """The data set with a fifth of its training images held out, to choose by."""
    return bench.once(("held out", name, seed), lambda: bench.task(name).with_validation(0.2, seed))


def held_and_test(bench: Workbench, name: str, method: Method, seed: int) -> tuple[float, float]:
    """Top-1 in percent on held-out and on test images of the method, fitted on the others."""
    data = held_out(bench, name, seed)
    assert data.validation is not None
    patch = bench.fit(bench.backbone(), data, method, seed)
    held = evaluate(bench.backbone(), patch, replace(data, test=data.validation)).score
    return 100 * held, 100 * patch.metrics["test_top1"]
