"""Several labels an image: each is present, absent or unknown on its own.

    answers   logits (B, K)                             loss      binary cross entropy, focal or asymmetric
    targets   1, 0 or NaN (B, K)                        metrics   average precision, its mean over labels; F1 of all answers
                                                                  (micro) and its mean over labels (macro): torchmetrics

A label is told from its threshold on. Thresholds are chosen on held-out images, never on test images, and kept in the patch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from modelpatch.errors import DataError, warn_caller
from modelpatch.tasks.drawing import Color, palette
from modelpatch.tasks.kind import ElementLoss, Facts, Result, TargetFacts, TensorMeter, View, register_kind
from modelpatch.tasks.losses import asymmetric, bce, focal
from modelpatch.tasks.scores import Interval, auroc, bootstrap_interval
from modelpatch.tasks.vector import Vector, VectorKind, read_numbers, refuse_others

EVEN = 0.5  # the threshold of a label about which nothing is known
FEWEST = 5  # held-out images with a label, and as many without it, from which it has a threshold of its own
DRAWS = 200  # of the bootstrap
UNKNOWN = -1  # of torchmetrics and of data sets


@dataclass(frozen=True)
class MultilabelResult(Result):
    """Shares in [0, 1]. `per_class` are the average precisions of the labels that some image has."""

    map: float
    f1_macro: float
    f1_micro: float
    images: int
    per_class: dict[str, float]
    interval: Interval | None = None


class LabelMeter(TensorMeter):
    """Collects logits (B, K) and targets (B, K)."""

    def result(self) -> MultilabelResult:
        from torchmetrics.functional.classification import binary_average_precision, multilabel_f1_score

        shares, targets, count = self.answers.float().sigmoid(), self.targets, len(self.classes)
        wanted = targets.nan_to_num(UNKNOWN).long()
        told = (shares >= torch.tensor(find_thresholds(self.options, count))).long()
        asked = [index for index in range(count) if bool((wanted[:, index] == 1).any())]
        if count == 1:  # torchmetrics has several labels only
            told, wanted = (one.repeat(1, 2) for one in (told, wanted))
        f1 = {
            how: float(multilabel_f1_score(told, wanted, max(count, 2), average=how, ignore_index=UNKNOWN))
            for how in ("macro", "micro")
        }
        per_class = {
            self.classes[index]: float(
                binary_average_precision(shares[:, index], wanted[:, index], ignore_index=UNKNOWN)
            )
            for index in asked
        }
        return MultilabelResult(
            map=sum(per_class.values()) / max(len(per_class), 1),
            f1_macro=f1["macro"],
            f1_micro=f1["micro"],
            images=len(targets),
            per_class=per_class,
        )

    def interval(self) -> Interval | None:
        """The bootstrap's, over images."""
        logits, targets = self.answers.numpy(), self.targets.numpy()
        order = np.argsort(-logits, axis=0, kind="stable")
        ranked, wanted = (np.take_along_axis(one, order, 0) for one in (logits, targets))
        last = np.ones(ranked.shape, dtype=bool)  # of equal logits, which are told together
        last[:-1] = ranked[1:] != ranked[:-1]
        known, right = ~np.isnan(wanted), wanted == 1

        def measure(times: np.ndarray) -> float:
            drawn = times[order]
            found, told = np.cumsum(drawn * right, 0), np.cumsum(drawn * known, 0)
            shares = [
                float(np.diff(found[ends, index], prepend=0) @ (found[ends, index] / np.maximum(told[ends, index], 1)))
                / found[-1, index]
                for index, ends in enumerate(last.T)
                if found[-1, index]
            ]
            return sum(shares) / max(len(shares), 1)

        return bootstrap_interval(len(targets), measure, DRAWS)


def label_auroc(logits: Tensor, targets: Tensor) -> float:
    """The mean area under the ROC curve of the labels, unknown ones left out."""
    return auroc(logits.numpy(), targets.double().numpy())


