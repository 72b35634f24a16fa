"""The decathlon's score reproduces the published table."""

from __future__ import annotations

import pytest

from modelpatch.errors import DataError
from modelpatch_studies.decathlon import MAX_ERRORS, decathlon_score, parameter_ratio

pytestmark = pytest.mark.slow

# Mallya et al., Piggyback, Table 4: top-1 of ten tasks in the order of MAX_ERRORS, and the printed score
PUBLISHED = {
    "scratch": ([59.87, 57.10, 75.73, 91.20, 37.77, 96.55, 56.30, 88.74, 96.63, 43.27], 1625),
    "feature": ([59.67, 23.31, 63.11, 80.33, 45.37, 68.16, 73.69, 58.79, 43.54, 26.80], 544),
    "finetune": ([59.87, 60.34, 82.12, 92.82, 55.53, 97.53, 81.41, 87.69, 96.55, 51.20], 2500),
    "residual adapters": ([59.67, 56.68, 81.20, 93.88, 50.85, 97.05, 66.24, 89.62, 96.13, 47.45], 2118),
    "residual adapters, finetuned": ([59.23, 63.73, 81.31, 93.30, 57.02, 97.47, 83.43, 89.82, 96.17, 50.28], 2643),
    "deep adaptation": ([57.74, 64.12, 80.07, 91.30, 56.54, 98.46, 86.05, 89.67, 96.77, 49.38], 2851),
    "piggyback": ([57.69, 65.29, 79.87, 96.99, 57.45, 97.27, 79.09, 87.63, 97.24, 47.48], 2838),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_scores_are_reproduced(row: str) -> None:
    percent, printed = PUBLISHED[row]
    top1 = {name: value / 100 for name, value in zip(MAX_ERRORS, percent, strict=True)}
    assert decathlon_score(top1) == pytest.approx(printed, abs=2.5)


def test_a_task_that_is_twice_as_wrong_as_fine_tuning_scores_nothing() -> None:
    assert decathlon_score(dict.fromkeys(MAX_ERRORS, 0.0)) == pytest.approx(
        sum(1000 * max(0.0, 1 - 100 / limit) ** 2 for limit in MAX_ERRORS.values())
    )
    assert decathlon_score(dict.fromkeys(MAX_ERRORS, 1.0)) == 1000 * len(MAX_ERRORS)


def test_a_missing_task_is_an_error() -> None:
    with pytest.raises(DataError, match="needs figures for imagenet"):
        decathlon_score({"imagenet": 0.5})


def test_nine_masks_of_a_bit_a_weight_cost_nine_thirty_seconds_of_the_base() -> None:
    assert parameter_ratio(32, [1] * 9) == 41 / 32
    assert parameter_ratio(100, []) == 1
