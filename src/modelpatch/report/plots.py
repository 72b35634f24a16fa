"""Pictures, drawn with matplotlib."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelpatch.errors import ModelpatchError, require

if TYPE_CHECKING:
    from modelpatch.patch.inspect import Inspection
    from modelpatch.recipes.comparison import Comparison
    from modelpatch.tasks.kind import Result

BLUE, ORANGE, GREY = "#3366aa", "#dd8833", "#b8bcc4"
LABEL: dict[str, Any] = {"xytext": (0, 0), "textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7}
LABEL |= {"arrowprops": {"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}}
DISTANCES = (14, 18, 23, 30, 40, 52, 66, 82, 100, 120, 140)  # pixels from a point to a name's nearest edge, about
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (-0.7, -0.7), (0.7, -0.7))  # above first
MARK = 6  # half the side of what a point covers, in pixels
Row = dict[str, float]


@contextmanager
def figure(path: Path, width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """Yield axes to draw on, an array of them if there are several; on leaving, add legends and write the picture.

    Raises `MissingExtraError` without matplotlib, `ModelpatchError` where the picture cannot be written.
    """
    figures = require("matplotlib.figure", "plots", "Drawing a picture", "matplotlib")
    drawing = figures.Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(rows, columns)
    for one in drawing.axes:
        one.spines[["top", "right"]].set_visible(False)
    yield axes
    for one in drawing.axes:
        if one.get_legend() is None and one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=8)
    try:
        drawing.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        advice = "Use a .png, .svg or .pdf in a folder that exists."
        raise ModelpatchError(f"cannot draw {path}: {error}. {advice}") from error


def draw_scores(
    axes: Any, places: Any, scores: Iterable[tuple[float, float | None]], scale: float = 100, **style: Any
) -> None:
    """Draw scores times `scale`, shares in [0, 1] in percent, each with its standard error, if there is one."""
    percents = [(scale * top, scale * (error or 0)) for top, error in scores]
    tops, errors = [top for top, _ in percents], [error for _, error in percents]
    axes.errorbar(places, tops, errors, **{"fmt": "o-", "capsize": 3, **style})


def scale_of(comparison: Comparison) -> float:
    """The factor with which a comparison's scores are drawn: 100 for percent."""
    return 100 if comparison.in_percent else 1


def plot_sweep(comparison: Comparison, key: str, sweeps: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Draw the scores against a hyperparameter, one line per method; `sweeps` has the rows' names by method and value."""
    rows = {row.method: row for row in comparison.rows}
    with figure(path, 7, 4.5) as axes:
        for method, spelled in sweeps.items():
            found = {value: rows[name] for value, name in spelled.items() if name in rows}
            numbers = [_number(value) for value in found]
            scores = [(row.score, row.score_error) for row in found.values()]
            draw_scores(axes, list(found) if None in numbers else numbers, scores, scale_of(comparison), label=method)
        if all((_number(value) or 0) > 0 for spelled in sweeps.values() for value in spelled):
            axes.set_xscale("log")
        unit = " (%)" if comparison.in_percent else ""
        axes.set(xlabel=key, ylabel=comparison.title + unit, title=f"{comparison.task} on {comparison.backbone}")


def _number(text: Any) -> float | None:
    """The number that a text spells; None if it spells none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_history(path: Path) -> list[Row]:
    """The figures of each epoch in a metrics.csv; empty if there is no such file. Cells that are no numbers are left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(stream)]
    return [{name: number for name, number in row.items() if number is not None} for row in rows]


