"""Splits of a task: images, undecoded, with their class indices or targets; random and stratified shares of them.

A `Split` lists its images. The samples of a `DatasetSplit` and a `StreamSplit` are read from data sets of other libraries.
"""

import hashlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Self

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Subset

from modelpatch.backbone.preprocessing import ImageSource, image_bytes, open_any
from modelpatch.data.samples import LABEL_KEYS, SampleForm, to_label
from modelpatch.data.seeding import seeded
from modelpatch.errors import DataError, warn_caller
from modelpatch.tasks.kind import Target

SAMPLED = 64  # images that a digest is made of
PROBED = 8  # images that are read twice to find random transforms
Transform = Callable[..., Any]
Sample = tuple[ImageSource, Target | int]


@dataclass(eq=False, repr=False)
class Split:
    """Images, undecoded, and their class indices, int64 (N,).

    Images of other tasks have `targets` instead; their labels are the strata of the kind (`Kind.list_strata`), or zeros, so
    that stratified splits of them are random ones. `dense` says that targets belong to places in the images.
    `transform` is applied to images, and to the targets of dense tasks, when they are trained on. `workers` is the number of
    processes that decode them; where it is None, threads do, or with a transform processes for many images.
    """

    is_stream = False
    reads_in_threads = True
    own_changes = False  # True where two readings of an image differ without a transform

    images: Sequence[ImageSource]
    labels: np.ndarray
    targets: Sequence[Target] | None = None
    _: KW_ONLY
    transform: Transform | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        self.dense = self.targets is not None and (not len(self.targets) or self.targets[0].moves)

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

    def read_targets(self) -> Sequence[Target]:
        """All targets, for a kind whose targets are no class indices."""
        return self.targets or ()

    @property
    def changes(self) -> bool:
        """True where an image of the training set may differ from one reading to the next."""
        return self.is_stream or self.augments

    @property
    def augments(self) -> bool:
        """True where random transforms make views of the images already."""
        return self.own_changes or self.transform is not None

    def __getitem__(self, row: int) -> Sample:
        """The image of a row with its class index or target."""
        return self.images[row], int(self.labels[row]) if self.targets is None else self.targets[row]

    def some(self, count: int) -> Iterator[Sample]:
        """At most `count` samples, spread over all."""
        return (self[row] for row in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)))

    def take(self, rows: np.ndarray) -> "Split":
        """The rows with these indices."""
        targets = None if self.targets is None else [self.targets[row] for row in rows]
        return replace(self, images=[self.images[row] for row in rows], labels=self.labels[rows], targets=targets)

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


class FormedSplit(Split):
    """Items of a data set, each made a sample by a `SampleForm`."""

    reads_in_threads = False

    def __init__(self, dataset: Any, form: SampleForm, size: int | None, workers: int | None) -> None:
        self.dataset, self.form, self.dense, self.size, self.workers = dataset, form, form.dense, size, workers

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the given number of samples, the labels that a data set lists, and 64 samples, decoded, with a seed."""
        digest = hashlib.sha256(f"{self.form.source} {self.size} {self.form.classes}".encode())
        if self.labels_known and not self.is_stream:
            digest.update(self.labels.tobytes())
        if self.form.target is not None and not self.dense:
            digest.update(b"".join(target.content() for target in self.read_targets()))
        with seeded(0):
            for sample in self.some(SAMPLED):
                digest.update(content(sample))
        return digest.hexdigest()

    @cached_property
    def vectors(self) -> list[Any]:
        """The targets of a task that is neither dense nor one of class indices, from one reading of all samples."""
        return self._read_all()

    def read_targets(self) -> Sequence[Target]:
        return self.vectors

    def _read_all(self) -> list[Any]:
        """The class index or target of every sample, 0 for dense targets."""
        raise NotImplementedError


class DatasetSplit(FormedSplit):
    """Rows of a data set with random access, torch's or another.

    Labels that the data set does not list are read once, when they are first asked for. `changes` says that its images differ
    from one reading to the next; where it is None, some are read twice to find out.
    """

    def __init__(
        self,
        dataset: Any,
        form: SampleForm,
        rows: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        vectors: Sequence[Target] | None = None,
        *,
        workers: int | None = None,
        changes: bool | None = None,
    ) -> None:
        self.rows = np.arange(len(dataset)) if rows is None else rows
        super().__init__(dataset, form, len(self.rows), workers)
        if labels is not None or form.dense:
            self.labels = np.zeros(len(self), dtype=np.int64) if labels is None else labels
        if vectors is not None:
            self.vectors = list(vectors)
        self.images = Lazy(range(len(self)), partial(self._read, 0))
        self.targets = None if form.target is None else Lazy(range(len(self)), partial(self._read, 1))
        self.own_changes = self._find_changes() if changes is None else changes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        """The image of a row with its class index or target. Raises `DataError` for a sample that is none."""
        number = int(self.rows[row])
        try:
            item = self.dataset[number]
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.form.source}, sample {number} cannot be read: {error!r}") from error
        image, target = self.form.read(item, number)
        return image, target if self.targets is not None or not self.labels_known else int(self.labels[row])

    @cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Class indices or strata, int64 (N,), from one reading of all samples; zeros for dense tasks."""
        found = self.form.list_strata(self.vectors) if self.form.target is not None else self._read_all()
        return np.array(found, dtype=np.int64)

    def _read_all(self) -> list[Any]:
        chosen, workers = Subset(self.dataset, self.rows.tolist()), count_workers(self)
        loader = DataLoader(chosen, batch_size=64, num_workers=workers, collate_fn=self.form.read_targets)
        return [target for batch in loader for target in batch]

    def take(self, rows: np.ndarray) -> "DatasetSplit":
        """The rows with these indices."""
        labels, changes = self.labels[rows] if self.labels_known else None, self.own_changes
        vectors = [self.vectors[row] for row in rows] if "vectors" in self.__dict__ else None
        split = DatasetSplit(
            self.dataset, self.form, self.rows[rows], labels, vectors, workers=self.workers, changes=changes
        )
        return split.with_transform(self.transform)

    def _read(self, part: int, row: int) -> Any:
        with seeded(0, row):
            return self[row][part]

    def _find_changes(self) -> bool:
        readings = []
        for number in (0, 1):
            with seeded(number):
                readings.append([content(sample) for sample in self.some(PROBED)])
        return readings[0] != readings[1]


