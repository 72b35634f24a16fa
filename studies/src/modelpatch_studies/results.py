"""Results of a recipe: figures by row, column and seed, their means and standard errors, and verdicts on its claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelpatch_studies.recipe import Claim, Recipe


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, which is None for one seed."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of the values."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


@dataclass(frozen=True)
class Gap:
    """The difference of the rows `better` and `worse` on the mean of columns, less that on a claim's other columns;
    `cells` of `of` columns alone reach the claim's margin."""

    better: str
    worse: str
    mean: Mean
    cells: int
    of: int


@dataclass(frozen=True)
class Verdict:
    """A claim and whether it holds: every difference is at least the claim's margin.

    It is `certain` where every one is more than two standard errors from the margin; one seed makes nothing certain.
    """

    claim: Claim
    differences: tuple[Gap, ...]

    @property
    def holds(self) -> bool:
        return all(one.mean.value >= self.claim.margin for one in self.differences)

    @property
    def certain(self) -> bool:
        return all(
            one.mean.error is not None and abs(one.mean.value - self.claim.margin) > 2 * one.mean.error
            for one in self.differences
        )

    @property
    def word(self) -> str:
        """In a word or a few."""
        alone = any(one.mean.error is None for one in self.differences)
        equal = all(one.mean.value == self.claim.margin and one.mean.error == 0 for one in self.differences)
        doubt = "" if self.certain else ", one seed" if alone else ", equal" if equal else ", within the error"
        return f"{'holds' if self.holds else 'does not hold'}{doubt}"


@dataclass(frozen=True)
class Results:
    """A recipe's figures by (row, column) and seed, in the order of the recipe's parts, and the seconds they took."""

    recipe: Recipe
    scale: str
    figures: Mapping[tuple[str, str], Mapping[int, float]]
    seconds: float
    facts: Mapping[str, Any]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.figures))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.figures))

    def mean(self, row: str, column: str) -> Mean | None:
        """A cell over its seeds; None for one that the recipe leaves empty."""
        found = self.figures.get((row, column))
        return None if not found else Mean.of(list(found.values()))

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts on the recipe's claims, but for those of rows that this scale does not have."""
        return [
            Verdict(claim, tuple(self._difference(claim, *pair) for pair in claim.pairs))
            for claim in self.recipe.claims
            if all(row in self.rows for pair in claim.pairs for row in pair)
            and set(self.columns) >= {*claim.columns, *claim.than}
        ]

    def _difference(self, claim: Claim, better: str, worse: str) -> Gap:
        """Seed by seed on the mean of the columns that both rows have, less what it is on those that the claim is `than`."""
        both = [column for column in self.columns if {(better, column), (worse, column)} <= self.figures.keys()]
        columns = [column for column in both if not claim.columns or column in claim.columns]
        others = [column for column in both if column in claim.than]
        cells = [(row, column) for row in (better, worse) for column in (*columns, *others)]
        seeds = sorted(set.intersection(*(set(self.figures[cell]) for cell in cells)))

        def above(column: str) -> list[float]:
            return [self.figures[better, column][seed] - self.figures[worse, column][seed] for seed in seeds]

        beyond = [statistics.fmean(values) for values in zip(*map(above, others), strict=True)] or [0.0] * len(seeds)
        by_column = [[one - less for one, less in zip(above(column), beyond, strict=True)] for column in columns]
        mean = Mean.of([statistics.fmean(values) for values in zip(*by_column, strict=True)])
        count = sum(statistics.fmean(values) >= claim.margin for values in by_column)
        return Gap(better, worse, mean, count, len(columns))

    def is_known(self, claim: Claim) -> bool:
        """True if the claim is known to hold at this scale."""
        return claim.small or self.scale == "paper"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cells = [
            {
                "row": row,
                "column": column,
                "mean": Mean.of(list(seeds.values())).value,
                "error": Mean.of(list(seeds.values())).error,
                "published": self.recipe.published.get((row, column)),
                "seeds": {str(seed): value for seed, value in seeds.items()},
            }
            for (row, column), seeds in self.figures.items()
        ]
        claims = [
            {
                "name": verdict.claim.name,
                "text": verdict.claim.text,
                "paper": verdict.claim.paper,
                "margin": verdict.claim.margin,
                "doubt": verdict.claim.doubt,
                "columns": list(verdict.claim.columns),
                "than": list(verdict.claim.than),
                "known_to_hold_here": self.is_known(verdict.claim),
                "holds": verdict.holds,
                "certain": verdict.certain,
                "differences": [asdict(one) for one in verdict.differences],
            }
            for verdict in self.verdicts
        ]
        return {
            "recipe": self.recipe.name,
            "title": self.recipe.title,
            "section": self.recipe.section,
            "scale": self.scale,
            "settings": self.recipe.scales[self.scale].as_dict(),
            "unit": self.recipe.unit,
            "cells": cells,
            "claims": claims,
            "notes": self.recipe.notes,
            "seconds": self.seconds,
            **self.facts,
        }
