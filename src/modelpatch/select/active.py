"""Active learning: which images to label next, and what labelling them is worth.

    margin(x) = p_1(x) - p_2(x)        the two most probable classes; the smallest margins are labelled next

Kaplun et al.: *Less is More: Selective Layer Finetuning with SubTuning* (2023), section 4.4. Every round trains anew, from
the base; images are scored as they are, not augmented.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.augmentation import choose_augmentation
from modelpatch.data.splits import Split, join_splits
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DataError
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.patch.contents import Patch
from modelpatch.select.trials import DISK, Journal, share_images
from modelpatch.text import digest_of
from modelpatch.train.evaluation import logits_of, standard_error
from modelpatch.train.fitting import Fit
from modelpatch.train.inputs import SharedImages, SharedInputs
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitSettings, check_settings

STRATEGIES = ("margin", "random")


@dataclass(frozen=True)
class Pick:
    """An image to label: its position among those given, its margin in [0, 1] and the two classes it lies between."""

    position: int
    margin: float
    first: str
    second: str


def margins(logits: Tensor) -> Tensor:
    """p_1 - p_2 of every row of logits (N, K): (N,) in [0, 1]."""
    best = logits.double().softmax(1).topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def pick(
    backbone: Backbone, patch: Patch, images: Sequence[ImageSource], budget: int, bar: Progress | None = None
) -> list[Pick]:
    """The `budget` images on which the patch is least sure, the least sure first; all of them if there are fewer.

    Raises `DataError` for a budget below 1, for no images, and for images that cannot be read.
    """
    if budget < 1 or not images:
        raise DataError(f"{budget} of {len(images)} images are to be labelled; expected at least 1 of 1.")
    split = Split(images, np.zeros(len(images), dtype=np.int64))
    with (bar or quiet_progress()).task("unlabelled images", len(images)) as advance:
        logits = logits_of(backbone.patched(patch), split, patch.preprocessing, advance)
    found, classes = margins(logits), patch.task.classes
    best = logits.topk(2, dim=1).indices.tolist()
    order = found.argsort(stable=True)[:budget].tolist()
    return [Pick(n, float(found[n]), classes[best[n][0]], classes[best[n][1]]) for n in order]


# simulation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelRound:
    """One round of a simulation: the test accuracy in [0, 1] with the images labelled so far, and the rows picked next."""

    top1: float
    picked: list[int]


@dataclass(frozen=True)
class Curves:
    """Accuracies in [0, 1] by strategy, seed and number of labels."""

    task: str
    backbone: str
    method: str
    labels: tuple[int, ...]
    top1s: dict[str, tuple[tuple[float, ...], ...]]

    def mean(self, strategy: str) -> list[float]:
        """The mean over seeds at every number of labels."""
        return [statistics.fmean(column) for column in zip(*self.top1s[strategy], strict=True)]

    def error(self, strategy: str) -> list[float]:
        """The standard error over seeds, 0 for one seed."""
        columns = list(zip(*self.top1s[strategy], strict=True))
        return [standard_error(column) or 0.0 for column in columns]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def simulate(
    backbone: Backbone,
    data: Task,
    method: Method | str = "subset",
    *,
    labels: Sequence[int],
    seeds: int = 1,
    rounds: str | Path | None = None,
    disk: int = DISK,
    progress: bool = False,
    **settings: Any,
) -> Curves:
    """Active learning on labelled data: accuracy on the test images against the number of labels, by margin and at random.

    Each seed draws the first `labels[0]` training images at random, the same for both strategies; each round trains a patch
    from the base on what is labelled, measures it, and labels more, up to the next of `labels`. `rounds` names a file from
    which an interrupted simulation goes on. The rest are settings of `fit`. Raises `DataError` for numbers of labels that
    do not rise or are more than there are training images.
    """
    check_classification(data, "label")
    counts = tuple(labels)
    if not counts or counts[0] < 2 or list(counts) != sorted(set(counts)) or counts[-1] > len(data.train):
        raise DataError(
            f"labels = {', '.join(map(str, counts)) or 'none'}: expected rising numbers from 2 to {len(data.train)}, the "
            "number of training images."
        )
    chosen = make_method(method) if isinstance(method, str) else method
    checked = check_settings(settings)
    checked = replace(checked, augment=choose_augmentation(checked.augment, data.train).name)  # type: ignore[arg-type]
    bar = Progress(f"label on {data.task.name}") if progress else quiet_progress()
    with bar:
        run = Simulation(backbone, data, chosen, counts, checked, Journal(LabelRound, rounds), disk, bar)
        found = {name: tuple(run.curve(name, checked.seed + n) for n in range(seeds)) for name in STRATEGIES}
    backbone.verify_tensors()
    return Curves(data.task.name, backbone.spec, chosen.name, counts, found)


@dataclass(frozen=True)
class Simulation:
    """All curves of one simulation, over shared activations."""

    backbone: Backbone
    data: Task
    method: Method
    counts: tuple[int, ...]
    settings: FitSettings
    journal: Journal[LabelRound]
    disk: int
    bar: Progress

    @cached_property
    def identity(self) -> str:
        """A hash of all that rounds depend on besides their curve and what is labelled."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in ("memory", "seed")}
        images = [self.data.train.digest, self.data.test.digest]
        method = [self.method.name, self.method.hyperparameters()]
        return digest_of([self.backbone.identity, *images, *method, settings])

    @cached_property
    def shared(self) -> SharedImages:
        """Activations of training and test images, computed when first needed."""
        both = join_splits([self.data.train, self.data.test])
        return share_images(self.backbone, both, self.settings, self.disk, self.bar)

    def curve(self, strategy: str, seed: int) -> tuple[float, ...]:
        """Accuracies by number of labels."""
        generator = np.random.default_rng(seed)
        labelled = np.sort(generator.permutation(len(self.data.train))[: self.counts[0]])
        top1s = []
        with self.bar.task(f"{strategy}, seed {seed}", len(self.counts)) as advance:
            for count, following in zip(self.counts, (*self.counts[1:], self.counts[-1]), strict=True):
                more = following - count
                what = {"strategy": strategy, "seed": seed, "labelled": labelled.tolist(), "more": more}
                key = digest_of([self.identity, what])[:32]
                if key not in self.journal.outcomes:
                    what = {"strategy": strategy, "seed": seed, "labels": count}
                    self.journal.add(key, what, self._round(strategy, seed, labelled, more))
                found = self.journal.outcomes[key]
                top1s.append(found.top1)
                labelled = np.sort(np.concatenate([labelled, np.array(found.picked, dtype=np.int64)]))
                advance(1)
        return tuple(top1s)

    def _round(self, strategy: str, seed: int, labelled: np.ndarray, more: int) -> LabelRound:
        count = len(self.data.train)
        pool = np.setdiff1d(np.arange(count), labelled)
        rows = {"train": labelled, "test": np.arange(count, count + len(self.data.test)), "pool": pool}
        source = SharedInputs(self.shared, {name: torch.from_numpy(part) for name, part in rows.items()})
        data = replace(self.data, train=self.data.train.take(labelled), validation=None)
        fit = Fit(self.backbone, data, self.method, replace(self.settings, seed=seed), source=source)
        top1 = fit.run().metrics["test_top1"]
        if strategy == "random" or not more:
            picked = np.random.default_rng([seed, len(labelled)]).choice(pool, more, replace=False)
        else:
            picked = pool[margins(fit.logits(fit.model, "pool")).argsort(stable=True)[:more].numpy()]
        return LabelRound(top1, sorted(picked.tolist()))
