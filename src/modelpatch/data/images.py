"""Images on their way from a split to a network: decoded once and kept, or read anew in every epoch.

    split ─ decode, frame: uint8 (R, R) ─ random view or centre crop ─ normalise ─ batch

`Images` keeps none and reads batches ahead in threads or other processes. `ImageStore` keeps decoded images, and decodes each
when it is first asked for; `SequentialImages` reads a stream, which has no rows. `open_images` chooses.
"""

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, count, islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.augmentation import AUGMENTATIONS, Augmentation, apply_transform
from modelpatch.data.seeding import make_generator, seeded
from modelpatch.data.splits import Sample, Split, StreamSplit, count_workers
from modelpatch.errors import DataError, TrainingError
from modelpatch.tasks.kind import Target

PIECE = 2**17  # pixels
PLAIN_BATCH = 64
BUFFER = 2**27  # bytes of images among which a stream is shuffled
MOST_BUFFERED = 1000
AHEAD = 2  # batches that threads decode in advance
View = tuple[int, ...]  # seed and epoch of random transforms
Decoded = tuple[Tensor, Any, type[Target] | None]  # uint8 (3, R, R), a class index or framed target, its type
NO_AUGMENTATION = AUGMENTATIONS["none"]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, memory: int) -> Tensor:
    """An empty tensor; beyond `memory` bytes it is a file that vanishes with it. Raises `TrainingError` for a full disk."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= memory:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile() as file:  # has no name, so that a killed process leaves nothing behind
            if hasattr(os, "posix_fallocate"):  # promises room on the disk
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)
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


class Reader(Dataset[Any]):
    """The decoding of samples: framing, and the transform of views. Its items, for a DataLoader, are batches by their rows."""

    def __init__(self, split: Split, preprocessing: Preprocessing, view: View | None) -> None:
        self.split, self.view = split, view
        self.transform = split.transform if view is not None else None
        # a transform makes the view itself: nothing is cut from its edges
        self.preprocessing = preprocessing.model_copy(update={"crop_pct": 1.0}) if self.transform else preprocessing
        # random transforms share one state of random numbers
        self.threaded = split.reads_in_threads and self.transform is None

    def __getitem__(self, rows: Tensor) -> Pixels | DataError:
        try:
            return collate(list(map(self.read, rows.tolist())))
        except DataError as error:  # a DataLoader would wrap it in a traceback
            return error

    def read(self, row: int) -> Decoded:
        """The decoded image of a row, with its class index or framed target."""
        with nullcontext() if self.threaded else seeded(*(self.view or (0,)), row):
            return self.decode(self.split[row])

    def decode(self, sample: Sample) -> Decoded:
        """The decoded image of a sample, with its class index or framed target."""
        picture, target = self.preprocessing.open(sample[0]), sample[1]
        if self.transform is not None:
            if not isinstance(picture, Image.Image):
                raise DataError(
                    f"transforms take pictures of 1 or 3 channels; these have {self.preprocessing.channels}."
                )
            picture, target = apply_transform(self.transform, picture, target)
        if isinstance(target, Target):
            return (
                self.preprocessing.decode(picture),
                target.frame(cast(Image.Image, picture), self.preprocessing),
                type(target),
            )
        return self.preprocessing.decode(picture), target, None


class StreamReader(Reader, IterableDataset[Any]):
    """Lists of decoded samples of a stream, for a DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        assert isinstance(self.split, StreamSplit)
        try:
            samples = map(self.decode, self.split.open(self.view[1] if self.view else 0))
            while part := list(islice(samples, 16)):
                yield part
        except DataError as error:
            yield error


def collate(read: Sequence[Decoded]) -> Pixels:
    """Decoded images as a batch."""
    return Pixels(torch.stack([image for image, *_ in read]), [target for _, target, _ in read], read[0][2])


