"""Splits over data sets and streams of other libraries, which are read sample by sample."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.samples import LABEL_KEYS, SampleForm, to_label
from modelpatch.data.seeding import seeded
from modelpatch.data.splits import Lazy, Sample, Split
from modelpatch.errors import DataError, TrainingWarning
from modelpatch.tasks.targets import Target

SAMPLED = 64  # images that a digest is made of
PROBED = 8  # images that are read twice to find random transforms


class FormedSplit(Split):
    """Items of a data set, each made a sample by a `SampleForm`."""

    reads_in_threads = False

    def __init__(self, dataset: Any, form: SampleForm, size: int | None, workers: int | None) -> None:
        self.dataset, self.form, self.dense, self.size, self.workers = dataset, form, form.dense, size, workers
        self.transform = self.targets = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the number of samples that was given, the labels that a data set lists, and 64 samples, decoded.

        Data that differs in other samples alone has the same digest. Random transforms are seeded.
        """
        digest = hashlib.sha256(f"{self.form.source} {self.size} {self.form.classes}".encode())
        if self.labels_known and not self.is_stream:
            digest.update(self.labels.tobytes())
        with seeded(0):
            for sample in self.some(SAMPLED):
                digest.update(content(sample))
        return digest.hexdigest()


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
        *,
        workers: int | None = None,
        changes: bool | None = None,
    ) -> None:
        self.rows = np.arange(len(dataset)) if rows is None else rows
        super().__init__(dataset, form, len(self.rows), workers)
        if labels is not None or form.dense:
            self.labels = np.zeros(len(self), dtype=np.int64) if labels is None else labels
        self.images = Lazy(range(len(self)), partial(self._read, 0))
        self.targets = Lazy(range(len(self)), partial(self._read, 1)) if form.dense else None
        self.own_changes = self._find_changes() if changes is None else changes

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, row: int) -> Sample:
        """The image of a row with its class index or target. Raises `DataError` for a sample that is none."""
        number = int(self.rows[row])
        try:
            item = self.dataset[number]
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.form.source}, sample {number} cannot be read: {error!r}") from error
        return self.form.read(item, number)

    @cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Class indices, int64 (N,), from one reading of all samples; zeros for dense tasks."""
        chosen, workers = Subset(self.dataset, self.rows.tolist()), count_workers(self)
        loader = DataLoader(chosen, batch_size=64, num_workers=workers, collate_fn=self.form.read_labels)
        return np.array([label for batch in loader for label in batch], dtype=np.int64)

    def take(self, rows: np.ndarray) -> DatasetSplit:
        """The rows with these indices."""
        labels, options = self.labels[rows] if self.labels_known else None, {"changes": self.own_changes}
        split = DatasetSplit(self.dataset, self.form, self.rows[rows], labels, workers=self.workers, **options)
        return split.with_transform(self.transform)

    def _read(self, part: int, row: int) -> Any:
        with seeded(0, row):
            return self.sample(row)[part]

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

    def __init__(self, stream: Iterable[Any], form: SampleForm, size: int | None, *, workers: int | None) -> None:
        super().__init__(stream, form, size, workers)
        self._length = size

    def __len__(self) -> int:
        if self._length is None:
            warnings.warn(
                f"{self.form.source} is a stream of unknown length, and is read once to count its images. Give length=N to "
                "avoid this.",
                TrainingWarning,
                stacklevel=2,
            )
            self._length = len(self.labels)
        return self._length

    @property
    def length(self) -> int | None:
        return self._length

    @property
    def images(self) -> Sequence[Any]:  # type: ignore[override]
        return self.sample(0)

    def take(self, rows: np.ndarray) -> Split:
        """Raise `DataError`: a stream has no rows."""
        return self.sample(rows)

    def sample(self, row: Any) -> Any:
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
        """Class indices, int64 (N,), from one reading of the stream."""
        features, items = getattr(self.dataset, "features", None), self.dataset
        column = next((key for key in LABEL_KEYS if key in features), None) if isinstance(features, dict) else None
        if column is not None and hasattr(self.dataset, "select_columns"):  # images are not decoded
            items = ({"image": None, **item} for item in self.dataset.select_columns([column]))
        return np.array(self.form.read_labels(islice(items, self.length)), dtype=np.int64)


class JoinedSamples:
    """The samples of several splits, one after another, with labels of their own."""

    def __init__(self, parts: Sequence[Split], labels: np.ndarray) -> None:
        self.parts, self.labels, self.ends = parts, labels, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Sample:
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[part].sample(row - int(self.ends[part - 1] if part else 0))[0], int(self.labels[row])


def join_splits(parts: Sequence[Split], labels: np.ndarray | None = None) -> Split:
    """The images of several splits as one, with their labels or other ones, and the first one's transform."""
    labels, workers = np.concatenate([part.labels for part in parts]) if labels is None else labels, parts[0].workers
    if all(type(part) is Split for part in parts):
        images = [image for part in parts for image in part.images]
        return Split(images, labels, transform=parts[0].transform, workers=workers)
    form = SampleForm("joined images", tuple(map(str, range(int(labels.max(initial=-1)) + 1))))
    changes = any(part.own_changes for part in parts)
    split = DatasetSplit(JoinedSamples(parts, labels), form, labels=labels, workers=workers, changes=changes)
    return split.with_transform(parts[0].transform)


def content(sample: Sample) -> bytes:
    """The bytes that identify a sample: decoded pixels and label or target."""
    image, target = sample
    picture = open_image(image)
    kept = target.content() if isinstance(target, Target) else str(to_label(target)).encode()
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes() + kept).digest()


def count_workers(split: Split) -> int:
    """The number of processes that read a split: as the user says; none for few images, else one a core, at most four."""
    if multiprocessing.current_process().daemon:  # which may start none
        return 0
    if split.workers is not None:
        return split.workers
    if isinstance(split, StreamSplit):
        return min(4, os.cpu_count() or 1, getattr(split.dataset, "num_shards", 1))
    return min(4, os.cpu_count() or 1) if len(split) >= 1000 else 0