@register_kind
class Multilabel(VectorKind):
    """Any number of labels an image; answers are logits (B, K)."""

    name: ClassVar[str] = "multilabel"
    metrics: ClassVar[Mapping[str, str]] = {"map": "mAP", "f1_macro": "macro F1", "f1_micro": "micro F1"}
    monitored: ClassVar[Mapping[str, Callable[[Tensor, Tensor], float]]] = {"auroc": label_auroc}
    meter_type = LabelMeter
    per_class = "AP"
    noun = "label"
    nouns = "labels"
    losses: ClassVar[Mapping[str, ElementLoss]] = {"bce": bce, "focal": focal, "asymmetric": asymmetric}
    held_out = 0.1
    counted = "labels"
    libraries = ("torchmetrics",)

    # data ---------------------------------------------------------------------------------------------------

    def read_target(self, value: Any, classes: Sequence[str]) -> Vector:
        """A target from a list of names or of indices, or from one of 1, 0 and -1 (unknown) for every label."""
        return Vector(read_labels(value, classes))

    def name_classes(self, values: Iterable[Any]) -> tuple[str, ...] | None:
        """The labels of all lists of names in alphabetical order; numbers for lists of one number a label."""
        names: set[str] = set()
        lengths: set[int] = set()
        for value in values:
            if isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, str) for one in value):
                names.update(map(str, value))
            elif isinstance(value, Tensor | np.ndarray) and value.ndim == 1:
                lengths.add(len(value))
            else:
                return None
        if bool(names) == bool(lengths) or len(lengths) > 1:
            return None
        return tuple(sorted(names)) or tuple(map(str, range(lengths.pop())))

    def list_strata(self, targets: Sequence[Vector]) -> Sequence[int]:
        """The rarest label of each image, or K for none."""
        found = np.stack([one.values for one in targets]) == 1
        counts = found.sum(0)
        rarity = np.where(found, counts, len(targets) + 1)
        return np.where(found.any(1), rarity.argmin(1), found.shape[1]).tolist()

    def check_options(self, classes: Sequence[str], options: Mapping[str, Any]) -> None:
        refuse_others(options, ("thresholds", "held_out_images"), self.name)
        images = options.get("held_out_images", 0)
        if type(images) is not int or images < 0:
            raise ValueError(f"held_out_images is {str(images)[:80]}; expected a number of images")
        if "thresholds" in options and not all(
            0 <= one <= 1 for one in read_numbers(options, "thresholds", len(classes))
        ):
            raise ValueError("a threshold is a probability, from 0 to 1")

    def examine(self, target: Vector, size: tuple[int, int] | None = None) -> TargetFacts:
        unknown = ("no known label",) if np.isnan(target.values).all() else ()
        return TargetFacts({int(index): 1 for index in np.flatnonzero(target.values == 1)}, unknown)

    def caption(self, target: Vector, classes: Sequence[str]) -> str:
        if np.isnan(target.values).all():
            return "unknown"
        return ", ".join(classes[index] for index in np.flatnonzero(target.values == 1).tolist()) or "no label"

    # training -----------------------------------------------------------------------------------------------

    def prepare(self, targets: Tensor, classes: Sequence[str]) -> dict[str, Any]:
        """Nothing; warns of labels that no image has. Raises `DataError` where no label is known."""
        found, known = (targets == 1).sum(0), (~targets.isnan()).sum(0)
        if not known.any():
            raise DataError("every label of every training image is unknown. Expected 1 or 0 for some.")
        for count, what in ((found, "no"), (known - found, "every")):
            if lost := [name for name, one in zip(classes, count.tolist(), strict=True) if not one]:
                more = f" and {len(lost) - 3} others" if len(lost) > 3 else ""
                warn_caller(f"{what} training image has the label {', '.join(lost[:3])}{more}: it cannot be learned.")
        return {}

    def count_classes(self, targets: Tensor, classes: int) -> Tensor:
        return (targets == 1).sum(0)

    def to_trained(self, targets: Tensor, options: Mapping[str, Any], label_smoothing: float) -> Tensor:
        return targets * (1 - label_smoothing) + label_smoothing / 2

    def calibrate(
        self, classes: Sequence[str], options: Mapping[str, Any], held_out: Iterable[tuple[Tensor, Any]] | None
    ) -> dict[str, Any]:
        """The threshold of every label with the best F1 on held-out images (see `choose_thresholds`)."""
        if held_out is None:
            warn_caller(
                f"no image could be held out of a stream to choose thresholds: every label is told from {EVEN:.0%} on. Give "
                "validation images."
            )
            return {**options, "thresholds": [EVEN] * len(classes), "held_out_images": 0}
        logits, targets = map(torch.cat, zip(*held_out, strict=True))
        thresholds = choose_thresholds(logits.float().sigmoid().numpy(), targets.numpy())
        return {**options, "thresholds": thresholds, "held_out_images": len(targets)}

    # meaning ------------------------------------------------------------------------------------------------

    def reduce(self, answers: Tensor, top: int = 5) -> list[list[float]]:
        """The probability of every label, for each image."""
        return answers.float().sigmoid().cpu().tolist()

    def describe(self, answer: list[float], view: View, top: int = 5) -> list[Facts]:
        """All labels from their thresholds on, the most probable first."""
        thresholds = find_thresholds(view.options, len(answer))
        return [
            {"label": view.name(index), "probability": answer[index], "threshold": thresholds[index]}
            for index in tell(answer, thresholds)
        ]

    def to_json(self, answer: list[float], view: View, top: int = 5) -> Facts:
        thresholds = find_thresholds(view.options, len(answer))
        named: list[Facts] = [
            {"class": view.name(index), "index": index, "probability": round(share, 6)}
            for index, share in enumerate(answer)
        ]
        best = sorted(range(len(answer)), key=lambda index: -answer[index])[:top]
        return {
            "top": [named[index] for index in best],
            "labels": [
                {**named[index], "threshold": round(thresholds[index], 6)} for index in tell(answer, thresholds)
            ],
        }

    def summarize(self, facts: Sequence[Facts]) -> list[str]:
        return super().summarize(facts) or ["no label"]

    def list_entries(self, answer: list[float], view: View) -> list[tuple[Color, str]]:
        colors = [tuple(color) for color in palette(len(answer)).tolist()]
        told = tell(answer, find_thresholds(view.options, len(answer)))
        return [(colors[index], f"{view.name(index)} {100 * answer[index]:.0f} %") for index in told] or [
            ((255, 255, 255), "no label")
        ]