class Images:
    """The images of a split, read when they are asked for and not kept."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split, self.preprocessing = split, preprocessing

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 (N,)."""
        return torch.from_numpy(self.split.labels)

    def plain(self, rows: Tensor) -> Tensor:
        """Normalised images of these rows (B, 3, S, S), not augmented."""
        return self.batch(rows, NO_AUGMENTATION, ()).images

    def batch(self, rows: Tensor, augmentation: Augmentation, seed: tuple[int, ...]) -> ImageBatch:
        """Random views of these rows, which follow the seed (seed, epoch, step); with no seed, transforms are left out."""
        return self._finish(next(iter(self.read([rows], seed[:2] or None))), augmentation, seed)

    def batches(
        self, batches: Sequence[Tensor], augmentation: Augmentation, seed: int, epoch: int, first: int = 0
    ) -> Iterator[ImageBatch]:
        """Random views of the rows of every batch from number `first` on, read ahead."""
        for step, pixels in enumerate(self.read(batches, (seed, epoch), first), first):
            yield self._finish(pixels, augmentation, (seed, epoch, step))

    def plain_batches(self, size: int = PLAIN_BATCH) -> Iterator[ImageBatch]:
        """All images in order, not augmented, read ahead."""
        for pixels in self.read(torch.arange(len(self)).split(size), None):
            yield self._finish(pixels, NO_AUGMENTATION, ())

    def views(self, count: int, augmentation: Augmentation, seed: int) -> Iterator[tuple[int, Tensor, ImageBatch]]:
        """`count` random views of all images, batch by batch: (view, rows, batch). View k is that of epoch k.

        Each image is decoded once, unless random transforms change it from one view to the next, or it comes from a stream.
        """
        batches = torch.arange(len(self)).split(PLAIN_BATCH)
        for group in [[view] for view in range(count)] if self.split.changes else [list(range(count))]:
            for step, pixels in enumerate(self.read(batches, (seed, group[0]))):
                for view in group:
                    yield view, batches[step], self._finish(pixels, augmentation, (seed, view, step))

    def read(self, batches: Sequence[Tensor], view: View | None, first: int = 0) -> Iterator[Pixels]:
        """The decoded images of every batch of rows from number `first` on, read ahead in processes or threads if many."""
        reader, batches = Reader(self.split, self.preprocessing, view), batches[first:]
        workers = count_workers(self.split, reader.threaded) if len(batches) > 1 else 0
        if reader.threaded and not workers:
            return _read_in_threads(reader, batches)
        return load(reader, workers, sampler=batches)

    def _finish(self, pixels: Pixels, augmentation: Augmentation, seed: tuple[int, ...]) -> ImageBatch:
        """Random views or centre crops, normalised, with targets."""
        seen = Reader(self.split, self.preprocessing, seed[:2] or None).preprocessing
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


