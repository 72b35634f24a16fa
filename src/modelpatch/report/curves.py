"""Learning curves: the rows of a run's metrics.csv as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from modelpatch.report.plots import BLUE, GREY, ORANGE, figure

Row = dict[str, float]


def read_history(path: Path) -> list[Row]:
    """The figures of each epoch in a metrics.csv; empty if there is no such file. Cells that are no numbers are left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [_numbers(row) for row in csv.DictReader(stream)]


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
            axes.legend(frameon=False, fontsize=8)
        every[0].figure.suptitle(title)


def _numbers(row: dict[str, str]) -> Row:
    numbers: Row = {}
    for name, text in row.items():
        try:
            numbers[name] = float(text)
        except (TypeError, ValueError):
            continue
    return numbers
