"""Pictures of outcomes, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modelpatch.errors import MissingExtraError
from modelpatch_studies.results import Results

GAP = 4  # least distance in pixels between the names of two columns; closer ones are rotated


def check_matplotlib() -> None:
    """Raise `MissingExtraError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", "Drawing a table")


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Axes of this size in inches to draw on; the picture is written when the block ends."""
    check_matplotlib()
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    drawing.savefig(path, dpi=130)


def draw(outcome: Results, path: Path) -> None:
    """Lines over numeric columns, else bars by column; a row a colour, its variant with Δ (or after it) in a darker shade."""
    rows, columns = outcome.rows, outcome.columns
    colors = _colors(len(rows))
    step = 0.6 if outcome.recipe.numeric else 0.16 * len(rows)
    with figure(path, max(7.0, 1.2 + step * len(columns)), 4.2) as axes:
        width = 0.8 / len(rows)
        for number, row in enumerate(rows):
            means = [outcome.mean(row, column) for column in columns]
            known = [
                (float(place), mean.value, mean.error or 0.0) for place, mean in enumerate(means) if mean is not None
            ]
            if outcome.recipe.numeric:
                places, values, errors = zip(*_apart(known, columns), strict=True)
                axes.errorbar(places, values, yerr=errors, marker="o", capsize=3, color=colors[number], label=row)
            else:
                places, values, errors = zip(*known, strict=True)
                beside = np.array(places) + (number - (len(rows) - 1) / 2) * width
                axes.bar(
                    beside, values, width, yerr=errors, color=colors[number], label=row, error_kw={"linewidth": 0.8}
                )
        axes.set_xticks(range(len(columns)), columns)
        axes.set(ylabel=outcome.recipe.unit)
        if outcome.recipe.logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(10 ** math.floor(math.log10(axes.get_ylim()[0])))  # bars from a power of ten
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_formatter("")
        axes.figure.suptitle(outcome.recipe.title, fontsize=11)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _part_names(axes)


def _part_names(axes: Any) -> None:
    """Turn the names below an axis aslant if they would meet."""
    axes.figure.draw_without_rendering()
    names = [name.get_window_extent() for name in axes.get_xticklabels()]
    if any(left.x1 + GAP > right.x0 for left, right in itertools.pairwise(names)):
        axes.tick_params(axis="x", rotation=20)
        for name in axes.get_xticklabels():
            name.set_horizontalalignment("right")


def _apart(points: Sequence[Sequence[float]], columns: Sequence[str]) -> Iterator[Sequence[float]]:
    """The points (place, value, error) of a line, with a gap before a column that is no number, such as `all`."""
    for point in points:
        if not columns[int(point[0])][0].isdigit():
            yield (math.nan,) * 3
        yield point


def _colors(count: int) -> list[tuple[float, ...]]:
    """Pairs of a light and a dark shade."""
    import matplotlib

    shades = matplotlib.colormaps["tab20" if count > 10 else "Paired"].colors  # type: ignore[attr-defined]
    return [shades[number % len(shades)] for number in range(count)]
