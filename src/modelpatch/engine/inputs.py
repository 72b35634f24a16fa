"""The images that an engine is given: a batch, batches by preprocessing, files and pictures, or a long stream of them."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing, find_images
from modelpatch.engine.plan import Batches
from modelpatch.errors import DataError, EngineError

Images = Tensor | Mapping[Preprocessing, Tensor] | Sequence[ImageSource]


def make_batches(
    images: Images, kinds: Mapping[str, Sequence[Preprocessing]], device: torch.device
) -> dict[Hashable, Tensor]:
    """The images by root, on the device: one for a batch that is given (None), else one for every preprocessing.

    `kinds` are the preprocessings of the tasks that ask. Raises `EngineError` for anything but images, and for images
    that do not fit a task.
    """
    seen = [(task, kind) for task, own in kinds.items() for kind in own]
    if isinstance(images, Tensor):
        check_batch(images, "images")
        _check_one_batch(kinds)
        return {None: images.to(device)}
    if not isinstance(images, Mapping):
        return {kind: batch.to(device) for kind, batch in read(images, [kind for _, kind in seen]).items()}
    if missing := dict.fromkeys(task for task, kind in seen if kind not in images):
        said = f"there are no images for the preprocessing of: {', '.join(missing)}."
        raise EngineError(said, "engine.read(files) makes them all.")
    for task, kind in seen:
        check_batch(images[kind], f"the images of {task}")
        if images[kind].shape[1:] != kind.input_size:
            given = tuple(images[kind].shape[1:])
            raise EngineError(f"the images of {task} have shape {given}; its preprocessing gives {kind.input_size}.")
    counts = sorted({len(images[kind]) for _, kind in seen})
    if len(counts) > 1:
        raise EngineError(f"the batches hold {', '.join(map(str, counts))} images; expected the same number in each.")
    return {kind: images[kind].to(device) for _, kind in seen}


def read(sources: Sequence[ImageSource], kinds: Iterable[Preprocessing]) -> dict[Preprocessing, Tensor]:
    """Files and pictures as each preprocessing sees them: batches (B, 3, S, S). Raises `EngineError`, `DataError`."""
    check_sources(sources)
    return {kind: kind(*sources) if len(sources) else torch.zeros(0, *kind.input_size) for kind in dict.fromkeys(kinds)}


def check_sources(sources: object) -> None:
    """Raises `EngineError` for anything but a sequence of files and pictures."""
    single = isinstance(sources, str | Path | bytes | Image.Image | np.ndarray)
    if single or not isinstance(sources, Sequence):
        given = f"one {type(sources).__name__}" if single else f"a {type(sources).__name__}"
        raise EngineError(
            f"images are {given}; expected a list of files or pictures, normalised floats (B, 3, H, W), or what "
            "engine.read(files) gives."
        )


def check_batch(images: object, name: str) -> None:
    """Raises `EngineError` unless these are normalised images."""
    given, expected = type(images).__name__, "normalised floats (float32) (B, 3, H, W), or a list of files or pictures"
    if isinstance(images, Tensor):
        if images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0 and images.dtype == torch.float32:
            return
        given = f"{images.dtype} tensor of shape {tuple(images.shape)}"
    raise EngineError(f"{name} are a {given}; expected {expected}.")


def _check_one_batch(kinds: Mapping[str, Sequence[Preprocessing]]) -> None:
    first: dict[Hashable, str] = {}
    for task, own in kinds.items():
        if len(own) > 1:
            sizes = ", ".join(str(kind.image_size) for kind in own)
            raise EngineError(
                f"{task} sees images in {len(own)} ways, at {sizes} px; one batch cannot be right for all. Give files or "
                "pictures, or what engine.read(files) gives."
            )
        first.setdefault((own[0].mean, own[0].std), task)
    if len(first) > 1:
        raise EngineError(
            f"{' and '.join(list(first.values())[:2])} normalise images differently, so one batch cannot be right for "
            "both. Give files or pictures, engine.read(files), or only=[...]."
        )


def count_rows(batches: Batches) -> int:
    """The number of images."""
    return len(next(iter(batches.values()))) if batches else 0


def check_names(given: Iterable[str] | None, option: str) -> list[str] | None:
    """The names in a list. Raises `EngineError` for a single text, which is most likely a mistake."""
    if isinstance(given, str):
        raise EngineError(f"{option}={given!r} is one text; expected a list of task names: {option}=[{given!r}].")
    if given is not None and not isinstance(given, Iterable):
        raise EngineError(f"{option}={given!r} is a {type(given).__name__}; expected a list of task names.")
    return None if given is None else list(given)


class DataSet(Protocol):
    """A data set: items by number, each a picture, a tuple that begins with one, or a row with an "image"."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Any: ...


