"""Pictures, drawn with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelpatch.errors import MissingExtraError, ModelpatchError
from modelpatch.patch.inspect import Inspection
from modelpatch.train import Comparison, Evaluation

BLUE, ORANGE, GREY = "#3366aa", "#dd8833", "#b8bcc4"


@contextmanager
def figure(path: Path, width: float, height: float, columns: int = 1) -> Iterator[Any]:
    """Axes to draw on; the picture is written on leaving. Raises `MissingExtraError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "Drawing a picture") from None
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(1, columns)
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    yield axes
    try:
        drawing.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ModelpatchError(
            f"cannot draw {path}: {error}. Use a .png, .svg or .pdf in a folder that exists."
        ) from error


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Bars of top-1 (and the harmonic mean with the base, where measured) beside bars of file bytes (log)."""
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


def _bars(axes: Any, places: list[Any], values: list[float], height: float, color: str, label: str, text: str) -> None:
    bars = axes.barh(places, values, height=height, color=color, label=label)
    axes.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=8)


def plot_confusion(evaluation: Evaluation, classes: tuple[str, ...], path: Path) -> None:
    """The confusion matrix, rows normalised; names are shown for up to 40 classes."""
    side = min(4 + 0.16 * len(classes), 14)
    with figure(path, side + 1, side) as axes:
        shares = [[cell / max(sum(row), 1) for cell in row] for row in evaluation.confusion]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="answer", ylabel="class", title=f"top-1 {100 * evaluation.top1:.1f} %")
        if len(classes) <= 40:
            axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axes.set_yticks(range(len(classes)), classes, fontsize=7)
        axes.figure.colorbar(image, shrink=0.7, label="share of the class")


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Bytes of every part of a patch, in the order of the file; the head stands last in its own colour."""
    parts = sorted(inspection.parts, key=lambda part: part.kind == "head")
    with figure(path, 9, 1.4 + 0.17 * len(parts)) as axes:
        colors = [ORANGE if part.kind == "head" else BLUE for part in parts]
        bars = axes.barh(range(len(parts)), [part.bytes / 1000 for part in parts], color=colors)
        axes.bar_label(bars, [f"{part.bytes / 1000:.1f}" for part in parts], padding=2, fontsize=6)
        axes.set_yticks(range(len(parts)), [part.name for part in parts], fontsize=6)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set(xlabel="kB", title=f"{inspection.task}: {inspection.method}, {inspection.file_bytes:,} bytes in all")
