"""Splits over data sets and streams of other libraries, which are read sample by sample."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.samples import LABEL_KEYS, SampleForm, split_item, to_label
from modelpatch.data.seeding import seeded
from modelpatch.data.splits import Sample, Split, Transform
from modelpatch.errors import DataError, TrainingWarning
from modelpatch.tasks.targets import Target

SAMPLED = 64  # images that a digest is made of
PROBED = 8  # images that are read twice to find random transforms


class DatasetSplit(Split):
    """Rows of a data set with random access, torch's or another.

    Labels that the data set does not list are read once, when they are first asked for.
    """

    reads_in_threads = False

    def __init__(
        self,
        dataset: Any,
        form: SampleForm,
        rows: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        *,
        transform: Transform | None = None,
        workers: int | None = None,
        changes: bool | None = None,
    ) -> None:
        self.dataset, self.form, self.transform, self.workers = dataset, form, transform, workers
        self.rows = np.arange(len(dataset)) if rows is None else rows
        if labels is not None:
            self.labels = labels
        self.images = ReadImages(self)
        self.targets = ReadTargets(self) if form.dense else None
        self.own_changes = self._find_changes() if changes is None else changes

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels_known(self) -> bool:
        return self.form.dense or "labels" in self.__dict__

    @property
    def changes(self) -> bool:
        return self.own_changes or self.transform is not None

    @property
    def augments(self) -> bool:
        return self.changes

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
        if self.form.dense:
            return np.zeros(len(self), dtype=np.int64)
        loader = DataLoader(LabelReader(self), batch_size=64, num_workers=count_workers(self), collate_fn=list)
        return np.array([label for batch in loader for label in batch], dtype=np.int64)

    def take(self, rows: np.ndarray) -> DatasetSplit:
        """The rows with these indices."""
        labels = self.labels[rows] if self.labels_known else None
        return self._copy(self.rows[rows], labels, self.transform)

    def with_transform(self, transform: Transform | None) -> DatasetSplit:
        """The same split with another transform."""
        return self._copy(self.rows, self.labels if self.labels_known else None, transform)

    def _copy(self, rows: np.ndarray, labels: np.ndarray | None, transform: Transform | None) -> DatasetSplit:
        options: dict[str, Any] = {"transform": transform, "workers": self.workers, "changes": self.own_changes}
        return DatasetSplit(self.dataset, self.form, rows, labels, **options)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the number of samples, the labels where they are known, and 64 samples spread over all, decoded.

        A data set that differs in other images alone has the same digest. Random transforms are seeded.
        """
        digest = hashlib.sha256(f"{self.form.source} {len(self)} {self.form.classes}".encode())
        if self.labels_known:
            digest.update(self.labels.tobytes())
        with seeded(0):
            for sample in self.some(SAMPLED):
                digest.update(content(sample))
        return digest.hexdigest()

    def _find_changes(self) -> bool:
        """True where images differ between two readings: the data set has random transforms of its own."""
        readings = []
        for number in (0, 1):
            with seeded(number):
                readings.append([content(sample) for sample in self.some(PROBED)])
        return readings[0] != readings[1]


