"""Comparison of `private`, `shared` and `independent` weights of several resolutions, over several seeds."""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.recipes.multires import SHARINGS, Files, MultiResolution, fit_multires
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
        """The row of one sharing's runs."""
        tops = [run.top1 for run in runs]
        return cls(
            sharing=runs[0].sharing,
            top1={pixels: Mean.of([top[pixels] for top in tops]) for pixels in tops[0]},
            mean=Mean.of([statistics.fmean(top.values()) for top in tops]),
            parameters=runs[0].parameters,
            file_bytes=runs[0].file_bytes,
            seconds=statistics.fmean(run.seconds for run in runs),
        )


@dataclass(frozen=True)
class SharingComparison:
    """A row for each sharing, and the runs behind it, one a seed."""

    task: str
    backbone: str
    rows: tuple[SharingRow, ...]
    runs: Mapping[str, tuple[MultiResolution, ...]]

    @property
    def resolutions(self) -> tuple[int, ...]:
        """In pixels, increasing."""
        return tuple(self.rows[0].top1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        tops = {
            name: [{str(p): top for p, top in run.top1.items()} for run in runs] for name, runs in self.runs.items()
        }
        return {
            "task": self.task,
            "backbone": self.backbone,
            "rows": [{**asdict(row), "top1": {str(p): asdict(m) for p, m in row.top1.items()}} for row in self.rows],
            "runs": tops,
        }


def compare_sharing(
    backbone: Backbone,
    data: Task,
    resolutions: Sequence[int] = (96, 128, 160),
    sharings: Sequence[str] = SHARINGS,
    *,
    seeds: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    reuse: bool = True,
    progress: bool = False,
    **settings: Any,
) -> SharingComparison:
    """`fit_multires` for each of `sharings` with the same settings and steps, `seeds` times from `seed` on.

    `out` names a folder for all results, in which an interrupted comparison goes on, unless `reuse=False` trains anew.
    Raises what `fit_multires` raises.
    """
    options = {"out": out, "reuse": reuse, "progress": progress, **settings}
    if out is not None and not reuse:
        for sharing, number in itertools.product(sharings, range(seed, seed + seeds)):
            shutil.rmtree(Files.of(out, data, sharing, number).checkpoint, ignore_errors=True)
    runs = {
        sharing: tuple(
            fit_multires(backbone, data, resolutions, sharing=sharing, seed=number, **options)
            for number in range(seed, seed + seeds)
        )
        for sharing in dict.fromkeys(sharings)
    }
    rows = tuple(SharingRow.of(own) for own in runs.values())
    return SharingComparison(data.task.name, backbone.spec, rows, runs)
