"""Tables and pictures of cascades."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from modelpatch.recipes.cascading import CascadeResult, Figures
from modelpatch.report.plots import BLUE, ORANGE, figure
from modelpatch.report.tables import new_table, percent


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
        axes.legend(frameon=False)


def _cells(figures: Figures) -> tuple[str, str]:
    return percent(figures.top1), f"{figures.macs / 1e6:,.2f}"
