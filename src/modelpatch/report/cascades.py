"""Tables and pictures of cascades."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
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
    table = new_table(
        "cascade",
        caption,
        texts=("",),
        figures=("pixels", "held-out\ntop-1", "held-out\nM mult-adds", "test\ntop-1", "test\nM mult-adds"),
    )
    for single in result.singles:
        mark = " (reference)" if single.name == result.reference else ""
        cells = (*_cells(single.validation), *_cells(single.test))
        table.add_row(escape(single.name + mark), str(single.resolution), *cells)
    table.add_row("[b]cascade[/b]", "", *_cells(result.validation), *_cells(result.test))
    return table


def stages_table(result: CascadeResult) -> Table:
    """The stages in order: from which confidence each answers, and what share of the images that is."""
    table = new_table("stages", texts=("patch",), figures=("answers from", "held-out %", "test %"))
    shares = zip(result.validation.answered, result.test.answered, strict=True)
    for name, confidence, (held, test) in zip(result.order, result.cascade.confidences, shares, strict=True):
        threshold = "what is left" if confidence.threshold is None else f"{confidence.threshold:.4g}"
        table.add_row(escape(name), threshold, percent(held), percent(test))
    return table


def plot_cascade(result: CascadeResult, path: Path) -> None:
    """Top-1 on test images against multiply-adds, the patches alone and the cascade."""
    with figure(path, 7, 4.5) as axes:
        axes.plot(
            [single.test.macs / 1e6 for single in result.singles],
            [100 * single.test.top1 for single in result.singles],
            "o",
            color=BLUE,
            label="one patch",
        )
        for single in result.singles:
            axes.annotate(
                single.name,
                (single.test.macs / 1e6, 100 * single.test.top1),
                (4, 4),
                textcoords="offset points",
                fontsize=7,
            )
        axes.plot([result.test.macs / 1e6], [100 * result.test.top1], "s", color=ORANGE, label="cascade")
        axes.set(xlabel="million multiply-adds an image", ylabel="test top-1 (%)", title=result.cascade.task.name)
        axes.margins(x=0.25, y=0.15)
        axes.legend(frameon=False)


def _cells(figures: Figures) -> tuple[str, str]:
    return percent(figures.top1), f"{figures.macs / 1e6:,.2f}"
