"""Images on their way from a split to a network: decoded once and kept, or read anew in every epoch.

    split ─ decode, frame: uint8 (R, R) ─ random view or centre crop ─ normalise ─ batch

`ImageStore` keeps decoded images, and decodes each when it is first asked for. `ImageStream` keeps none and reads batches
ahead in other processes, `SequentialImages` the same from a stream, which has no rows. `open_images` chooses.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from modelpatch.backbone.preprocessing import Preprocessing, open_image
from modelpatch.data.augmentation import AUGMENTATIONS, Augmentation, apply_transform
from modelpatch.data.dataset_splits import StreamSplit, count_workers
from modelpatch.data.seeding import make_generator, seeded
from modelpatch.data.splits import Sample, Split
from modelpatch.errors import DataError, TrainingError
from modelpatch.tasks.targets import Target

PIECE = 2**17  # pixels
PLAIN_BATCH = 64
BUFFER = 2**27  # bytes of images among which a stream is shuffled
MOST_BUFFERED = 1000
AHEAD = 2  # batches that threads decode in advance
View = tuple[int, int]  # seed and epoch of random transforms


def allocate(shape: tuple[int, ...], dtype: torch.dtype, memory: int) -> Tensor:
    """An empty tensor of at most `memory` bytes in memory; a larger one is a file that vanishes with it.

    Raises `TrainingError` where the disk has no room for the file.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= memory:
        return torch.empty(shape, dtype=dtype)
    descriptor, path = tempfile.mkstemp(prefix="modelpatch-", suffix=".cache")
    try:
        _reserve(descriptor, size)
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(descriptor)
        os.unlink(path)  # the mapping keeps the bytes; a killed process leaves nothing behind
    return flat.view(dtype).view(shape)


