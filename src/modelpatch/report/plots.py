"""Pictures, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelpatch.errors import MissingExtraError, ModelpatchError
from modelpatch.report.labels import is_far

if TYPE_CHECKING:
    from modelpatch.patch.inspect import Inspection
    from modelpatch.recipes.comparison import Comparison
    from modelpatch.tasks.kind import Result

BLUE, ORANGE, GREY = "#3366aa", "#dd8833", "#b8bcc4"
LABEL = {
    "xytext": (0, 0),
    "textcoords": "offset points",
    "ha": "center",
    "va": "center",
    "fontsize": 7,
    "arrowprops": {"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
}


def has_matplotlib() -> bool:
    """True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib(purpose: str = "Drawing a picture") -> None:
    """Raise `MissingExtraError` without matplotlib."""
    if not has_matplotlib():
        raise MissingExtraError("matplotlib", "plots", purpose)


def check_picture(path: Path, option: str) -> None:
    """Raise `ModelpatchError` for a picture format that cannot be drawn, `MissingExtraError` without matplotlib."""
    check_matplotlib(f"{option} {path}")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix.lower().removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        suffix = path.suffix or "no suffix"
        raise ModelpatchError(f"{option} {path}: {suffix} is not a supported picture format. Use .png, .svg or .pdf.")


@contextmanager
def figure(path: Path, width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """Yield axes to draw on, an array of them if there are several, and write the picture on leaving.

    Raises `MissingExtraError` without matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(rows, columns)
    for one in drawing.axes:
        one.spines[["top", "right"]].set_visible(False)
    yield axes
    try:
        drawing.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        advice = "Use a .png, .svg or .pdf in a folder that exists."
        raise ModelpatchError(f"cannot draw {path}: {error}. {advice}") from error


def plot_sweep(comparison: Comparison, key: str, sweeps: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Draw top-1 against a hyperparameter, one line per method; `sweeps` has the rows' names by method and value."""
    rows = {row.method: row for row in comparison.rows}
    with figure(path, 7, 4.5) as axes:
        for number, (method, spelled) in enumerate(sweeps.items()):
            found = {value: rows[name] for value, name in spelled.items() if name in rows}
            tops = [100 * row.top1 for row in found.values()]
            errors = [100 * (row.top1_error or 0) for row in found.values()]
            places: list[float] | list[str] = _numbers(found) or list(found)
            axes.errorbar(places, tops, yerr=errors, color=f"C{number}", marker="o", capsize=3, label=method)
        if all(min(_numbers(spelled), default=0) > 0 for spelled in sweeps.values()):
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel="top-1 (%)", title=f"{comparison.task} on {comparison.backbone}")
        axes.legend(frameon=False)


def _numbers(values: Iterable[str]) -> list[float]:
    """The values as numbers; none if any is no number."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return []


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw bars of top-1, and of the harmonic mean with the base if measured, beside bars of file bytes (log)."""
    rows = comparison.rows
    names = [row.method for row in rows]
    places = list(range(len(rows)))
    with figure(path, 10, 1.2 + 0.5 * len(rows), columns=2) as (left, right):
        means = [row.harmonic_mean for row in rows]
        measured = [mean for mean in means if mean is not None]
        height = 0.38 if measured else 0.6
        shift = height / 2 if measured else 0.0
        _bars(left, [p - shift for p in places], [100 * row.top1 for row in rows], height, BLUE, "top-1", "{:.1f}")
        if len(measured) == len(rows):
            values = [100 * mean for mean in measured]
            _bars(left, [p + shift for p in places], values, height, ORANGE, "harmonic mean with the base", "{:.1f}")
            left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        left.set(xlabel="percent", xlim=(0, 112))
        _bars(right, places, [row.file_bytes / 1000 for row in rows], 0.6, GREY, "file", "{:,.0f}")
        right.set(xlabel="patch file, kB (log)", xscale="log")
        right.set_xlim(right=max(row.file_bytes for row in rows) / 1000 * 4)
        for axes in (left, right):
            axes.set_yticks(places, names if axes is left else [""] * len(names))
            axes.invert_yaxis()
        left.figure.suptitle(f"{comparison.task} on {comparison.backbone}")


