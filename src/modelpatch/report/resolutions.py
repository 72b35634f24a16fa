"""Tables and pictures of several resolutions that share one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from modelpatch.recipes.multires import MultiResolution
from modelpatch.report.plots import figure
from modelpatch.report.tables import new_table, percent
from modelpatch.train.evaluation import Mean


@dataclass(frozen=True)
class SharingRow:
    """Top-1 in [0, 1] by resolution and their mean, trained parameters of all resolutions together, bytes shipped."""

    sharing: str
    top1: Mapping[int, Mean]
    mean: Mean
    parameters: int
    file_bytes: int
    seconds: float

    @classmethod
    def of(cls, runs: Sequence[MultiResolution]) -> SharingRow:
        """The row of one sharing's runs, one a seed."""
        tops, first = [run.top1 for run in runs], runs[0]
        own = {pixels: Mean.of([top[pixels] for top in tops]) for pixels in tops[0]}
        mean, seconds = Mean.of([fmean(top.values()) for top in tops]), fmean(run.seconds for run in runs)
        return cls(first.sharing, own, mean, first.parameters, first.file_bytes, seconds)


def sharing_table(rows: Sequence[SharingRow], title: str) -> Table:
    """One row for each way of sharing: top-1 in percent by resolution."""
    names = {"private": "scale and bias (private)", "shared": "nothing (shared)", "independent": "all (independent)"}
    cells = [
        [names[row.sharing], *(percent(mean.value, mean.error) for mean in (*row.top1.values(), row.mean)),
         f"{row.parameters:,}", f"{row.file_bytes:,}", f"{row.seconds:.1f}"]
        for row in rows
    ]  # fmt: skip
    pixels = [f"{pixels} px" for pixels in rows[0].top1]
    figures = [*pixels, "mean", "trained", "bytes", "seconds"]
    return new_table(title, texts=("own to a resolution",), figures=figures, rows=cells)


def plot_sharing(rows: Sequence[SharingRow], title: str, path: Path) -> None:
    """Top-1 against the resolution, a line for each way of sharing."""
    with figure(path, 7, 4.5) as axes:
        for number, row in enumerate(rows):
            tops = [100 * mean.value for mean in row.top1.values()]
            errors = [100 * (mean.error or 0) for mean in row.top1.values()]
            axes.errorbar(list(row.top1), tops, errors, color=f"C{number}", marker="o", capsize=3, label=row.sharing)
        axes.set_xticks(list(rows[0].top1))
        axes.set(xlabel="pixels", ylabel="top-1 (%)", title=title)
        axes.legend(frameon=False)
