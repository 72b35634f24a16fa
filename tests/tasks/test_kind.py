"""Kinds of tasks that others define."""

from __future__ import annotations

from typing import Any

import pytest

from modelpatch.tasks.classification import Classification, ClassMeter
from modelpatch.tasks.kind import Kind


class OfOldName(Classification):
    """A kind of another distribution that makes its meter as the first edition asked for."""

    def make_meter(self, classes: Any) -> ClassMeter:
        return ClassMeter(classes)


class WithoutMeter(Kind):
    """A kind without a way to measure it."""

    loss = reduce = describe = to_json = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [OfOldName, WithoutMeter])
def test_a_kind_that_could_not_be_measured_is_refused_before_it_trains(kind: type[Kind]) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} needs `meter_type`"):
        kind()