class ImageStore(Images):
    """The images of a split, decoded to uint8 (N, 3, R, R) when first asked for and kept, and their targets beside them.

    At most `memory` bytes are kept in memory; beyond that they are in a temporary file. Images that random transforms change
    are read anew for every view.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, memory: int) -> None:
        super().__init__(split, preprocessing)
        side = preprocessing.resize_to
        self.pixels = allocate((len(split), preprocessing.channels, side, side), torch.uint8, memory)
        self.ready = torch.zeros(len(split), dtype=torch.bool)
        self._targets: list[Any] = [None] * len(split)
        self._target_type: type[Target] | None = None

    def read(self, batches: Sequence[Tensor], view: View | None, first: int = 0) -> Iterator[Pixels]:
        """The decoded images of every batch of rows from number `first` on; those that are not kept yet are read ahead."""
        batches = batches[first:]
        if view is not None and self.split.changes:
            yield from super().read(batches, view)
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
            yield Pixels(self.pixels[rows], [self._targets[row] for row in rows.tolist()], self._target_type)


class SequentialImages(Images):
    """The images of a stream, in order or shuffled in a buffer. Rows of a batch say how many images it has, not which."""

    def __init__(self, split: StreamSplit, preprocessing: Preprocessing, shuffle: bool = False) -> None:
        super().__init__(split, preprocessing)
        self.shuffle = shuffle

    def plain_batches(self, size: int = PLAIN_BATCH) -> Iterator[ImageBatch]:
        samples = self._open(None)
        while read := list(islice(samples, size)):
            yield self._finish(collate(read), NO_AUGMENTATION, ())

    def read(self, batches: Sequence[Tensor], view: View | None, first: int = 0) -> Iterator[Pixels]:
        """Batches of the sizes that are given, from number `first` on. A stream that ends early begins anew."""
        samples: Iterator[Decoded] = islice(self._repeat(view), sum(map(len, batches)))
        if self.shuffle:
            samples = self._draw(samples, view or (0, 0))
        for step, rows in enumerate(batches):
            read = list(islice(samples, len(rows)))
            if step >= first:
                yield collate(read)

    def _open(self, view: View | None) -> Iterator[Decoded]:
        reader = StreamReader(self.split, self.preprocessing, view)
        return chain.from_iterable(load(reader, count_workers(self.split), seed=(*(view or (0,)), 0)))

    def _repeat(self, view: View | None) -> Iterator[Decoded]:
        while True:
            samples = self._open(view)
            first = next(samples, None)
            if first is None:
                raise DataError(f"{self.split.form.source} holds no samples.")  # type: ignore[attr-defined]
            yield from chain([first], samples)

    def _draw(self, samples: Iterator[Decoded], view: View) -> Iterator[Decoded]:
        generator = np.random.default_rng((*view, 1))
        size = self.preprocessing.channels * self.preprocessing.resize_to**2
        places = max(min(MOST_BUFFERED, BUFFER // size, len(self)), 1)
        buffer = list(islice(samples, places))
        for sample in samples:
            place = int(generator.integers(places))
            yield buffer[place]
            buffer[place] = sample
        yield from (buffer[place] for place in generator.permutation(len(buffer)))


def open_images(
    split: Split, preprocessing: Preprocessing, memory: int, *, once: bool = False, shuffle: bool = False
) -> Images:
    """The images of a split: kept in memory where they fit into `memory` bytes and are read more than `once`.

    `shuffle` is for streams; rows of others are in the order in which they are asked for.
    """
    if isinstance(split, StreamSplit):
        return SequentialImages(split, preprocessing, shuffle)
    size = len(split) * (preprocessing.channels + bool(split.dense)) * preprocessing.resize_to**2
    if once or split.changes or size > memory:
        return Images(split, preprocessing)
    return ImageStore(split, preprocessing, memory)


def load(dataset: Any, workers: int, seed: tuple[int, ...] = (0,), **options: Any) -> Iterator[Any]:
    """The items of a data set through a DataLoader, with random numbers from the seed. Raises a `DataError` among them."""
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, collate_fn=_keep, generator=make_generator(seed), **options
    )
    items = iter(loader)
    for number in count():
        with nullcontext() if workers else seeded(*seed, number):  # workers seed their own
            item = next(items, None)
        if item is None:
            return
        if isinstance(item, DataError):
            raise item
        yield item


def _keep(item: Any) -> Any:
    return item


def _read_in_threads(reader: Reader, batches: Sequence[Tensor]) -> Iterator[Pixels]:
    # On a CPU alone nothing is read while the last batch is computed: threads that decode beside those that compute make
    # convolutions take 1.7 times as long.
    ahead = AHEAD if torch.accelerator.is_available() else 0
    waiting: deque[Iterator[Decoded]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
        for rows in batches:
            waiting.append(pool.map(reader.read, rows.tolist()))
            if len(waiting) > ahead:
                yield collate(list(waiting.popleft()))
        yield from (collate(list(read)) for read in waiting)