def find_thresholds(options: Mapping[str, Any], count: int) -> list[float]:
    """The thresholds of a task with so many labels."""
    return read_numbers(options, "thresholds", count) if "thresholds" in options else [EVEN] * count


def tell(answer: Sequence[float], thresholds: Sequence[float]) -> list[int]:
    """The labels from their thresholds on, the most probable first."""
    told = [index for index, (share, least) in enumerate(zip(answer, thresholds, strict=True)) if share >= least]
    return sorted(told, key=lambda index: -answer[index])


def choose_thresholds(shares: np.ndarray, targets: np.ndarray) -> list[float]:
    """For every column of probabilities (N, K) the threshold with the best F1 against 1, 0 and NaN (N, K).

    A label of fewer than 5 images with or without it has the threshold that is best for all labels together.
    """
    known = ~np.isnan(targets)
    common = best_threshold(shares[known], targets[known])
    thresholds = []
    for index in range(shares.shape[1]):
        seen = known[:, index]
        found = int(targets[seen, index].sum())
        enough = FEWEST <= found <= int(seen.sum()) - FEWEST
        thresholds.append(best_threshold(shares[seen, index], targets[seen, index]) if enough else common)
    return thresholds


def best_threshold(shares: np.ndarray, targets: np.ndarray) -> float:
    """The threshold (N,) with the best F1, half way between two probabilities; 0.5 where no target is 1."""
    if not targets.any():
        return EVEN
    order = np.argsort(-shares, kind="stable")
    ranked, right = shares[order], np.cumsum(targets[order])
    scores = 2 * right / (np.arange(1, len(ranked) + 1) + targets.sum())
    scores[:-1][ranked[:-1] == ranked[1:]] = -1  # equal probabilities are told together
    last = int(scores.argmax())
    below = float(ranked[last + 1]) if last + 1 < len(ranked) else 0.0
    return (float(ranked[last]) + below) / 2


def read_labels(value: Any, classes: Sequence[str]) -> np.ndarray:
    """1, 0 and NaN (K,) from a list of names or indices, or from one of 1, 0 and -1 for every label.

    Raises `DataError` for anything else, and for a list of whole numbers that could be either.
    """
    count, index = len(classes), {name: number for number, name in enumerate(classes)}
    if isinstance(value, Tensor | np.ndarray):
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
        if array.shape != (count,):
            raise DataError(f"its labels have the shape {array.shape}; expected ({count},), a number for each label.")
        return _check_flags(array)
    if not isinstance(value, list | tuple | set | frozenset):
        raise DataError(
            f"its labels are a {type(value).__name__}; expected a list of names, or an array of 1 and 0 for each label."
        )
    given = list(value)
    if all(isinstance(one, str) for one in given):
        if unknown := [one for one in given if one not in index]:
            raise DataError(f"its label {unknown[0]!r} is none of: {', '.join(classes)[:300]}.")
        return _mark(count, [index[one] for one in given])
    if not all(isinstance(one, int | float | np.number) for one in given):
        raise DataError(f"its labels are {str(given)[:80]}; expected names, or 1 and 0 for each label.")
    numbers = np.array(given, dtype=np.float64)
    flags = len(given) == count and bool(np.isin(numbers, (0, 1, UNKNOWN)).all() or np.isnan(numbers).any())
    flags = flags and isinstance(value, list | tuple)
    if flags and sorted(given) == list(range(count)):
        raise DataError(
            f"its labels are {given}: the indices of all labels, or 0 and 1 for each. Give names, or an array of 1 and 0."
        )
    if flags:
        return _check_flags(numbers)
    wrong = [one for one in given if not float(one).is_integer() or not 0 <= one < count]
    if wrong:
        raise DataError(f"its label {wrong[0]} is none of the indices 0 to {count - 1}.")
    return _mark(count, [int(one) for one in given])


def _mark(count: int, present: Sequence[int]) -> np.ndarray:
    values = np.zeros(count)
    values[list(present)] = 1
    return values


def _check_flags(values: np.ndarray) -> np.ndarray:
    known = np.where(values == UNKNOWN, np.nan, values)
    if wrong := [float(one) for one in known if one not in (0, 1) and not np.isnan(one)]:
        raise DataError(f"its labels hold {wrong[0]:g}; expected 1, 0, or -1 for unknown.")
    return known
