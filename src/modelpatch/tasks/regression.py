"""One or several numbers an image.

    answers   numbers (B, K) in the user's units      loss      squared error, absolute error or Huber's
    targets   numbers (B, K), NaN where unknown       metrics   R² = 1 - Σ(y - ŷ)² / Σ(y - mean y)²; MAE = mean |y - ŷ|;
                                                                RMSE; each the mean over outputs

A model is trained on (y - mean) / std of the training targets, which the patch keeps. They are folded into its head,
W' = std W, b' = std b + mean, so that whatever runs a patch answers in the user's units.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from modelpatch.errors import DataError, MethodNotApplicableError, TrainingError
from modelpatch.heads.base import Head
from modelpatch.tasks.drawing import Color, palette
from modelpatch.tasks.kind import ElementLoss, Facts, Result, TargetFacts, TensorMeter, View, register_kind
from modelpatch.tasks.losses import huber, l1, l2
from modelpatch.tasks.scores import Interval, bootstrap_interval
from modelpatch.tasks.vector import Vector, VectorKind, read_numbers, refuse_others

BINS = 10  # of the first number: parts of a data set over which images are spread evenly
LARGEST_HALF = 6e4  # of float16
NOISE = 1e-12  # of the largest number: deviations below are those of rounding
DEVIATIONS = 4  # beyond which an answer is not expected
OPTIONS = ("mean", "std")


@dataclass(frozen=True)
class RegressionResult(Result):
    """Means over outputs, in the user's units but for R². `per_class` are the mean absolute errors of the outputs."""

    r2: float
    mae: float
    rmse: float
    images: int
    per_class: dict[str, float]
    per_class_r2: dict[str, float]
    interval: Interval | None = None


class NumberMeter(TensorMeter):
    """Collects numbers (B, K) and targets (B, K)."""

    def result(self) -> RegressionResult:
        answers, targets = self.answers.double(), self.targets.double()
        squares, sizes, scores = [], {}, {}
        for index, name in enumerate(self.classes):
            known = ~targets[:, index].isnan()
            if not known.any():
                continue
            wanted = targets[known, index]
            error = answers[known, index] - wanted
            spread, square = float((wanted - wanted.mean()).square().sum()), float(error.square().sum())
            varies = float(wanted.min()) < float(wanted.max())  # the mean of equal numbers is not always one of them
            scores[name] = 1 - square / spread if varies else float(square == 0)  # as scikit-learn has it
            squares.append(math.sqrt(square / len(wanted)))
            sizes[name] = float(error.abs().mean())
        if not sizes:
            raise DataError("no image that is measured has a known number. Expected some.")
        return RegressionResult(
            r2=sum(scores.values()) / len(scores),
            mae=sum(sizes.values()) / len(sizes),
            rmse=sum(squares) / len(squares),
            images=len(targets),
            per_class=sizes,
            per_class_r2=scores,
        )

    def interval(self) -> Interval | None:
        """The bootstrap's, over images."""
        answers, targets = self.answers.double().numpy(), self.targets.double().numpy()
        known = ~np.isnan(targets)
        wanted = np.where(known, targets, 0.0)
        squares = np.where(known, answers - wanted, 0.0) ** 2
        noise = (NOISE * np.abs(wanted).max(0)) ** 2

        def measure(times: np.ndarray) -> float:
            count = times @ known
            mean = times @ wanted / np.maximum(count, 1)
            spread = times @ (known * (wanted - mean) ** 2)
            kept = spread > count * noise
            return float((1 - (times @ squares)[kept] / spread[kept]).mean()) if kept.any() else 0.0

        return bootstrap_interval(len(targets), measure)


