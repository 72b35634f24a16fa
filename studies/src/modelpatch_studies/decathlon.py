"""Visual Decathlon: one score for ten tasks, and what the ten cost together.

    S = Σ_d 1000 · max(0, 1 - E_d / E_d^max)²        E_d^max = twice the error of fine-tuning: fine-tuning scores 250 a task

Rebuffi, Bilen and Vedaldi: *Learning multiple visual domains with residual adapters* (NeurIPS 2017), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelpatch.errors import DataError

MAX_ERRORS = {
    "imagenet": 80.26,
    "aircraft": 79.32,
    "cifar100": 35.76,
    "daimler": 14.36,
    "dtd": 88.94,
    "gtsrb": 4.94,
    "flowers": 37.18,
    "omniglot": 24.62,
    "svhn": 6.90,
    "ucf101": 97.60,
}  # percent


def decathlon_score(top1: Mapping[str, float], max_errors: Mapping[str, float] = MAX_ERRORS) -> float:
    """The score, 0 to 1,000 a task, of top-1 accuracies in [0, 1] by task. Raises `DataError` unless all tasks are there."""
    if top1.keys() != max_errors.keys():
        raise DataError(f"the decathlon needs figures for {', '.join(max_errors)}; given: {', '.join(top1) or 'none'}.")
    errors = {name: 100 * (1 - accuracy) for name, accuracy in top1.items()}
    return sum(1000 * max(0.0, 1 - errors[name] / limit) ** 2 for name, limit in max_errors.items())


def parameter_ratio(base_bytes: int, patch_bytes: list[int]) -> float:
    """Bytes of the base and all patches together, in bases: 1 for no patch, 1 + T for T copies."""
    return (base_bytes + sum(patch_bytes)) / base_bytes