def _reserve(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long, with room on the disk for all of them where the system can promise it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        raise TrainingError(
            f"the cache needs {size / 1e9:.2f} GB in {tempfile.gettempdir()}: {error.strerror}. Point TMPDIR to a larger "
            "disk, raise memory, lower views, or set cache=False."
        ) from error


def pieces(images: Tensor) -> tuple[Tensor, ...]:
    """A batch (B, C, H, W) in pieces whose activations stay in a processor's caches; on other devices, as it is.

    With 8 images of 128 px instead of 64 at a time, MobileNetV2 took half the time.
    """
    if images.device.type != "cpu":
        return (images,)
    return images.split(max(PIECE // (images.shape[-1] * images.shape[-2]), 1))


class Pixels(NamedTuple):
    """Decoded images uint8 (B, 3, R, R), and their class indices or framed targets."""

    images: Tensor
    targets: list[Any]
    target_type: type[Target] | None


class ImageBatch(NamedTuple):
    """Normalised images (B, 3, S, S) with class indices (B,) or a batch of targets."""

    images: Tensor
    targets: Any


class Reader:
    """The decoding of samples: framing, and the transform of views."""

    def __init__(self, split: Split, preprocessing: Preprocessing, view: View | None) -> None:
        self.split, self.view = split, view
        self.transform = split.transform if view is not None else None
        # a transform makes the view itself: nothing is cut from its edges
        self.preprocessing = preprocessing.model_copy(update={"crop_pct": 1.0}) if self.transform else preprocessing

    @property
    def threaded(self) -> bool:
        """True where several threads may read at once: random transforms share one state of random numbers."""
        return self.split.reads_in_threads and self.transform is None

    def read(self, row: int) -> tuple[Tensor, Any, type[Target] | None]:
        """The decoded image of a row, with its class index or framed target."""
        if self.threaded:
            return self.decode(self.split.sample(row))
        with seeded(*(self.view or (0,)), row):
            return self.decode(self.split.sample(row))

    def decode(self, sample: Sample) -> tuple[Tensor, Any, type[Target] | None]:
        """The decoded image of a sample, with its class index or framed target."""
        picture, target = open_image(sample[0]), sample[1]
        if self.transform is not None:
            picture, target = apply_transform(self.transform, picture, target)
        if isinstance(target, Target):
            return self.preprocessing.decode(picture), target.frame(picture, self.preprocessing), type(target)
        return self.preprocessing.decode(picture), target, None


def collate(read: Sequence[tuple[Tensor, Any, type[Target] | None]]) -> Pixels:
    """Decoded images as a batch."""
    return Pixels(torch.stack([image for image, *_ in read]), [target for _, target, _ in read], read[0][2])


class ImageStream:
    """The images of a split with random access, read when they are asked for and not kept."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split, self.preprocessing = split, preprocessing
        self._last: tuple[Any, Pixels] | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 (N,)."""
        return torch.from_numpy(self.split.labels)

    def plain(self, rows: Tensor) -> Tensor:
        """Normalised images of these rows (B, 3, S, S), not augmented."""
        return self._finish(self._one(rows, None), AUGMENTATIONS["none"], (), None).images

    def augmented(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> Tensor:
        """Normalised random views of these rows (B, 3, S, S), which follow the seed (seed, epoch, step)."""
        view = seed[:2] if len(seed) >= 2 else None
        return self._finish(self._one(rows, view), augmentation, seed, view).images  # type: ignore[arg-type]

    def targets(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> Any:
        """The targets that belong to `augmented` of the same arguments, or to `plain` for no seed."""
        view = seed[:2] if len(seed) >= 2 else None
        return self._finish(self._one(rows, view), augmentation, seed, view).targets  # type: ignore[arg-type]

    def batches(
        self, batches: Sequence[Tensor], augmentation: Augmentation, seed: int, epoch: int, first: int = 0
    ) -> Iterator[ImageBatch]:
        """Random views of the rows of every batch from number `first` on, read ahead."""
        view = seed, epoch
        for step, pixels in enumerate(self.read(batches[first:], view), first):
            yield self._finish(pixels, augmentation, (seed, epoch, step), view)

    def plain_batches(self, size: int = PLAIN_BATCH) -> Iterator[ImageBatch]:
        """All images in order, not augmented, read ahead."""
        for pixels in self.read(torch.arange(len(self)).split(size), None):
            yield self._finish(pixels, AUGMENTATIONS["none"], (), None)

    def views(self, count: int, augmentation: Augmentation, seed: int) -> Iterator[tuple[int, Tensor, ImageBatch]]:
        """`count` random views of all images, batch by batch: (view, rows, batch). View k is that of epoch k.

        Each image is decoded once, unless random transforms change it from one view to the next.
        """
        batches = torch.arange(len(self)).split(PLAIN_BATCH)
        for group in [[view] for view in range(count)] if self.split.changes else [list(range(count))]:
            for step, pixels in enumerate(self.read(batches, (seed, group[0]))):
                for view in group:
                    yield view, batches[step], self._finish(pixels, augmentation, (seed, view, step), (seed, view))

    def read(self, batches: Sequence[Tensor], view: View | None) -> Iterator[Pixels]:
        """The decoded images of every batch of rows. Long sequences are read ahead, in processes or threads."""
        reader = Reader(self.split, self.preprocessing, view)
        workers = count_workers(self.split) if len(batches) > 1 else 0
        if workers:
            yield from load(RowReader(reader), workers, sampler=batches)
        elif reader.threaded:
            yield from _read_in_threads(reader, batches)
        else:
            for rows in batches:
                yield collate([reader.read(row) for row in rows.tolist()])

    def _one(self, rows: Tensor, view: View | None) -> Pixels:
        """One batch; the last one is kept for the targets that are asked for beside its images."""
        key = rows.tolist(), view if self.split.changes else None
        if self._last is None or self._last[0] != key:
            self._last = key, next(iter(self.read([rows], view)))
        return self._last[1]

    def _finish(
        self, pixels: Pixels, augmentation: Augmentation, seed: tuple[int, ...], view: View | None
    ) -> ImageBatch:
        """Random views or centre crops, normalised, with targets."""
        seen = Reader(self.split, self.preprocessing, view).preprocessing
        matrices = None
        if augmentation.name == "none":
            images = seen.center_crop(pixels.images)
        else:
            images = augmentation(pixels.images.float(), seen.image_size, make_generator(seed))
            if pixels.target_type is not None:
                matrices = augmentation.matrices(len(images), make_generator(seed))
        if pixels.target_type is None:
            return ImageBatch(seen.normalize(images), torch.tensor(pixels.targets))
        return ImageBatch(seen.normalize(images), pixels.target_type.batch(pixels.targets, seen, matrices))


class ImageStore(ImageStream):
    """The images of a split, decoded to uint8 (N, 3, R, R) when first asked for and kept, and their targets beside them.

    At most `memory` bytes are kept in memory; beyond that they are in a temporary file. Images that random transforms change
    are read anew for every view.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, memory: int) -> None:
        super().__init__(split, preprocessing)
        side = preprocessing.resize_to
        self.pixels = allocate((len(split), 3, side, side), torch.uint8, memory)
        self.ready = torch.zeros(len(split), dtype=torch.bool)
        self._targets: list[Any] = [None] * len(split)
        self._target_type: type[Target] | None = None

    def read(self, batches: Sequence[Tensor], view: View | None) -> Iterator[Pixels]:
        """The decoded images of every batch of rows; those that are not kept yet are read ahead."""
        if view is not None and self.split.changes:
            yield from super().read(batches, view)
            return
        if self.ready.all():
            yield from map(self._kept, batches)
            return
        seen, missing = self.ready.clone(), []
        for rows in batches:
            missing.append(rows[~seen[rows]].unique())
            seen[rows] = True
        fresh = super().read([rows for rows in missing if len(rows)], None)
        for rows, new in zip(batches, missing, strict=True):
            if len(new):
                pixels = next(fresh)
                self.pixels[new], self._target_type = pixels.images, pixels.target_type
                for row, target in zip(new.tolist(), pixels.targets, strict=True):
                    self._targets[row] = target
                self.ready[new] = True
            yield self._kept(rows)

    def _kept(self, rows: Tensor) -> Pixels:
        return Pixels(self.pixels[rows], [self._targets[row] for row in rows.tolist()], self._target_type)


class SequentialImages:
    """The images of a stream, in its order or, with `shuffle`, in that of draws from a buffer.

    Rows of a batch say how many images it has, not which.
    """

    def __init__(self, split: StreamSplit, preprocessing: Preprocessing, shuffle: bool = False) -> None:
        self.split, self.preprocessing, self.shuffle = split, preprocessing, shuffle
        self._finish = ImageStream(split, preprocessing)._finish

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 (N,), from one reading of the stream."""
        return torch.from_numpy(self.split.labels)

    def batches(
        self, batches: Sequence[Tensor], augmentation: Augmentation, seed: int, epoch: int, first: int = 0
    ) -> Iterator[ImageBatch]:
        """Batches of the sizes that are given, from number `first` on. A stream that ends early begins anew."""
        view = seed, epoch
        samples: Iterator[Any] = islice(chain.from_iterable(self._repeat(view)), sum(map(len, batches)))
        if self.shuffle:
            samples = self._draw(samples, view)
        for _ in islice(samples, sum(map(len, batches[:first]))):
            pass
        for step, rows in enumerate(batches[first:], first):
            pixels = collate(list(islice(samples, len(rows))))
            yield self._finish(pixels, augmentation, (seed, epoch, step), view)

    def views(self, count: int, augmentation: Augmentation, seed: int) -> Iterator[tuple[int, Tensor, ImageBatch]]:
        """`count` random views of all images, batch by batch: (view, rows, batch). The stream is read once a view."""
        for view in range(count):
            samples = chain.from_iterable(self._repeat((seed, view)))
            for step, rows in enumerate(torch.arange(len(self)).split(PLAIN_BATCH)):
                pixels = collate(list(islice(samples, len(rows))))
                yield view, rows, self._finish(pixels, augmentation, (seed, view, step), (seed, view))

    def plain_batches(self, size: int = PLAIN_BATCH) -> Iterator[ImageBatch]:
        """All images in the stream's order, not augmented."""
        samples = self._open(None)
        while read := list(islice(samples, size)):
            yield self._finish(collate(read), AUGMENTATIONS["none"], (), None)

    def _open(self, view: View | None) -> Iterator[Any]:
        reader = StreamReader(Reader(self.split, self.preprocessing, view))
        for part in load(reader, count_workers(self.split), seed=(*(view or (0,)), 0)):
            yield from part

    def _repeat(self, view: View) -> Iterator[Iterator[Any]]:
        while True:
            samples = self._open(view)
            first = next(samples, None)
            if first is None:
                raise DataError(f"{self.split.form.source} holds no samples.")
            yield chain([first], samples)

    def _draw(self, samples: Iterator[Any], view: View) -> Iterator[Any]:
        """The samples in the order of draws from a buffer."""
        generator = np.random.default_rng((*view, 1))
        size = 3 * self.preprocessing.resize_to**2
        places = max(min(MOST_BUFFERED, BUFFER // size, len(self)), 1)
        buffer = list(islice(samples, places))
        for sample in samples:
            place = int(generator.integers(places))
            yield buffer[place]
            buffer[place] = sample
        yield from (buffer[place] for place in generator.permutation(len(buffer)))


Images = ImageStream | SequentialImages


def open_images(
    split: Split, preprocessing: Preprocessing, memory: int, *, once: bool = False, shuffle: bool = False
) -> Images:
    """The images of a split: kept in memory where they fit into `memory` bytes and are read more than `once`.

    `shuffle` is for streams; rows of others are in the order in which they are asked for.
    """
    if isinstance(split, StreamSplit):
        return SequentialImages(split, preprocessing, shuffle)
    size = len(split) * (4 if split.dense else 3) * preprocessing.resize_to**2
    if once or split.changes or size > memory:
        return ImageStream(split, preprocessing)
    return ImageStore(split, preprocessing, memory)


class RowReader(Dataset[Any]):
    """Batches of decoded images by their rows, for a DataLoader."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, rows: Any) -> Any:
        try:
            return collate([self.reader.read(row) for row in rows.tolist()])
        except DataError as error:  # a DataLoader would wrap it in a traceback
            return error


class StreamReader(IterableDataset[Any]):
    """Lists of decoded samples of a stream, for a DataLoader."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[Any]:
        split, view = self.reader.split, self.reader.view
        assert isinstance(split, StreamSplit)
        try:
            samples = map(self.reader.decode, split.open(view[1] if view else 0))
            while part := list(islice(samples, 16)):
                yield part
        except DataError as error:
            yield error


def load(dataset: Any, workers: int, seed: tuple[int, ...] = (0,), **options: Any) -> Iterator[Any]:
    """The items of a data set through a DataLoader whose random numbers follow the seed. Raises a `DataError` among them."""
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, collate_fn=_keep, generator=make_generator(seed), **options
    )
    items: Iterator[Any] = iter(loader)
    if not workers:
        items = _iterate_seeded(items, seed)
    for item in items:
        if isinstance(item, DataError):
            raise item
        yield item


def _keep(item: Any) -> Any:
    return item


def _iterate_seeded(items: Iterator[Any], seed: tuple[int, ...]) -> Iterator[Any]:
    """The items of an iterator whose random numbers follow the seed and the number of the item alone."""
    for number in range(2**62):
        with seeded(*seed, number):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _read_in_threads(reader: Reader, batches: Sequence[Tensor]) -> Iterator[Pixels]:
    waiting: deque[list[Any]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
        for rows in batches:
            waiting.append([pool.submit(reader.read, row) for row in rows.tolist()])
            if len(waiting) > AHEAD:
                yield collate([one.result() for one in waiting.popleft()])
        while waiting:
            yield collate([one.result() for one in waiting.popleft()])