def plot_history(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the losses, the scores and the learning rate against the epoch, a panel each."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    losses = [name for name in names if "loss" in name]
    rates = [name for name in names if name in ("lr", "rate")]
    scores = [name for name in names if name not in {"epoch", "step", "seconds", *losses, *rates}]
    panels = {"loss": losses, "score": scores, "learning rate": rates}
    panels = {label: chosen for label, chosen in panels.items() if chosen} or {"score": []}
    with figure(path, 4.2 * len(panels), 3.6, columns=len(panels)) as drawn:
        every = [drawn] if len(panels) < 2 else list(drawn)
        for axes, (label, chosen) in zip(every, panels.items(), strict=True):
            for number, name in enumerate(chosen):
                points = [(row.get("epoch", place), row[name]) for place, row in enumerate(rows, 1) if name in row]
                color = (BLUE, ORANGE, GREY)[number] if number < 3 else f"C{number}"
                style = {"color": color, "marker": "o", "markersize": 3}
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
            axes.set(xlabel="epoch", ylabel=label)
        every[0].figure.suptitle(title)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw bars of the scores, and of the harmonic mean with the base if measured, beside bars of file bytes (log)."""
    rows = comparison.rows
    places = range(len(rows))
    means = [100 * row.harmonic_mean for row in rows if row.harmonic_mean is not None]
    height, shift = (0.38, 0.19) if means else (0.6, 0.0)
    with figure(path, 10, 1.2 + 0.5 * len(rows), columns=2) as (left, right):
        style: dict[str, Any] = {"height": height, "color": BLUE, "label": comparison.title if means else None}
        scores, text = (
            [scale_of(comparison) * row.score for row in rows],
            "{:.1f}" if comparison.in_percent else "{:.3f}",
        )
        _bars(left, [place - shift for place in places], scores, text, **style)
        if len(means) == len(rows):
            style |= {"color": ORANGE, "label": "harmonic mean with the base"}
            _bars(left, [place + shift for place in places], means, "{:.1f}", **style)
            left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        if comparison.in_percent:
            left.set(xlabel=f"{comparison.title}, percent", xlim=(0, 112))
        else:
            left.set(xlabel=comparison.title, xlim=(min(0, 1.3 * min(scores)), 1.12 * max(*scores, 0.1)))
        _bars(right, places, [row.file_bytes / 1000 for row in rows], "{:,.0f}", height=0.6, color=GREY)
        right.set(xlabel="patch file, kB (log)", xscale="log")
        right.set_xlim(right=max(row.file_bytes for row in rows) / 1000 * 4)
        for axes, names in ((left, [row.method for row in rows]), (right, [""] * len(rows))):
            axes.set_yticks(places, names)
            axes.invert_yaxis()
        left.figure.suptitle(f"{comparison.task} on {comparison.backbone}")


def plot_bytes(comparison: Comparison, path: Path) -> None:
    """Draw the scores against file bytes (log), and the harmonic mean with the base on a second axis."""
    rows = comparison.rows
    with figure(path, 9, 5.5) as axes:
        sizes = [row.file_bytes / 1000 for row in rows]
        scores = [(row.score, row.score_error) for row in rows]
        draw_scores(axes, sizes, scores, scale_of(comparison), fmt="o", color=BLUE)
        unit = ", percent" if comparison.in_percent else ""
        axes.set(xscale="log", xlabel="patch file, kB (log)", ylabel=comparison.title + unit)
        axes.margins(x=0.12, y=0.15)
        axes.set_title(f"{comparison.task} on {comparison.backbone}", pad=24)
        means = [(size, 100 * row.harmonic_mean) for size, row in zip(sizes, rows, strict=True) if row.harmonic_mean]
        if means:
            second = axes.twinx()
            second.plot(*zip(*means, strict=True), "s", color=ORANGE, markersize=4)
            second.set_ylabel("harmonic mean with the base, percent", color=ORANGE)
            second.spines["top"].set_visible(False)
        places = [(size, scale_of(comparison) * row.score) for size, row in zip(sizes, rows, strict=True)]
        names = [axes.annotate(row.method, place, **LABEL) for row, place in zip(rows, places, strict=True)]
        for name in names:
            name.set_in_layout(False)
        axes.figure.draw_without_rendering()  # the layout is final now
        _place(axes, names, second.transData.transform(means) if means else ())


def _place(axes: Any, names: Sequence[Any], marks: Sequence[Any]) -> None:
    """Move annotations to the nearest places where they cover neither each other nor points; `marks` are more points.

    The most crowded points choose first. If no place is free, the one that covers the fewest is taken.
    """
    import numpy as np
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    points = axes.transData.transform([name.xy for name in names])
    taken = [Bbox.from_extents(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in (*points, *marks)]
    frame, pixel = axes.get_window_extent(), axes.figure.dpi / 72
    gaps = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag(np.full(len(points), np.inf))
    for number in gaps.min(axis=1).argsort(kind="stable"):
        own = Text.get_window_extent(names[number])  # without the line to the point
        places = [
            (right * (distance + own.width / 2 - MARK), up * (distance + own.height / 2 - MARK), distance)
            for distance in DISTANCES
            for right, up in DIRECTIONS
        ]
        boxes = [own.translated(dx, dy) for dx, dy, _ in places]
        covered = [
            box.count_overlaps(taken) + sum(not frame.contains(*corner) for corner in box.corners()) for box in boxes
        ]
        best = covered.index(min(covered))
        dx, dy, distance = places[best]
        names[number].set_position((dx / pixel, dy / pixel))
        names[number].arrow_patch.set_visible(distance > DISTANCES[0])
        taken.append(boxes[best])


def _bars(axes: Any, places: Any, values: Sequence[float], texts: str | list[str], size: int = 8, **style: Any) -> None:
    """Draw horizontal bars with a text beside each, or the values in a format."""
    if isinstance(texts, str):
        texts = [texts.format(value) for value in values]
    axes.bar_label(axes.barh(places, values, **style), texts, padding=3, fontsize=size)


def plot_confusion(evaluation: Result, metric: str, classes: tuple[str, ...], path: Path) -> None:
    """Draw the confusion matrix, rows normalised, with counts for up to 24 classes and names for up to 40."""
    assert evaluation.confusion is not None
    side = min(4 + 0.16 * len(classes), 14)
    with figure(path, side + 1, side) as axes:
        shares = [[cell / max(sum(row), 1) for cell in row] for row in evaluation.confusion]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="answer", ylabel="class", title=f"{metric} {100 * evaluation.score:.1f} %")
        if len(classes) <= 24:
            for place, row in enumerate(evaluation.confusion):
                for other, count in enumerate(row):
                    color = "white" if shares[place][other] > 0.5 else "black"
                    axes.text(
                        other,
                        place,
                        f"{count:,}",
                        ha="center",
                        va="center",
                        fontsize=7 if len(classes) <= 12 else 5,
                        color=color,
                    )
        if len(classes) <= 40:
            axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axes.set_yticks(range(len(classes)), classes, fontsize=7)
        axes.figure.colorbar(image, shrink=0.7, label="share of the class")


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Draw the bytes of every part of a patch, the head last in its own colour, and beside them the masked shares."""
    parts = sorted(inspection.parts, key=lambda part: part.kind == "head")
    masked, places = inspection.masks is not None, range(len(parts))
    with figure(path, 9 + 5 * masked, 1.4 + 0.17 * len(parts), columns=1 + masked) as drawn:
        every = list(drawn) if masked else [drawn]
        colors = [ORANGE if part.kind == "head" else BLUE for part in parts]
        _bars(every[0], places, [part.bytes / 1000 for part in parts], "{:.1f}", 6, color=colors)
        every[0].set_yticks(places, [part.name for part in parts], fontsize=6)
        every[0].set(xlabel="kB")
        if masked:
            shares = [0.0 if part.kept is None else 100 * (1 - part.kept) for part in parts]
            labels = ["" if part.kept is None else f"{share:.1f}" for part, share in zip(parts, shares, strict=True)]
            _bars(every[1], places, shares, labels, 6, color=GREY)
            every[1].set(xlabel="percent of weights masked out", yticks=[])
        for axes in every:
            axes.invert_yaxis()
            axes.margins(y=0.01)
        every[0].figure.suptitle(f"{inspection.task}: {inspection.method}, {inspection.file_bytes:,} bytes in all")