class StreamSplit(FormedSplit):
    """Samples of a stream, which is read from its beginning in every epoch.

    An epoch has `size` images; a stream of unknown length is read once to count them when the number is asked for.
    """

    is_stream = True

    def __len__(self) -> int:
        if self.length is None:
            warn_caller(
                f"{self.form.source} is a stream of unknown length, and is read once to count its images. Give length=N to "
                "avoid this."
            )
        return len(self.labels) if self.size is None else self.size

    @property
    def length(self) -> int | None:
        return len(self.labels) if self.size is None and self.labels_known else self.size

    @property
    def images(self) -> Sequence[Any]:  # type: ignore[override]
        return self[0]

    def take(self, rows: np.ndarray) -> Split:
        """Raise `DataError`: a stream has no rows."""
        return self[rows]

    def __getitem__(self, row: Any) -> Any:
        """Raise `DataError`: a stream has no rows."""
        raise DataError(
            f"{self.form.source} is a stream, and this needs its images by number. Use fit and evaluate, with "
            "validation=... for held-out images, or give a Dataset with random access."
        )

    def some(self, count: int) -> Iterator[Sample]:
        """The first samples of the stream."""
        with seeded(0):
            yield from list(islice(self.open(0), count))

    def open(self, epoch: int) -> Iterator[Sample]:
        """The samples of an epoch in the stream's order. A stream with `set_epoch` is told the epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        for number, item in enumerate(islice(iter(self.dataset), self.length)):
            yield self.form.read(item, number)

    @cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Class indices, int64 (N,), from one reading of the stream; zeros for other targets."""
        found = self._read_all() if self.form.target is None else [0] * len(self.vectors)
        return np.array(found, dtype=np.int64)

    def _read_all(self) -> list[Any]:
        features, items = getattr(self.dataset, "features", None), self.dataset
        column = next((key for key in LABEL_KEYS if key in features), None) if isinstance(features, dict) else None
        if column is not None and hasattr(self.dataset, "select_columns"):  # images are not decoded
            items = ({"image": None, **item} for item in self.dataset.select_columns([column]))
        return self.form.read_targets(islice(items, self.size))


def join_splits(parts: Sequence[Split], labels: np.ndarray | None = None) -> Split:
    """The images of several splits as one, with their labels or other ones, and the first one's transform."""
    labels, workers = np.concatenate([part.labels for part in parts]) if labels is None else labels, parts[0].workers
    if all(type(part) is Split for part in parts):
        images = [image for part in parts for image in part.images]
        return Split(images, labels, transform=parts[0].transform, workers=workers)
    form = SampleForm("joined images", tuple(map(str, range(int(labels.max(initial=-1)) + 1))))
    changes = any(part.own_changes for part in parts)
    samples = ConcatDataset[Sample](parts)  # type: ignore[arg-type]
    split = DatasetSplit(samples, form, labels=labels, workers=workers, changes=changes)
    return split.with_transform(parts[0].transform)


def content(sample: Sample) -> bytes:
    """The bytes that identify a sample: decoded pixels and label or target."""
    image, target = sample
    picture = open_any(image)
    kept = target.content() if isinstance(target, Target) else str(to_label(target)).encode()
    return hashlib.sha256(f"{picture.size}".encode() + np.asarray(picture).tobytes() + kept).digest()


def count_workers(split: Split, threaded: bool = False) -> int:
    """The number of processes that read a split: as the user says, by default none beside threads or for few images, else one
    a core, at most four."""
    if multiprocessing.current_process().daemon:  # which may start none
        return 0
    if split.workers is not None:
        return split.workers
    if threaded:
        return 0
    if isinstance(split, StreamSplit):
        return min(4, os.cpu_count() or 1, getattr(split.dataset, "num_shards", 1))
    return min(4, os.cpu_count() or 1) if len(split) >= 1000 else 0


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


def split_seed(facts: Mapping[str, Any]) -> int | None:
    """The seed of the test split that these facts of a task's data record, or None where the source has its own."""
    recorded = facts.get("test_split")
    if isinstance(recorded, Mapping):
        seed = recorded.get("seed")
        return seed if isinstance(seed, int) else None
    found = re.fullmatch(r"stratified \d+%, seed (\d+)", str(recorded))  # in files of the first edition
    return int(found[1]) if found else None


def source_size(split: Split, sample: int = 16) -> int:
    """The median shorter side of the images, in pixels, from a few of them."""
    with seeded(0):
        return int(np.median([min(open_any(image).size) for image, _ in split.some(sample)]))