@register_kind
class Regression(VectorKind):
    """Numbers of an image; answers are (B, K) in the user's units."""

    name: ClassVar[str] = "regression"
    metrics: ClassVar[Mapping[str, str]] = {"r2": "R²", "mae": "MAE", "rmse": "RMSE"}
    meter_type = NumberMeter
    per_class = "MAE"
    noun = "number"
    nouns = "numbers"
    losses: ClassVar[Mapping[str, ElementLoss]] = {"l2": l2, "l1": l1, "huber": huber}
    weighs_classes = False
    smooths_labels = False
    counted = ""
    in_percent = False
    exact = frozenset({"head.bias"})  # which holds the mean

    # data ---------------------------------------------------------------------------------------------------

    def read_target(self, value: Any, classes: Sequence[str]) -> Vector:
        """A target from a number, or from a list or array of one for every output; NaN and None are unknown."""
        try:
            raw = value.detach().cpu() if isinstance(value, Tensor) else value
            given = [raw] if np.ndim(raw) == 0 else list(raw)
            if any(isinstance(one, str | bool) for one in given):
                raise TypeError
            numbers = np.array([np.nan if one is None else float(one) for one in given], dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"its label is {str(value)[:80]!r}; expected a number, or a list of numbers.") from None
        if numbers.shape != (len(classes),):
            raise DataError(
                f"its label has {len(numbers)} numbers; expected {len(classes)}: {', '.join(classes)[:200]}."
            )
        if np.isinf(numbers).any():
            raise DataError("its label is infinite; expected a finite number.")
        return Vector(numbers)

    def name_classes(self, values: Iterable[Any]) -> tuple[str, ...] | None:
        """`number`, or `number 1` and so on for several."""
        count = np.size(next(iter(values), 0.0))
        return ("number",) if count == 1 else tuple(f"number {one}" for one in range(1, count + 1))

    def list_strata(self, targets: Sequence[Vector]) -> Sequence[int]:
        """The tenth of all images in which an image's first number lies; of fewer than 100 images a larger part."""
        first = np.array([one.values[0] for one in targets])
        known = first[~np.isnan(first)]
        if not len(known):
            return [0] * len(targets)
        bins = min(max(len(known) // BINS, 1), BINS)
        edges = np.unique(np.quantile(known, np.arange(1, bins) / bins)) if bins > 1 else np.zeros(0)
        return np.where(np.isnan(first), BINS, np.searchsorted(edges, first, side="right")).tolist()

    def check_options(self, classes: Sequence[str], options: Mapping[str, Any]) -> None:
        refuse_others(options, OPTIONS, self.name)
        if not options:
            return
        _, deviations = (read_numbers(options, name, len(classes)) for name in OPTIONS)
        if min(deviations) <= 0:
            raise ValueError("a standard deviation is not above 0")

    def examine(self, target: Vector, size: tuple[int, int] | None = None) -> TargetFacts:
        unknown = ("no known number",) if np.isnan(target.values).all() else ()
        return TargetFacts(problems=unknown, numbers=tuple(target.values.tolist()))

    def caption(self, target: Vector, classes: Sequence[str]) -> str:
        known = [(name, value) for name, value in zip(classes, target.values, strict=True) if not np.isnan(value)]
        return ", ".join(f"{name} {show_number(value)}" for name, value in known) or "unknown"

    # training -----------------------------------------------------------------------------------------------

    def prepare(self, targets: Tensor, classes: Sequence[str]) -> dict[str, Any]:
        """Mean and standard deviation of the known training targets. Raises `DataError` for a number that never varies."""
        means, deviations = [], []
        for index, name in enumerate(classes):
            known = targets[~targets[:, index].isnan(), index].double()
            if len(known) < 2 or float(known.min()) == float(known.max()):
                found = f"the same in all {len(known)} training images that have it" if len(known) else "unknown in all"
                raise DataError(f"the number {name!r} is {found}. Expected one that varies.")
            means.append(float(known.mean()))
            deviations.append(float(known.std(correction=0)))
        return {"mean": means, "std": deviations}

    def check_head(self, head: nn.Module, dtype: str, options: Mapping[str, Any]) -> None:
        """Raise `MethodNotApplicableError` for a head without weight and bias, `TrainingError` for numbers beyond float16."""
        stored = head.stored() if isinstance(head, Head) else {}
        if not {"weight", "bias"} <= stored.keys():
            raise MethodNotApplicableError(
                f"a {type(head).__name__} has no bias, which numbers need. Choose another method."
            )
        if dtype == "float16" and DEVIATIONS * max(options["std"]) > LARGEST_HALF:
            raise TrainingError(
                f"numbers with a standard deviation of {max(options['std']):.3g} are more than float16 holds. Store the patch "
                "as float32, bfloat16 or int8 (dtype=), or give the numbers in a larger unit."
            )

    def to_trained(self, targets: Tensor, options: Mapping[str, Any], label_smoothing: float) -> Tensor:
        mean, std = _normalisation(options, targets)
        return targets if mean is None or std is None else (targets - mean) / std

    def to_answers(self, outputs: Tensor, options: Mapping[str, Any]) -> Tensor:
        mean, std = _normalisation(options, outputs)
        return outputs if mean is None or std is None else outputs * std + mean

    def finish_head(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Mapping[str, Tensor]:
        weight, bias = (tensors[name].double() for name in ("weight", "bias"))
        mean, std = _normalisation(options, bias)
        if mean is None or std is None:
            return tensors
        return {**tensors, "weight": (weight * std[:, None]).float(), "bias": (bias * std + mean).float()}

    def show_figure(self, name: str, value: float) -> str:
        return f"{value:.3f}" if name == "r2" else show_number(value)

    # meaning ------------------------------------------------------------------------------------------------

    def reduce(self, answers: Tensor, top: int = 5) -> list[list[float]]:
        """The numbers of each image."""
        return answers.float().cpu().tolist()

    def describe(self, answer: list[float], view: View, top: int = 5) -> list[Facts]:
        return [{"label": view.name(index), "value": value} for index, value in enumerate(answer)]

    def to_json(self, answer: list[float], view: View, top: int = 5) -> Facts:
        return {
            "values": [{"name": view.name(index), "index": index, "value": one} for index, one in enumerate(answer)]
        }

    def summarize(self, facts: Sequence[Facts]) -> list[str]:
        return [f"{one['label']} {show_number(one['value'])}" for one in facts]

    def list_entries(self, answer: list[float], view: View) -> list[tuple[Color, str]]:
        colors = [tuple(color) for color in palette(len(answer)).tolist()]
        return [(colors[index], f"{view.name(index)} {show_number(value)}") for index, value in enumerate(answer)]


def show_number(value: float) -> str:
    """A number as text, in four digits or all those before the point."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _normalisation(options: Mapping[str, Any], like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation (K,) of the training targets, None where a task has none."""
    if not options:
        return None, None
    mean, std = (torch.tensor(options[name], dtype=like.dtype, device=like.device) for name in OPTIONS)
    return mean, std
