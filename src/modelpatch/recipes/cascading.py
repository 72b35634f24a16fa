"""Build a cascade of patches: as accurate as the best of them on held-out images, at the least work on average.

    S = [], R = held-out images
    while R:
        for every patch p:  t_p = the smallest threshold at which p answers some of R, and of those at least `ratio` times
                                  as many right as the reference does, with `caution` standard errors to spare
        S += the patch with the most answers for its multiply-adds beyond what S has done already;  R -= what it answers

Streeter: *Approximation Algorithms for Cascading Prediction Models* (ICML 2018), the greedy algorithm with an accuracy
constraint relative to a reference, here the best single patch, which is always allowed at no threshold. The smallest
threshold of many tried is one that luck favoured on these images: hence the caution, 0 in the paper.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.data.splits import Split, stratified
from modelpatch.data.task import Task, check_same_split
from modelpatch.engine.cascade import MAX_STAGES, Cascade, Confidence, Weights, check_one_task, features
from modelpatch.engine.engine import Engine
from modelpatch.errors import CascadeError, DataError
from modelpatch.patch.contents import Patch
from modelpatch.tasks.classification import Evaluation
from modelpatch.train.evaluation import facts_of, logits_of
from modelpatch.train.progress import Progress, quiet_progress

KINDS = ("probability", "fitted")
Costs = Callable[..., float]  # (name, patches before it) to the multiply-adds that it adds
PROBABILITY: Weights = (1.0, 0.0, 0.0)
CAUTION = 1.0  # standard errors
ROUNDING = 1e-9  # shares of right answers are compared as whole numbers of images
BATCH = 64


@dataclass(frozen=True)
class Figures:
    """Top-1 in [0, 1], multiply-adds an image on average, and the share of images that each stage answers."""

    top1: float
    macs: float
    answered: tuple[float, ...] = ()


@dataclass(frozen=True)
class Single:
    """One patch alone, on held-out images and on test images."""

    name: str
    resolution: int
    validation: Figures
    test: Figures


@dataclass(frozen=True)
class CascadeResult:
    """A cascade, the patches it was built from, the best of them on held-out images, and the stages in `order`, by name."""

    cascade: Cascade
    singles: tuple[Single, ...]
    reference: str
    order: tuple[str, ...]
    validation: Figures
    test: Figures

    @property
    def saved(self) -> float:
        """The share of the reference's multiply-adds that the cascade saves on test images."""
        whole = next(single.test.macs for single in self.singles if single.name == self.reference)
        return 1 - self.test.macs / whole

    def as_dict(self) -> dict[str, Any]:
        return {
            "singles": [asdict(single) for single in self.singles],
            "reference": self.reference,
            "order": list(self.order),
            "confidences": [confidence.model_dump() for confidence in self.cascade.confidences],
            "validation": asdict(self.validation),
            "test": asdict(self.test),
            "saved": self.saved,
        }


def cascade(
    backbone: Backbone,
    patches: Mapping[str, Patch] | Sequence[Patch | str | Path],
    data: Task,
    *,
    accuracy: float | None = None,
    confidence: str = "probability",
    caution: float = CAUTION,
    seed: int = 0,
    progress: bool = False,
) -> CascadeResult:
    """Build a cascade of patches of one task on its held-out images, and measure it there and on its test images.

    `patches` differ in cost: by resolution, by what their heads read, by method. The held-out images are the data's
    validation split, or the share of the training images that all patches' fits held out. `accuracy` in [0, 1] is the least
    that the cascade may have on them, by default that of the best patch. `confidence` is the `probability` of the best class,
    or `fitted`: a logistic regression of right answers on probability, entropy and gap, fitted on half of the held-out images,
    the other half setting the thresholds. A stage must keep the accuracy on what it answers with `caution` standard errors
    to spare, any number from 0 on: the more, the fewer images leave early.

    Raises `CascadeError` for patches of several tasks or backbones, one patch twice, an accuracy that no patch has and a
    caution that is none, `DataError` for data without held-out images or of other classes.
    """
    named = _named(patches)
    check_one_task(list(named.values()))
    if confidence not in KINDS:
        raise CascadeError(f"confidence is {confidence!r}; expected one of: {', '.join(KINDS)}.")
    if not 0 <= caution < math.inf:
        raise CascadeError(f"caution is {caution}; expected a number of standard errors from 0 on.")
    splits = {"validation": held_out(list(named.values()), data), "test": data.test}
    right = {split: torch.from_numpy(images.labels) for split, images in splits.items()}
    seen: dict[str, dict[str, Tensor]] = {}
    with Progress("cascade") if progress else quiet_progress() as bar:
        for split, images in splits.items():
            with bar.task(f"{split} images", len(named) * len(images)) as advance:
                seen[split] = {
                    name: logits_of(backbone.patched(patch), images, patch.preprocessing, advance)
                    for name, patch in named.items()
                }
    logits, labels = seen["validation"], right["validation"]
    tops = {name: _top1(answers, labels) for name, answers in logits.items()}
    weights = dict.fromkeys(named, PROBABILITY)
    if confidence == "fitted":
        other, half = (torch.from_numpy(part) for part in stratified(labels.numpy(), 0.5, seed))
        weights = {name: fit_confidence(answers[other], labels[other]) for name, answers in logits.items()}
        logits, labels = {name: answers[half] for name, answers in logits.items()}, labels[half]
    costs = costs_of(backbone, named)
    order, confidences, reference = greedy(logits, labels, weights, costs, accuracy, caution, tops)
    figures = {split: run(order, confidences, answers, right[split], costs) for split, answers in seen.items()}
    facts = {"confidence": confidence, "caution": caution, "reference": reference, "seed": seed}
    made = Cascade(
        patches=tuple(named[name] for name in order),
        confidences=confidences,
        metrics={
            **{f"{split}_top1": one.top1 for split, one in figures.items()},
            **{f"{split}_macs": round(one.macs) for split, one in figures.items()},
        },
        created={**facts, "held_out_images": len(splits["validation"])},
    )
    singles = []
    for name, patch in named.items():
        alone = [Figures(_top1(seen[split][name], right[split]), costs(name)) for split in splits]
        singles.append(Single(name, patch.preprocessing.image_size, *alone))
    return CascadeResult(made, tuple(singles), reference, order, figures["validation"], figures["test"])


