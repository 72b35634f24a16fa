"""Searches and active learning as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.table import Table

from modelpatch.backbone.preprocessing import ImageSource, open_image
from modelpatch.errors import ModelpatchError
from modelpatch.report.plots import BLUE, GREY, ORANGE, figure
from modelpatch.report.selection import accuracy
from modelpatch.report.tables import new_table, percent
from modelpatch.select.active import Curves, Pick
from modelpatch.select.searching import Proposal, Search

SHOWN = 24  # rows of a search's table
TILE, CAPTION, COLUMNS = 128, 30, 8  # pixels, pixels, tiles


def search_table(search: Search) -> Table:
    """A row a proposal, the longest trained and best first; the chosen one in bold, those of the Pareto front with a star."""
    front = {id(one) for one in search.front}
    notes = [str(search.effect)] if search.effect else []
    notes += [f"given up: {reason}" for reason in search.dropped]
    shown = search.proposals[:SHOWN]
    rows = [
        (one.candidate.name, accuracy(one.score), f"{one.score.file_bytes:,}", f"{100 * one.latency:.1f}",
         str(one.score.epochs), "*" if id(one) in front else "")
        for one in shown
    ]  # fmt: skip
    return new_table(
        f"{search.task} on {search.backbone}",
        "\n".join(notes),
        texts=("proposal",),
        figures=("held-out\ntop-1", "file\nbytes", "added\ntime, %", "epochs", "Pareto"),
        rows=rows,
        bold=[number for number, one in enumerate(shown) if one.candidate is search.chosen],
    )


def left_out_table(search: Search) -> Table:
    """A row a proposal that was not trained, with the reason; where there are many the JSON has them all."""
    more = len(search.left_out) - SHOWN
    caption = f"and {more} more, see --json" if more > 0 else ""
    rows = list(search.left_out.items())[:SHOWN]
    return new_table("left out before training", caption, texts=("proposal", "reason"), rows=rows)


def plot_search(search: Search, path: Path) -> None:
    """Accuracy against bytes (log), the added time as colour; the Pareto front is joined, the limits are lines."""
    slowest = max(1, *(100 * one.latency for one in search.proposals))
    with figure(path, 9, 5.5) as axes:
        for kept, marker, label in ((False, "x", "given up early"), (True, "o", "trained to the end")):
            if chosen := [one for one in search.proposals if one.kept is kept]:
                colors = {"c": [100 * one.latency for one in chosen], "vmin": 0, "vmax": slowest, "cmap": "viridis"}
                points = axes.scatter(*_places(chosen), marker=marker, label=label, **colors)
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linewidth": 1, "zorder": 0}
        label = "Pareto front in accuracy, bytes and time"
        front = sorted(search.front, key=lambda one: one.score.file_bytes)
        axes.plot(*_places(front), color=ORANGE, label=label, **ring)
        if search.budget.bytes is not None:
            axes.axvline(search.budget.bytes / 1000, color=GREY, linestyle="--", label="limit of bytes")
        axes.set(xlabel="patch file, kB (log)", ylabel="held-out top-1, percent")
        _log_ticks(axes)
        axes.set_title(f"{search.task} on {search.backbone}")
        bar = axes.figure.colorbar(points, label="added time, percent of the base's")
        if search.budget.latency is not None and 100 * search.budget.latency <= slowest:
            bar.ax.axhline(100 * search.budget.latency, color=ORANGE, linewidth=2)
            bar.set_label("added time, percent of the base's; orange: limit")
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)


def _places(proposals: Sequence[Proposal]) -> tuple[list[float], list[float]]:
    """Kilobytes and accuracies in percent."""
    scores = [one.score for one in proposals]
    return [score.file_bytes / 1000 for score in scores], [100 * score.top1 for score in scores]


def _log_ticks(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten, instead of powers few of which may lie within the picture."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def picks_table(picks: Sequence[Pick], names: Sequence[str]) -> Table:
    """The images to label next, the least sure first."""
    rows = [(names[one.position], f"{one.first} and {one.second}", f"{one.margin:.3f}") for one in picks]
    return new_table("label next", texts=("image", "between"), figures=("margin",), rows=rows)


def curves_table(curves: Curves) -> Table:
    """Accuracy by number of labels and strategy."""
    rows = []
    for row, count in enumerate(curves.labels):
        cells = [
            percent(curves.mean(name)[row], curves.error(name)[row] if len(values) > 1 else None)
            for name, values in curves.top1s.items()
        ]
        rows.append((f"{count:,}", *cells))
    title = f"{curves.task} on {curves.backbone}: {curves.method}"
    return new_table(title, figures=("labels", *(f"{name}\ntop-1" for name in curves.top1s)), rows=rows)


def plot_curves(curves: Curves, path: Path) -> None:
    """Test accuracy against labels, a line a strategy with standard errors."""
    with figure(path, 6.5, 4.5) as axes:
        for name, color in zip(curves.top1s, (BLUE, ORANGE), strict=True):
            means, errors = ([100 * value for value in values] for values in (curves.mean(name), curves.error(name)))
            axes.errorbar(curves.labels, means, errors, color=color, marker="o", capsize=3, label=name)
        axes.set(xlabel="labelled images", ylabel="test top-1, percent", title=f"{curves.task} on {curves.backbone}")
        axes.legend(frameon=False)


def contact_sheet(picks: Sequence[Pick], images: Sequence[ImageSource], path: Path) -> None:
    """The picked images in rows of eight, with rank, margin and the two classes below each.

    Raises `ModelpatchError` where the picture cannot be written.
    """
    columns, rows = min(COLUMNS, len(picks)), -(-len(picks) // COLUMNS)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(picks):
        left, top = number % COLUMNS * TILE, number // COLUMNS * (TILE + CAPTION)
        image = open_image(images[one.position])
        image.thumbnail((TILE - 4, TILE - 4))
        sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
        draw.text((left + 3, top + TILE), f"{number + 1}: {one.margin:.3f}", fill="black")
        draw.text((left + 3, top + TILE + 13), f"{one.first} / {one.second}"[:22], fill="black")
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise ModelpatchError(f"cannot draw {path}: {error}. Use a .png or .jpg in a folder that exists.") from error
