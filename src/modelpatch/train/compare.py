"""Methods side by side on one task with equal step budgets: accuracy, parameters, bytes, seconds, and the base kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelpatch.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError, MissingExtraError
from modelpatch.methods import METHODS, Method, make_method
from modelpatch.patch import Patch
from modelpatch.train.data import TaskData
from modelpatch.train.evaluate import evaluate_base, harmonic_mean
from modelpatch.train.fit import fit


@dataclass(frozen=True)
class Row:
    """One method's figures. Accuracies in [0, 1]; `base_*` and the harmonic mean are None without base data."""

    method: str
    top1: float
    base_before: float | None
    base_after: float | None
    harmonic_mean: float | None
    trainable_parameters: int
    file_bytes: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A table of methods, and the patches it was made from. `skipped` says why a method is not among them."""

    task: str
    backbone: str
    rows: tuple[Row, ...]
    patches: Mapping[str, Patch]
    skipped: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "backbone": self.backbone,
            "rows": [asdict(row) for row in self.rows],
            "skipped": dict(self.skipped),
        }


def compare(
    backbone: Backbone,
    data: TaskData,
    methods: Sequence[str | Method] = tuple(METHODS),
    *,
    base: TaskData | None = None,
    progress: bool = False,
    **settings: Any,
) -> Comparison:
    """Fit every method on the task with the same settings and put the results in one table.

    `base` is a test set of the backbone's own classes: its accuracy is measured before and after every fit, and the
    harmonic mean with it is reported. A method that cannot patch this backbone, or whose library is not
    installed, is left out, with the reason.
    """
    before = evaluate_base(backbone, base).top1 if base is not None else None
    rows: list[Row] = []
    patches: dict[str, Patch] = {}
    skipped: dict[str, str] = {}
    for made in [make_method(method) if isinstance(method, str) else method for method in methods]:
        begin = time.perf_counter()
        try:
            patch = fit(backbone, data, made, progress=progress, **settings)
        except (MethodNotApplicableError, MissingExtraError) as error:
            skipped[made.name] = str(error)
            continue
        seconds = time.perf_counter() - begin
        after = evaluate_base(backbone, base).top1 if base is not None else None
        earlier = sum(row.method.partition(" ")[0] == made.name for row in rows)
        name = f"{made.name} ({earlier + 1})" if earlier else made.name
        top1 = patch.metrics["test_top1"]
        rows.append(
            Row(
                method=name,
                top1=top1,
                base_before=before,
                base_after=after,
                harmonic_mean=harmonic_mean(top1, after) if after is not None else None,
                trainable_parameters=made.count_parameters(backbone) + head_parameters(patch, made),
                file_bytes=patch.inspect().file_bytes,
                seconds=seconds,
            )
        )
        patches[name] = patch
    return Comparison(data.task.name, backbone.spec, tuple(rows), patches, skipped)


def head_parameters(patch: Patch, method: Method) -> int:
    """Trainable numbers of the patch's head."""
    if method.head == "random":
        return 0
    return sum(tensor.numel() for name, tensor in patch.tensors.items() if name.startswith("head."))