def _named(patches: Mapping[str, Patch] | Sequence[Patch | str | Path]) -> dict[str, Patch]:
    """Patches by what tables call them."""
    if not isinstance(patches, Mapping):
        listed = [patch if isinstance(patch, Patch) else Patch.load(patch) for patch in patches]
        names = [
            f"{one.method.name} {one.preprocessing.image_size} px" if isinstance(given, Patch) else Path(given).stem
            for given, one in zip(patches, listed, strict=True)
        ]
        patches = {
            name if names.count(name) == 1 else f"{name} ({number + 1})": patch
            for number, (name, patch) in enumerate(zip(names, listed, strict=True))
        }
    if not 2 <= len(patches) <= MAX_STAGES:
        raise CascadeError(f"{len(patches)} patches; a cascade is built of 2 to {MAX_STAGES}.")
    seen: dict[tuple[str, str], str] = {}
    for name, patch in patches.items():
        first = seen.setdefault((patch.content_hash, patch.preprocessing.model_dump_json()), name)
        if first != name:
            raise CascadeError(f"{first} and {name} are the same patch; give each once.")
    return dict(patches)


def held_out(patches: Sequence[Patch], data: Task) -> Split:
    """Images of the task that no patch was trained on.

    Raises `DataError` where there are none, for another task, and for another split of the data than was trained on.
    """
    _check_classes(patches[0], data)
    for patch in patches:
        check_same_split(facts_of(patch), data)
    if data.validation is None:
        settings = [patch.created.get("settings") for patch in patches]
        shares = {(one.get("validation"), one.get("seed")) if isinstance(one, dict) else None for one in settings}
        share, seed = next(iter(shares)) or (None, None)
        if len(shares) > 1 or not isinstance(share, float) or type(seed) is not int or not share:
            raise DataError(
                f"{data.task.name} has no validation images, and the patches' fits did not all hold out the same ones. Add a "
                "validation split, or train the patches with validation=0.2 and one seed."
            )
        data = data.with_validation(share, seed)
    assert data.validation is not None
    return data.validation


def _check_classes(patch: Patch, data: Task) -> None:
    if data.classes != patch.task.classes:
        raise DataError(f"{data.task.name} has other classes than the patches of {patch.task.name}. Give its own data.")


def costs_of(backbone: Backbone, patches: Mapping[str, Patch]) -> Costs:
    """Multiply-adds an image of a patch after others: what two of them compute alike is counted once."""
    keys = {name: f"{number} {name}" for number, name in enumerate(patches)}  # no patch is called "base"
    engine = Engine(backbone, {keys[name]: patch for name, patch in patches.items()}, tuning=Tuning())

    @cache
    def last(*names: str) -> float:
        return engine.stage_costs([keys[name] for name in names])[-1]

    return lambda name, before=(): last(*before, name)


# the greedy algorithm -----------------------------------------------------------------------------------------------