Sources = Sequence[ImageSource] | DataSet | str | Path
Decoded = dict[Preprocessing, Tensor] | str  # uint8 crops (3, S, S) by preprocessing, or what is wrong with the image


@dataclass(frozen=True)
class Answers:
    """A batch's answers. `rows` are the places of the readable images among all, `logits` (len(rows), ...) by task;
    `errors` say by place why an image cannot be read."""

    rows: tuple[int, ...]
    logits: dict[str, Tensor]
    errors: dict[int, str]


class _Crops(Dataset[tuple[int, Decoded]]):
    def __init__(self, sources: DataSet, kinds: frozenset[Preprocessing]) -> None:
        self.sources, self.kinds = sources, kinds

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: int) -> tuple[int, Decoded]:
        try:
            picture = _picture(self.sources, place)
            return place, {kind: kind.center_crop(kind.decode(picture)) for kind in self.kinds}
        except DataError as error:
            return place, str(error)


def _picture(sources: DataSet, place: int) -> ImageSource:
    try:
        item = sources[place]
    except Exception as error:  # a data set may raise any error
        raise DataError(f"item {place} of the data set cannot be read: {error!r}.") from error
    if isinstance(item, tuple):
        return item[0]
    if isinstance(item, Mapping):
        if "image" not in item:
            raise DataError(f'the row has {", ".join(map(str, item))}; expected an "image".')
        return item["image"]
    return item


def stream(
    answer: Callable[[Mapping[Preprocessing, Tensor]], dict[str, Tensor]],
    kinds: Iterable[Preprocessing],
    sources: Sources,
    batch_size: int,
    workers: int,
) -> Iterator[Answers]:
    """Decode all `sources` as each of `kinds` sees them and `answer` them in batches. See `Engine.stream`."""
    if type(batch_size) is not int or type(workers) is not int or batch_size < 1 or workers < 0:
        raise EngineError(f"batch_size={batch_size!r}, workers={workers!r}; expected at least 1 and at least 0.")
    wanted = frozenset(kinds)
    loader = DataLoader(_Crops(_items(sources), wanted), batch_size, num_workers=workers, collate_fn=list)

    def run() -> Iterator[Answers]:
        for batch in loader:
            errors = {place: decoded for place, decoded in batch if isinstance(decoded, str)}
            read = {place: decoded for place, decoded in batch if not isinstance(decoded, str)}
            logits: dict[str, Tensor] = {}
            if read:
                crops = {kind: torch.stack([decoded[kind] for decoded in read.values()]) for kind in wanted}
                logits = answer({kind: kind.normalize(stack) for kind, stack in crops.items()})
            yield Answers(tuple(read), logits, errors)

    return run()


def _items(sources: Sources) -> DataSet:
    if isinstance(sources, str | Path):
        if not Path(sources).is_dir():
            raise EngineError(f"there is no folder {str(sources)!r}. Give a folder, or files in a list.")
        return find_images(Path(sources))
    if isinstance(sources, Tensor | Mapping | Sequence) or not hasattr(sources, "__getitem__"):
        check_sources(sources)
    return sources
