"""Figures of single classes, and how sure a figure is that was measured on so many images.

    precision_c = right_c / answered_c      recall_c = right_c / asked_c      F1_c = 2 right_c / (answered_c + asked_c)

The area under the ROC curve of a class is the share of pairs, one image of the class and one of others, in which the former
has the higher answer, equal ones half (Mann and Whitney, 1947). Macro F1 and balanced accuracy are the means of F1 and of
recall over the classes that some image has. The interval of a share is Wilson's (1927); that of other figures is the
bootstrap's: 2.5 % to 97.5 % of the figures of images that are drawn anew.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]
SIGMA = 1.959964  # standard deviations on either side that hold 95 % of a normal distribution
DRAWS = 1000


@dataclass(frozen=True)
class ClassScores:
    """One class: images (or pixels) of it, and shares in [0, 1]; precision is None where nothing was answered so."""

    name: str
    asked: int
    answered: int
    precision: float | None
    recall: float | None
    f1: float


def score_classes(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[ClassScores]:
    """The scores of every class from counts: `confusion[i][j]` of class i that were answered as class j."""
    counts = np.asarray(confusion, dtype=np.int64).reshape(len(classes), len(classes))
    rows = zip(classes, counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist(), strict=True)
    return [
        ClassScores(
            name,
            asked,
            answered,
            right / answered if answered else None,
            right / asked if asked else None,
            2 * right / (asked + answered) if asked + answered else 0.0,
        )
        for name, right, asked, answered in rows
    ]


def mean_of_classes(confusion: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Macro F1 and balanced accuracy of counts, means over the classes that some image has; 0 without any."""
    scores = score_classes(confusion, [str(number) for number in range(len(confusion))])
    asked = [one for one in scores if one.asked]
    count = max(len(asked), 1)
    return sum(one.f1 for one in asked) / count, sum(one.recall or 0.0 for one in asked) / count


def auroc(answers: np.ndarray, wanted: np.ndarray) -> float:
    """The mean area under the ROC curve over classes that some images have and others have not; 0 without any.

    `answers` (N, K) are the larger the surer; `wanted` (N, K) is 1 for the image's classes, 0 for others, NaN for unknown.
    """
    areas = []
    for scores, labels in zip(answers.T, wanted.T, strict=True):
        known = ~np.isnan(labels)
        _, places, counts = np.unique(scores[known], return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # the mean rank of equal answers
        mine = labels[known] == 1
        have, others = int(mine.sum()), int((~mine).sum())
        if have and others:
            areas.append((ranks[mine].sum() - have * (have + 1) / 2) / (have * others))
    return float(np.mean(areas)) if areas else 0.0


def wilson_interval(share: float, count: int) -> Interval:
    """The 95 % interval of a share of `count` independent images; from 0 to 1 without any."""
    if count < 1:
        return 0.0, 1.0
    spread = SIGMA**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = SIGMA * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_interval(
    images: int, measure: Callable[[np.ndarray], float], draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """The 95 % interval of `measure(times)`, given how often (N,) each image is drawn; None for fewer than two images."""
    if images < 2:
        return None
    generator = np.random.default_rng(seed)
    found = [measure(generator.multinomial(images, np.full(images, 1 / images))) for _ in range(draws)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