def greedy(
    logits: Mapping[str, Tensor],
    labels: Tensor,
    weights: Mapping[str, Weights],
    costs: Costs,
    accuracy: float | None = None,
    caution: float = CAUTION,
    tops: Mapping[str, float] | None = None,
) -> tuple[tuple[str, ...], tuple[Confidence, ...], str]:
    """The stages in order, their confidences, and the reference.

    `logits` (N, K) are the patches' answers by name, `costs(name, before)` what a patch adds after others, `tops` the top-1 by
    which the reference is chosen, that of these answers by default. Raises `CascadeError` for an accuracy that no patch has.
    """
    right = {name: answers.argmax(1) == labels for name, answers in logits.items()}
    tops = tops or {name: _top1(answers, labels) for name, answers in logits.items()}
    reference = max(tops, key=lambda name: (tops[name], -costs(name)))
    best = tops[reference]
    if accuracy is not None and not 0 < accuracy <= best + ROUNDING:
        raise CascadeError(
            f"the accuracy to keep is {accuracy:.4g}; expected one above 0 and up to {best:.4g}, which {reference}, the best "
            "patch, has on the held-out images."
        )
    ratio = 1.0 if accuracy is None else accuracy / best
    scores = {name: Confidence(weights=weights[name]).score(answers) for name, answers in logits.items()}
    left = torch.ones(len(labels), dtype=torch.bool)
    order: list[str] = []
    thresholds: list[float] = []
    while left.any():
        found = {}
        for name in logits.keys() - set(order):
            gains = right[name].double() - ratio * right[reference].double()
            spare = 0.0 if name == reference else caution  # the reference is what the others are held against
            if (threshold := smallest_threshold(scores[name][left], gains[left], spare)) is not None:
                answered = int((scores[name][left] >= threshold).sum())
                found[name] = (answered / max(costs(name, order), 1.0), threshold)
        chosen = max(sorted(found), key=lambda name: found[name][0])
        thresholds.append(found[chosen][1])
        left &= scores[chosen] < found[chosen][1]
        order.append(chosen)
    last = len(order) - 1
    confidences = tuple(
        Confidence(weights=weights[name], threshold=None if number == last else threshold)
        for number, (name, threshold) in enumerate(zip(order, thresholds, strict=True))
    )
    return tuple(order), confidences, reference


def smallest_threshold(scores: Tensor, gains: Tensor, caution: float = 0.0) -> float | None:
    """The least t, if any, for which the gains of rows with scores >= t add up to `caution` standard errors of the sum."""
    order = scores.argsort(descending=True)
    ranked, total = scores[order], gains[order].cumsum(0)
    last = torch.ones(len(ranked), dtype=torch.bool)
    last[:-1] = ranked[:-1] > ranked[1:]  # rows of one score are answered together
    count = torch.arange(1, len(ranked) + 1)
    error = (gains[order].square().cumsum(0) - total.square() / count).clamp(min=0).sqrt()
    places = (last & (total - caution * error >= -ROUNDING * len(ranked))).nonzero()
    return float(ranked[places[-1, 0]]) if len(places) else None


def run(
    order: Sequence[str],
    confidences: Sequence[Confidence],
    logits: Mapping[str, Tensor],
    labels: Tensor,
    costs: Costs,
) -> Figures:
    """Return the accuracy and cost of a cascade of these stages, from its patches' logits (N, K)."""
    stages = torch.full((len(labels),), -1)
    for number, (name, confidence) in enumerate(zip(order, confidences, strict=True)):
        stages[(stages < 0) & confidence.sure(logits[name])] = number
    answers = torch.stack([logits[name].argmax(1) for name in order])[stages, torch.arange(len(labels))]
    return _figures(float((answers == labels).double().mean()), stages, order, costs)


def _figures(top1: float, stages: Tensor, order: Sequence[str], costs: Costs) -> Figures:
    """Return the figures of a cascade from the stages (N,) that answered the images."""
    spent = np.cumsum([costs(name, order[:number]) for number, name in enumerate(order)])
    shares = torch.bincount(stages, minlength=len(order)).double() / len(stages)
    return Figures(top1, float((shares * torch.from_numpy(spent)).sum()), tuple(shares.tolist()))


def _top1(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def fit_confidence(logits: Tensor, labels: Tensor) -> Weights:
    """Weights of the features of answers by which a logistic regression tells right from wrong ones (lightly regularised)."""
    given = features(logits)
    mean, spread = given.mean(0), given.std(0).clamp(min=1e-6)
    right = (logits.argmax(1) == labels).double()
    line = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = (given - mean) / spread @ line[:3] + line[3]
        total = F.binary_cross_entropy_with_logits(found, right) + 1e-3 * line[:3].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    first, second, third = (line.detach()[:3] / spread).tolist()
    return first, second, third


def evaluate_cascade(
    backbone: Backbone, cascade: Cascade, data: Task, advance: Callable[[int], None] = lambda _: None
) -> tuple[Evaluation, Figures]:
    """A cascade on test images as the engine runs it, and what that cost. Raises `DataError` for data of other classes."""
    _check_classes(cascade.patches[0], data)
    images = data.test
    engine = Engine(backbone, {"cascade": cascade}, tuning=Tuning())
    logits, stages = [], []
    for start in range(0, len(images), BATCH):
        files = [images.images[row] for row in range(start, min(start + BATCH, len(images)))]
        routed = engine.route(engine.read(files, ["cascade"]), ["cascade"])["cascade"]
        logits.append(routed.logits.float().cpu())
        stages.append(routed.stages)
        advance(len(files))
    named = {f"stage {number + 1}": patch for number, patch in enumerate(cascade.patches)}
    result = Evaluation.of(torch.cat(logits), torch.from_numpy(images.labels), data.classes)
    return result, _figures(result.top1, torch.cat(stages), list(named), costs_of(backbone, named))