def plot_bytes(comparison: Comparison, path: Path) -> None:
    """Draw top-1 against file bytes (log), and the harmonic mean with the base on a second axis."""
    rows = comparison.rows
    with figure(path, 9, 5.5) as axes:
        sizes = [row.file_bytes / 1000 for row in rows]
        errors = [100 * (row.top1_error or 0) for row in rows]
        axes.errorbar(sizes, [100 * row.top1 for row in rows], errors, fmt="o", color=BLUE, capsize=3, label="top-1")
        axes.set(xscale="log", xlabel="patch file, kB (log)", ylabel="top-1, percent")
        axes.margins(x=0.12, y=0.15)
        axes.set_title(f"{comparison.task} on {comparison.backbone}", pad=24)
        means = [(size, 100 * row.harmonic_mean) for size, row in zip(sizes, rows, strict=True) if row.harmonic_mean]
        if means:
            second = axes.twinx()
            second.plot(*zip(*means, strict=True), "s", color=ORANGE, markersize=4)
            second.set_ylabel("harmonic mean with the base, percent", color=ORANGE)
            second.spines["top"].set_visible(False)
        names = [
            axes.annotate(row.method, (size, 100 * row.top1), **LABEL) for size, row in zip(sizes, rows, strict=True)
        ]
        for name in names:
            name.set_in_layout(False)
        axes.figure.draw_without_rendering()  # the layout is final now
        _place(axes, names, [tuple(second.transData.transform(point)) for point in means] if means else [])


def _place(axes: Any, names: list[Any], marks: list[tuple[float, float]]) -> None:
    """Move annotations so that they cover neither each other nor points; `marks` are more points, in pixels."""
    from matplotlib.text import Text

    from modelpatch.report.labels import arrange

    points = [tuple(axes.transData.transform(name.xy)) for name in names]
    extents = [Text.get_window_extent(name) for name in names]  # without the line to the point
    sizes = [(extent.width, extent.height) for extent in extents]
    offsets = arrange(points, sizes, axes.get_window_extent().extents, marks)
    for name, size, (dx, dy) in zip(names, sizes, offsets, strict=True):
        pixel = axes.figure.dpi / 72
        name.set_position((dx / pixel, dy / pixel))
        name.arrow_patch.set_visible(is_far((dx, dy), size))


def _bars(axes: Any, places: list[Any], values: list[float], height: float, color: str, label: str, text: str) -> None:
    bars = axes.barh(places, values, height=height, color=color, label=label)
    axes.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=8)


def plot_confusion(evaluation: Result, metric: str, classes: tuple[str, ...], path: Path) -> None:
    """The confusion matrix under the title of its metric, rows normalised, with counts for up to 12 classes and names for
    up to 40."""
    assert evaluation.confusion is not None
    side = min(4 + 0.16 * len(classes), 14)
    with figure(path, side + 1, side) as axes:
        shares = [[cell / max(sum(row), 1) for cell in row] for row in evaluation.confusion]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="answer", ylabel="class", title=f"{metric} {100 * evaluation.score:.1f} %")
        if len(classes) <= 12:
            for place, row in enumerate(evaluation.confusion):
                for other, count in enumerate(row):
                    color = "white" if shares[place][other] > 0.5 else "black"
                    axes.text(other, place, f"{count:,}", ha="center", va="center", fontsize=7, color=color)
        if len(classes) <= 40:
            axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axes.set_yticks(range(len(classes)), classes, fontsize=7)
        axes.figure.colorbar(image, shrink=0.7, label="share of the class")


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Draw the bytes of every part of a patch, the head last in its own colour, and beside them the masked shares."""
    parts = sorted(inspection.parts, key=lambda part: part.kind == "head")
    masked = inspection.masks is not None
    with figure(path, 9 + 5 * masked, 1.4 + 0.17 * len(parts), columns=1 + masked) as drawn:
        axes = drawn[0] if masked else drawn
        colors = [ORANGE if part.kind == "head" else BLUE for part in parts]
        bars = axes.barh(range(len(parts)), [part.bytes / 1000 for part in parts], color=colors)
        axes.bar_label(bars, [f"{part.bytes / 1000:.1f}" for part in parts], padding=2, fontsize=6)
        axes.set_yticks(range(len(parts)), [part.name for part in parts], fontsize=6)
        axes.set(xlabel="kB")
        if masked:
            shares = [0.0 if part.kept is None else 100 * (1 - part.kept) for part in parts]
            labels = ["" if part.kept is None else f"{share:.1f}" for part, share in zip(parts, shares, strict=True)]
            drawn[1].bar_label(drawn[1].barh(range(len(parts)), shares, color=GREY), labels, padding=2, fontsize=6)
            drawn[1].set_yticks([])
            drawn[1].set(xlabel="percent of weights masked out")
        for one in drawn if masked else [axes]:
            one.invert_yaxis()
            one.margins(y=0.01)
        title = f"{inspection.task}: {inspection.method}, {inspection.file_bytes:,} bytes in all"
        axes.figure.suptitle(title)
