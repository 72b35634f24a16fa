"""Many images through an engine: decoded ahead in worker processes, answered batch by batch, broken ones named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing, find_images
from modelpatch.engine.inputs import check_sources
from modelpatch.errors import DataError, EngineError


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