class StreamSplit(Split):
    """Samples of a stream, which is read from its beginning in every epoch.

    An epoch has `length` images; a stream of unknown length is read once to count them when the number is asked for.
    """

    is_stream = True
    reads_in_threads = False

    def __init__(
        self,
        stream: Iterable[Any],
        form: SampleForm,
        length: int | None = None,
        *,
        transform: Transform | None = None,
        workers: int | None = None,
    ) -> None:
        self.stream, self.form, self.transform, self.workers = stream, form, transform, workers
        self._given, self._length, self.targets = length, length, None

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
    def dense(self) -> bool:
        return self.form.dense

    @property
    def changes(self) -> bool:
        return True

    @property
    def labels_known(self) -> bool:
        return "labels" in self.__dict__

    @property
    def images(self) -> Sequence[Any]:  # type: ignore[override]
        raise self._refuse("its images by number")

    def take(self, rows: np.ndarray) -> Split:
        """Raise `DataError`: a stream has no rows."""
        raise self._refuse("some of its images")

    def sample(self, row: int) -> Sample:
        """Raise `DataError`: a stream has no rows."""
        raise self._refuse("its images by number")

    def some(self, count: int) -> Iterator[Sample]:
        """The first samples of the stream."""
        with seeded(0):
            yield from list(islice(self.open(0), count))

    def with_transform(self, transform: Transform | None) -> StreamSplit:
        """The same split with another transform."""
        return StreamSplit(self.stream, self.form, self._given, transform=transform, workers=self.workers)

    def open(self, epoch: int) -> Iterator[Sample]:
        """The samples of an epoch in the stream's order. A stream with `set_epoch` is told the epoch."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        for number, item in enumerate(islice(iter(self.stream), self.length)):
            yield self.form.read(item, number)

    @cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Class indices, int64 (N,), from one reading of the stream."""
        select = getattr(self.stream, "select_columns", None)
        items: Iterable[Any] = self.stream
        if select is not None and isinstance(getattr(self.stream, "features", None), dict):
            column = next((key for key in LABEL_KEYS if key in self.stream.features), None)  # type: ignore[attr-defined]
            if column is not None:
                items = ({"image": None, **item} for item in select([column]))
        labels = [
            0 if self.form.dense else self.form.read_label(split_item(item)[1]) for item in islice(items, self.length)
        ]
        return np.array(labels, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the length where it was given, and of the first 64 samples, decoded.

        A stream that differs in later samples alone has the same digest.
        """
        digest = hashlib.sha256(f"{self.form.source} {self._given} {self.form.classes}".encode())
        for sample in self.some(SAMPLED):
            digest.update(content(sample))
        return digest.hexdigest()

    def _refuse(self, wish: str) -> DataError:
        return DataError(
            f"{self.form.source} is a stream, and this needs {wish}. Use fit and evaluate, with validation=... for held-out "
            "images, or give a Dataset with random access."
        )


class JoinedSplit(Split):
    """The rows of several splits, one after another, with labels of their own."""

    def __init__(self, parts: Sequence[Split], labels: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.parts, self.labels = parts, labels
        self.ends = np.cumsum([len(part) for part in parts])
        self.rows = np.arange(int(self.ends[-1])) if rows is None else rows
        self.transform, self.workers = parts[0].transform, parts[0].workers
        self.images, self.targets = ReadImages(self), None
        self.reads_in_threads = all(part.reads_in_threads for part in parts)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def changes(self) -> bool:
        return any(part.changes for part in self.parts)

    @property
    def augments(self) -> bool:
        return self.parts[0].augments

    def sample(self, row: int) -> Sample:
        """The image of a row with its class index."""
        place = int(self.rows[row])
        part = int(np.searchsorted(self.ends, place, side="right"))
        return self.parts[part].sample(place - int(self.ends[part - 1] if part else 0))[0], int(self.labels[row])

    def take(self, rows: np.ndarray) -> JoinedSplit:
        """The rows with these indices."""
        return JoinedSplit(self.parts, self.labels[rows], self.rows[rows])

    def with_transform(self, transform: Transform | None) -> JoinedSplit:
        """The same split with another transform."""
        return JoinedSplit([part.with_transform(transform) for part in self.parts], self.labels, self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the digests of its parts, the rows and the labels."""
        digest = hashlib.sha256("".join(part.digest for part in self.parts).encode())
        digest.update(self.rows.tobytes() + self.labels.tobytes())
        return digest.hexdigest()


def join_splits(parts: Sequence[Split], labels: np.ndarray | None = None) -> Split:
    """The images of several splits as one, with their labels or other ones."""
    labels = np.concatenate([part.labels for part in parts]) if labels is None else labels
    if any(type(part) is not Split for part in parts):
        return JoinedSplit(parts, labels)
    images = [image for part in parts for image in part.images]
    return Split(images, labels, transform=parts[0].transform, workers=parts[0].workers)


class ReadImages(Sequence[Any]):
    """The images of a split, each read when it is asked for."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: Any) -> Any:
        return self._read(range(len(self))[row])

    def _read(self, row: int) -> Any:
        with seeded(0, row):
            return self.split.sample(row)[0]


class ReadTargets(ReadImages):
    """The targets of a split, each read when it is asked for."""

    def _read(self, row: int) -> Any:
        with seeded(0, row):
            return self.split.sample(row)[1]


class LabelReader(Dataset[int]):
    """The class index of every sample."""

    def __init__(self, split: DatasetSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> int:
        return self.split.form.read_label(split_item(self.split.dataset[int(self.split.rows[row])])[1])


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
    if split.is_stream:
        shards = getattr(getattr(split, "stream", None), "num_shards", 1)
        return min(4, os.cpu_count() or 1, shards)
    return min(4, os.cpu_count() or 1) if len(split) >= 1000 else 0
