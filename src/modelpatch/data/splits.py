"""Splits of a task: images, undecoded, with their class indices or targets; random and stratified shares of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Self

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource, image_bytes, open_image
from modelpatch.data.seeding import seeded
from modelpatch.errors import DataError
from modelpatch.tasks.targets import Target

Transform = Callable[..., Any]
Sample = tuple[ImageSource, Target | int]


class Split:
    """Images, undecoded, and their class indices, int64 (N,).

    Images of dense tasks have `targets` instead; their labels are zeros, so that stratified splits of them are random ones.
    `transform` is applied to images, and to the targets of dense tasks, when they are trained on. `workers` is the number of
    processes that decode them, chosen by the number of images where it is None.
    """

    is_stream = False
    reads_in_threads = True
    own_changes = False  # True where two readings of an image differ without a transform

    def __init__(
        self,
        images: Sequence[ImageSource],
        labels: np.ndarray,
        targets: Sequence[Target] | None = None,
        *,
        transform: Transform | None = None,
        workers: int | None = None,
    ) -> None:
        self.images, self.labels, self.targets, self.dense = images, labels, targets, targets is not None
        self.transform, self.workers = transform, workers

    def __len__(self) -> int:
        return len(self.images)

    @property
    def length(self) -> int | None:
        """The number of images, None where it is unknown."""
        return len(self)

    @property
    def labels_known(self) -> bool:
        """True where `labels` are at hand, without reading images."""
        return "labels" in self.__dict__

    @property
    def changes(self) -> bool:
        """True where an image of the training set may differ from one reading to the next."""
        return self.is_stream or self.augments

    @property
    def augments(self) -> bool:
        """True where random transforms make views of the images already."""
        return self.own_changes or self.transform is not None

    def sample(self, row: int) -> Sample:
        """The image of a row with its class index or target."""
        return self.images[row], int(self.labels[row]) if self.targets is None else self.targets[row]

    def some(self, count: int) -> Iterator[Sample]:
        """At most `count` samples, spread over all."""
        return (self.sample(row) for row in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)))

    def take(self, rows: np.ndarray) -> Split:
        """The rows with these indices."""
        targets = None if self.targets is None else [self.targets[row] for row in rows]
        images = [self.images[row] for row in rows]
        return Split(images, self.labels[rows], targets, transform=self.transform, workers=self.workers)

    def with_transform(self, transform: Transform | None) -> Self:
        """The same split with another transform."""
        split = copy(self)
        split.transform = transform
        return split

    @cached_property
    def digest(self) -> str:
        """SHA-256 of labels, targets and every image's bytes as they lie on disk or in memory, 64 hexadecimal digits."""
        digest = hashlib.sha256(self.labels.tobytes())
        for image in self.images:
            digest.update(hashlib.sha256(image_bytes(image)).digest())
        for target in self.targets or ():
            digest.update(hashlib.sha256(target.content()).digest())
        return digest.hexdigest()


class Lazy(Sequence[Any]):
    """The values of a sequence, each converted when it is asked for."""

    def __init__(self, values: Any, convert: Callable[[Any], Any]) -> None:
        self.values, self.convert = values, convert

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: Any) -> Any:
        rows = range(len(self))[row]
        return [self[one] for one in rows] if isinstance(rows, range) else self.convert(self.values[rows])


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (rest, share): `share` holds about `fraction` of each class, at least one of each with two rows."""
    check_seed(seed)
    generator = np.random.default_rng(seed)
    share: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        share.append(rows[: max(round(fraction * len(rows)), int(len(rows) > 1))])
    taken = np.sort(np.concatenate(share))
    return np.setdiff1d(np.arange(len(labels)), taken), taken


def drawn(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Exactly `count` row indices: one of every class if there are that many, and beyond that every class in proportion.

    The n images of a class are spaced evenly between 0 and 1, its first one at 0; the lowest are taken, and among equals
    the seed decides.
    """
    check_seed(seed)
    generator = np.random.default_rng(seed)
    rows, places = generator.permutation(len(labels)), np.zeros(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels[rows] == label)
        places[own[1:]] = (np.arange(1, len(own)) + 0.5) / len(own)
    return np.sort(rows[np.argsort(places, kind="stable")[:count]])


def check_seed(seed: Any) -> None:
    """Raise `DataError` for a seed that is not a whole number from 0 on."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"the seed of a split is {seed!r}; expected a whole number from 0 on.")


def split_facts(fraction: float, seed: int) -> dict[str, Any]:
    """The facts about a test split cut from the training images, as a patch file records them."""
    return {"test_split": {"fraction": fraction, "seed": int(seed)}}


def split_seed(facts: Mapping[str, Any]) -> int | None:
    """The seed of the test split that these facts of a task's data record, or None where the source has its own.

    Files of the first edition record it as `stratified 20%, seed 0`.
    """
    recorded = facts.get("test_split")
    if isinstance(recorded, Mapping):
        seed = recorded.get("seed")
        return seed if isinstance(seed, int) else None
    found = re.fullmatch(r"stratified \d+%, seed (\d+)", str(recorded))
    return int(found[1]) if found else None


def source_size(split: Split, sample: int = 16) -> int:
    """The median shorter side of the images, in pixels, from a few of them."""
    with seeded(0):
        return int(np.median([min(open_image(image).size) for image, _ in split.some(sample)]))
