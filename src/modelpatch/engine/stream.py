"""Many images through an engine: decoded ahead in worker processes, answered batch by batch, broken ones named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modelpatch.backbone import Preprocessing
from modelpatch.backbone.preprocess import ImageSource
from modelpatch.engine.inputs import check_sources
from modelpatch.errors import DataError, EngineError

if TYPE_CHECKING:
    from modelpatch.engine.engine import Engine

Decoded = dict[Preprocessing, Tensor] | str  # uint8 crops (3, S, S) by preprocessing, or what is wrong with the image


@dataclass(frozen=True)
class Answers:
    """A batch's answers. `rows` are the places of the readable images among all, `logits` (len(rows), K) by task;
    `errors` say by place why an image cannot be read."""

    rows: tuple[int, ...]
    logits: dict[str, Tensor]
    errors: dict[int, str]


class _Crops(Dataset[tuple[int, Decoded]]):
    def __init__(self, sources: Sequence[ImageSource], kinds: frozenset[Preprocessing]) -> None:
        self.sources, self.kinds = sources, kinds

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: int) -> tuple[int, Decoded]:
        try:
            return place, {kind: kind.center_crop(kind.decode(self.sources[place])) for kind in self.kinds}
        except DataError as error:
            return place, str(error)


def _as_list(batch: list[Any]) -> list[Any]:
    return batch


def stream(
    engine: Engine,
    sources: Sequence[ImageSource],
    *,
    only: Iterable[str] | None = None,
    batch_size: int = 16,
    workers: int = 0,
) -> Iterator[Answers]:
    """Answers for all `sources` in order, `batch_size` images at a time, for all tasks or those in `only`.

    `workers` processes decode ahead; 0 decodes in this one. The tasks are those of the first moment: one that is removed
    meanwhile ends the stream with `UnknownTaskError`. Raises `EngineError` for what is no list of files and pictures.
    """
    check_sources(sources)
    if batch_size < 1 or workers < 0:
        raise EngineError(f"batch_size={batch_size}, workers={workers}; expected at least 1 and at least 0.")
    tasks = list(engine if only is None else dict.fromkeys(only))
    return _stream(engine, sources, tasks, frozenset(map(engine.preprocessing, tasks)), batch_size, workers)


def _stream(
    engine: Engine,
    sources: Sequence[ImageSource],
    tasks: list[str],
    kinds: frozenset[Preprocessing],
    batch_size: int,
    workers: int,
) -> Iterator[Answers]:
    loader = DataLoader(_Crops(sources, kinds), batch_size, num_workers=workers, collate_fn=_as_list)
    for batch in loader:
        errors = {place: decoded for place, decoded in batch if isinstance(decoded, str)}
        read = [(place, decoded) for place, decoded in batch if not isinstance(decoded, str)]
        logits: dict[str, Tensor] = {}
        if read:
            crops = {kind: kind.normalize(torch.stack([decoded[kind] for _, decoded in read])) for kind in kinds}
            logits = engine(crops, only=tasks)
        yield Answers(tuple(place for place, _ in read), logits, errors)
