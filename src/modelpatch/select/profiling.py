"""The finetuning profile: each block, run of blocks, pair or stage fine-tuned alone with the head.

    profile(u) = accuracy on held-out images of the patch that trains {u, head}

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), section 2.1. Any method can take the place
of full fine-tuning of the unit: scale and bias of a stage, masks over a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.select.study import (
    Candidate,
    Effect,
    Rater,
    Score,
    applicable,
    best,
    open_study,
    score_by_halving,
    units,
)


@dataclass(frozen=True)
class ProfileRow:
    """One unit: its blocks, what the method trains of them, its score."""

    name: str
    blocks: tuple[str, ...]
    parameters: int
    score: Score


@dataclass(frozen=True)
class Profile:
    """Rows in the order of the chain, and the linear probe's score to compare with.

    `kind` is `blocks`, `runs`, `pairs` or `stages`; `images` is the number of training images, those held out included.
    `skipped` says why a unit is not among the rows.
    """

    task: str
    backbone: str
    method: str
    kind: str
    images: int
    blocks: tuple[str, ...]
    probe: Score
    rows: tuple[ProfileRow, ...]
    skipped: dict[str, str]
    effect: Effect | None = None

    @property
    def best(self) -> ProfileRow | None:
        """The row with the highest accuracy."""
        number = best([row.score for row in self.rows])
        return None if number is None else self.rows[number]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {name: getattr(self, name) for name in ("task", "backbone", "method", "kind", "images", "skipped")}
        rows = [
            {"name": row.name, "blocks": list(row.blocks), "parameters": row.parameters, **row.score.as_dict()}
            for row in self.rows
        ]
        scores = {"linear_probe": self.probe.as_dict(), "rows": rows}
        return {**own, "blocks": list(self.blocks), **scores, "halving": str(self.effect) if self.effect else None}


def profile(
    backbone: Backbone,
    data: Task,
    method: Method | str = "subset",
    *,
    consecutive: int = 1,
    pairs: bool = False,
    stages: bool = False,
    folds: int = 1,
    halving: int = 0,
    **options: Any,
) -> Profile:
    """Score `method` confined to every unit (see `units`) by validation on the training images; the test split is not read.

    `folds` folds, or one held-out split; `halving=3` trains only the best third for three times the epochs, and so on. For
    the other options see `open_study`; the rest are settings of `fit`, the same for all units. Raises
    `MethodNotApplicableError` if the method has nothing to change in any unit.
    """
    chosen = make_method(method) if isinstance(method, str) else method
    names = units(backbone, consecutive=consecutive, pairs=pairs, stages=stages)
    kind = "stages" if stages else "pairs" if pairs else "runs" if consecutive > 1 else "blocks"
    with open_study(backbone, data, title="profile", folds=folds, **options) as study:
        return profile_units(study, chosen, names, kind, halving)


def profile_units(
    study: Rater,
    method: Method,
    names: Sequence[tuple[str, ...]],
    kind: str,
    halving: int = 0,
    epochs: int | None = None,
) -> Profile:
    """The profile of some units within a study, by halving or after `epochs` epochs, by default the study's."""
    backbone = study.bench.backbone
    able, skipped = applicable(backbone, method, names, "unit")
    probe = study.score([Candidate.of(method, ())], epochs, title="linear probe")[0]
    scores, effect = score_by_halving(study, [one for one, _ in able.values()], halving, "profile", epochs)
    rows = [
        ProfileRow(name, candidate.blocks, count, score)
        for (name, (candidate, count)), score in zip(able.items(), scores, strict=True)
    ]
    return Profile(
        task=study.data.task.name,
        backbone=backbone.spec,
        method=method.name,
        kind=kind,
        images=len(study.bench.folds.images),
        blocks=tuple(block.name for block in backbone.chain.blocks),
        probe=probe,
        rows=tuple(rows),
        skipped=skipped,
        effect=effect,
    )
