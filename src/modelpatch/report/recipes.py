"""Recipes as tables and pictures: cascades, several resolutions, PAINT's trade-off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from modelpatch.report.plots import BLUE, ORANGE, draw_scores, figure
from modelpatch.report.tables import new_table, percent

if TYPE_CHECKING:
    from modelpatch.recipes.cascading import CascadeResult, Figures
    from modelpatch.recipes.multires import MultiResolution
    from modelpatch.recipes.painting import Painting
    from modelpatch.recipes.tradeoff import Point
    from modelpatch.train.evaluation import Mean

SHOWN = 24  # mixtures in a table
COLUMNS = ("patched", "supported", "combined")


def cascade_table(result: CascadeResult) -> Table:
    """A row for each patch alone and one for the cascade: top-1 in percent and millions of multiply-adds an image."""
    caption = (
        f"{percent(result.saved)} % fewer multiply-adds on test images than {result.reference}, the best patch on held-out "
        "images; thresholds fit the held-out images, so the test figures are the ones to report"
    )
    rows = [
        (f"{one.name}{' (reference)' * (one.name == result.reference)}", str(one.resolution),
         *_cells(one.validation), *_cells(one.test))
        for one in result.singles
    ]  # fmt: skip
    return new_table(
        "cascade",
        caption,
        texts=("",),
        figures=("pixels", "held-out\ntop-1", "held-out\nM mult-adds", "test\ntop-1", "test\nM mult-adds"),
        rows=[*rows, ("cascade", "", *_cells(result.validation), *_cells(result.test))],
        bold=[len(rows)],
    )


def stages_table(result: CascadeResult) -> Table:
    """The stages in order: from which confidence each answers, and what share of the images that is."""
    rows = []
    shares = zip(result.validation.answered, result.test.answered, strict=True)
    for name, confidence, (held, test) in zip(result.order, result.cascade.confidences, shares, strict=True):
        threshold = "what is left" if confidence.threshold is None else f"{confidence.threshold:.4g}"
        rows.append((name, threshold, percent(held), percent(test)))
    return new_table("stages", texts=("patch",), figures=("answers from", "held-out %", "test %"), rows=rows)


def plot_cascade(result: CascadeResult, path: Path) -> None:
    """Top-1 on test images against multiply-adds, the patches alone and the cascade."""
    with figure(path, 7, 4.5) as axes:
        places = {one.name: (one.test.macs / 1e6, 100 * one.test.top1) for one in result.singles}
        axes.plot(*zip(*places.values(), strict=True), "o", color=BLUE, label="one patch")
        for name, place in places.items():
            axes.annotate(name, place, (4, 4), textcoords="offset points", fontsize=7)
        axes.plot([result.test.macs / 1e6], [100 * result.test.top1], "s", color=ORANGE, label="cascade")
        axes.set(xlabel="million multiply-adds an image", ylabel="test top-1 (%)", title=result.cascade.task.name)
        axes.margins(x=0.25, y=0.15)


def _cells(figures: Figures) -> tuple[str, str]:
    return percent(figures.top1), f"{figures.macs / 1e6:,.2f}"


@dataclass(frozen=True)
class SharingRow:
    """Top-1 in [0, 1] by resolution and their mean, trained parameters of all resolutions together, bytes shipped."""

    sharing: str
    top1: Mapping[int, Mean]
    mean: Mean
    parameters: int
    file_bytes: int
    seconds: float

    @classmethod
    def of(cls, runs: Sequence[MultiResolution]) -> SharingRow:
        """The row of one sharing's runs, one a seed."""
        from modelpatch.train.evaluation import Mean

        tops, first = [run.top1 for run in runs], runs[0]
        own = {pixels: Mean.of([top[pixels] for top in tops]) for pixels in tops[0]}
        mean, seconds = Mean.of([fmean(top.values()) for top in tops]), fmean(run.seconds for run in runs)
        return cls(first.sharing, own, mean, first.parameters, first.file_bytes, seconds)


def sharing_table(rows: Sequence[SharingRow], title: str) -> Table:
    """One row for each way of sharing: top-1 in percent by resolution."""
    names = {"private": "scale and bias (private)", "shared": "nothing (shared)", "independent": "all (independent)"}
    cells = [
        [names[row.sharing], *(percent(mean.value, mean.error) for mean in (*row.top1.values(), row.mean)),
         f"{row.parameters:,}", f"{row.file_bytes:,}", f"{row.seconds:.1f}"]
        for row in rows
    ]  # fmt: skip
    pixels = [f"{pixels} px" for pixels in rows[0].top1]
    figures = [*pixels, "mean", "trained", "bytes", "seconds"]
    return new_table(title, texts=("own to a resolution",), figures=figures, rows=cells)


def plot_sharing(rows: Sequence[SharingRow], title: str, path: Path) -> None:
    """Top-1 against the resolution, a line for each way of sharing."""
    with figure(path, 7, 4.5) as axes:
        for row in rows:
            scores = [(mean.value, mean.error) for mean in row.top1.values()]
            draw_scores(axes, list(row.top1), scores, label=row.sharing)
        axes.set_xticks(list(rows[0].top1))
        axes.set(xlabel="pixels", ylabel="top-1 (%)", title=title)


def painting_cells(painting: Painting) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the base, the mixtures, test accuracies in percent; the chosen mixture has a star."""
    tasks = list(painting.chosen.tasks)
    header = ["alpha", *tasks, *COLUMNS]
    points = list(painting.curve)
    if len(points) > SHOWN:
        points = sorted(points, key=lambda point: -point.combined("validation"))[:SHOWN]
    if painting.chosen not in points:
        points.insert(0, painting.chosen)
    rows = []
    for point in (painting.base, *(point for point in points if point is not painting.base)):
        name = "base" if point is painting.base else ", ".join(f"{weight:.2f}" for weight in point.weights)
        name += " *" * (point is painting.chosen)
        rows.append([name, *(percent(point.tasks[task].test) for task in tasks), *map(percent, _means(point))])
    return header, rows


def painting_table(painting: Painting) -> Table:
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
    rows.append(("mean", "", *(percent(fmean(column)) for column in zip(*figures, strict=True))))
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


def _place(point: Point) -> tuple[float, float]:
    return 100 * point.mean("supported"), 100 * point.mean("patched")
