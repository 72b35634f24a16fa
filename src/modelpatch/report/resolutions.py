"""Tables and pictures of several resolutions that share one network."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from modelpatch.recipes.comparison import SharingComparison
from modelpatch.report.plots import figure
from modelpatch.report.tables import new_table, percent


def sharing_table(comparison: SharingComparison) -> Table:
    """One row for each way of sharing: top-1 in percent by resolution."""
    names = {"private": "scale and bias (private)", "shared": "nothing (shared)", "independent": "all (independent)"}
    rows = [
        [names[row.sharing], *(percent(mean.value, mean.error) for mean in (*row.top1.values(), row.mean)),
         f"{row.parameters:,}", f"{row.file_bytes:,}", f"{row.seconds:.1f}"]
        for row in comparison.rows
    ]  # fmt: skip
    return new_table(
        f"{comparison.task} on {comparison.backbone}",
        texts=("own to a resolution",),
        figures=[*(f"{pixels} px" for pixels in comparison.resolutions), "mean", "trained", "bytes", "seconds"],
        rows=rows,
    )


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
