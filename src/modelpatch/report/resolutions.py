"""Tables and pictures of several resolutions that share one network."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from modelpatch.recipes.comparison import SharingComparison
from modelpatch.report.plots import figure
from modelpatch.report.tables import new_table, percent
from modelpatch.train.evaluation import Mean


def sharing_cells(comparison: SharingComparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison as text."""
    header = ["own to a resolution", *(f"{pixels} px" for pixels in comparison.resolutions)]
    header += ["mean", "trained", "bytes", "seconds"]
    names = {"private": "scale and bias (private)", "shared": "nothing (shared)", "independent": "all (independent)"}
    rows = [
        [
            names[row.sharing],
            *(_spelled(mean) for mean in row.top1.values()),
            _spelled(row.mean),
            f"{row.parameters:,}",
            f"{row.file_bytes:,}",
            f"{row.seconds:.1f}",
        ]
        for row in comparison.rows
    ]
    return header, rows


def sharing_table(comparison: SharingComparison) -> Table:
    """One row for each way of sharing: top-1 in percent by resolution."""
    table = new_table(f"{comparison.task} on {comparison.backbone}")
    (name, *figures), rows = sharing_cells(comparison)
    table.add_column(name, overflow="fold")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def plot_sharing(comparison: SharingComparison, path: Path) -> None:
    """Top-1 against the resolution, a line for each way of sharing."""
    with figure(path, 7, 4.5) as axes:
        for number, row in enumerate(comparison.rows):
            tops = [100 * mean.value for mean in row.top1.values()]
            errors = [100 * (mean.error or 0) for mean in row.top1.values()]
            axes.errorbar(list(row.top1), tops, errors, color=f"C{number}", marker="o", capsize=3, label=row.sharing)
        axes.set_xticks(comparison.resolutions)
        axes.set(xlabel="pixels", ylabel="top-1 (%)", title=f"{comparison.task} on {comparison.backbone}")
        axes.legend(frameon=False)


def _spelled(mean: Mean) -> str:
    return percent(mean.value) + ("" if mean.error is None else f" ± {percent(mean.error)}")
