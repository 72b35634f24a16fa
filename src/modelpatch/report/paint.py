"""PAINT's trade-off as a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from modelpatch.recipes.painting import Painting
from modelpatch.recipes.tradeoff import Point
from modelpatch.report.plots import BLUE, ORANGE, figure
from modelpatch.report.tables import new_table, percent

SHOWN = 24  # mixtures in a table
COLUMNS = ("patched", "supported", "combined")


def painting_cells(painting: Painting) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the base, the mixtures, test accuracies in percent; the chosen mixture has a star."""
    tasks = list(painting.chosen.tasks)
    header = ["alpha", *tasks, *COLUMNS]
    points = list(painting.curve)
    if len(points) > SHOWN:
        points = sorted(points, key=lambda point: -point.combined("validation"))[:SHOWN]
    if painting.chosen not in points:
        points.insert(0, painting.chosen)
    mixtures = [point for point in points if point is not painting.base]
    named = [(", ".join(f"{weight:.2f}" for weight in point.weights), point) for point in mixtures]
    rows = [
        [
            name + " *" * (point is painting.chosen),
            *(percent(point.tasks[task].test) for task in tasks),
            *map(percent, _means(point)),
        ]
        for name, point in [("base", painting.base), *named]
    ]
    return header, rows


def painting_table(painting: Painting) -> Table:
    """One row a mixture."""
    (first, *others), rows = painting_cells(painting)
    title = f"{painting.settings.mode} patching, test accuracy"
    return new_table(title, texts=(first,), figures=others, rows=rows)


def painting_summary(painting: Painting) -> str:
    """The figures of the whole curve, in a line."""
    return (
        f"* chosen on held-out images by {painting.settings.rule}; distance to optimal {100 * painting.distance:.2f} points, "
        f"CKA {painting.cka:.4f}, weight cosine {painting.cosine:.6f}"
    )


def orders_table(painting: Painting) -> Table:
    """One row an order of the tasks, and their mean: what is left at the end of each."""
    figures = [_means(order.point) for order in painting.orders]
    rows = [
        (", ".join(order.tasks), ", ".join(f"{alpha:g}" for alpha in order.alphas), *map(percent, own))
        for order, own in zip(painting.orders, figures, strict=True)
    ]
    rows.append(("mean", "", *(percent(statistics.fmean(column)) for column in zip(*figures, strict=True))))
    title = "sequences, test accuracy after the last task"
    return new_table(title, texts=("order",), figures=("alphas", *COLUMNS), rows=rows)


def _means(point: Point) -> tuple[float, float, float]:
    """Test accuracies of a point: the patched tasks, the supported ones, and both."""
    return point.mean("patched"), point.mean("supported"), point.combined()


def plot_tradeoff(painting: Painting, title: str, path: Path) -> None:
    """Patched against supported test accuracy in percent: the curve, the base and the chosen point."""
    places, sums = [_place(point) for point in painting.curve], [sum(point.weights) for point in painting.curve]
    style = "-" if sums == sorted(sums) else ""  # a line through a curve, not through a cloud
    with figure(path, 6.5, 5) as axes:
        look: dict[str, Any] = {"color": BLUE, "linewidth": 2, "linestyle": style, "marker": "o", "markersize": 4}
        axes.plot(*zip(*places, strict=True), label="paint", **look)
        axes.plot(*_place(painting.base), "s", color="black", label="base", zorder=4)
        axes.plot(*_place(painting.chosen), "*", color=ORANGE, markersize=15, label="chosen", zorder=5)
        axes.set(xlabel="supported tasks, accuracy (%)", ylabel="patched tasks, accuracy (%)", title=title)
        axes.legend(frameon=False, fontsize=8)


def _place(point: Point) -> tuple[float, float]:
    return 100 * point.mean("supported"), 100 * point.mean("patched")
