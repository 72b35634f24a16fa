"""Batches for the training loop: a user's loader, or any source that can start an epoch at any batch.

    BatchSource.batches(epoch, first) -> Minibatch, Minibatch, ...

The order and the augmentation of a batch follow (seed, epoch, number of the batch) alone, so that an interrupted run
continues with the very batches it would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modelpatch.data.images import ImageBatch
from modelpatch.data.seeding import mix, seeded
from modelpatch.data.task import Task
from modelpatch.errors import DataError


@dataclass(frozen=True)
class Minibatch:
    """Inputs (B, ...) of segment `start` (0: images) and their targets: a tensor (B, ...) or a list of B dictionaries."""

    inputs: Tensor
    targets: Any
    start: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, rows: slice) -> Minibatch:
        """Some rows of the batch."""
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])

    def to(self, device: torch.device) -> Minibatch:
        """The batch on a device."""
        return replace(self, inputs=place(self.inputs, device), targets=move(self.targets, device))


@runtime_checkable
class BatchSource(Protocol):
    """Batches by epoch. `len(source)` is the number of batches in an epoch; it raises `TypeError` where that is unknown."""

    def batches(self, epoch: int, first: int = 0) -> Iterator[Minibatch]:
        """The batches of an epoch, beginning with batch `first`."""


def place(inputs: Tensor, device: torch.device) -> Tensor:
    """Copy inputs to a device, images and maps in `channels_last` format."""
    x = inputs.to(device, non_blocking=True)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def move(targets: Any, device: torch.device) -> Any:
    """Copy the tensors in a nest of lists, tuples and dictionaries to a device."""
    if isinstance(targets, Tensor):
        return targets.to(device, non_blocking=True)
    if isinstance(targets, dict):
        return {name: move(value, device) for name, value in targets.items()}
    if isinstance(targets, list | tuple):
        return type(targets)(move(value, device) for value in targets)
    return targets


def count_batches(source: Any) -> int | None:
    """The number of batches in an epoch, None where it is unknown."""
    try:
        return len(source)
    except TypeError:
        return None


def as_source(given: Any, seed: int, purpose: str = "data") -> BatchSource:
    """Wrap an iterable of batches; a `BatchSource` is returned as it is. Raises `DataError` for anything else."""
    if isinstance(given, BatchSource):
        return given
    expected, name = "Expected a DataLoader or another iterable of (images, targets)", type(given).__name__
    if isinstance(given, Task):
        found = f"{given!r}. {expected}; mp.fit(backbone, task) trains on a Task."
    elif isinstance(given, Dataset):
        found = f"a Dataset, {name}. {expected}: DataLoader({name}(...), batch_size=32, shuffle=True)."
    elif isinstance(given, str | bytes | Tensor | dict) or not hasattr(given, "__iter__"):
        found = f"{str(given)[:100]!r}. {expected}."
    elif iter(given) is given:
        found = f"a {name}, which can be read only once. {expected}, such as a list."
    else:
        return LoaderBatches(given, seed)
    raise DataError(f"{purpose} is {found}")


class LoaderBatches:
    """A `DataLoader`, or another iterable of (images, targets), as a `BatchSource`.

    Each batch is drawn with the random state of (seed, epoch, number): torch's, NumPy's and Python's, in this process and in
    the loader's workers. A sampler's or data set's `set_epoch` is called. To start at a later batch, the ones before it are
    read and dropped.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def batches(self, epoch: int, first: int = 0) -> Iterator[Minibatch]:
        """The batches of an epoch, beginning with batch `first`."""
        names = ("sampler", "batch_sampler", "dataset")
        parts: list[Any] = [self.loader, *(getattr(self.loader, name, None) for name in names)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(mix(self.seed, epoch))
        with seeded(self.seed, epoch):
            iterator = iter(self.loader)
        for number in count():
            with seeded(self.seed, epoch, number):
                given = next(iterator, None)
            if given is None:
                return
            if number >= first:
                yield as_minibatch(given)


def as_minibatch(given: Any) -> Minibatch:
    """Read a pair (images, targets) as a batch. Raises `DataError` for anything else."""
    if isinstance(given, Minibatch):
        return given
    if isinstance(given, list | tuple) and len(given) == 2 and isinstance(given[0], Tensor):
        return Minibatch(*given)
    shape = f"a {type(given).__name__}"
    if isinstance(given, dict):
        shape += f" of {', '.join(map(str, given))}"
    elif isinstance(given, list | tuple):
        shape += f" of {', '.join(type(part).__name__ for part in given)}"
    raise DataError(
        f"a batch is {shape}; expected a pair (images, targets) of tensors. Give the DataLoader a collate_fn that makes one."
    )


class Inputs(Protocol):
    """Inputs of segment `start` for the rows of batches, and their targets. `len` is the number of rows."""

    @property
    def start(self) -> int: ...

    def __len__(self) -> int: ...

    def batches(self, rows: Sequence[Tensor], epoch: int, first: int = 0) -> Iterator[ImageBatch]:
        """Yield the inputs and targets of every batch from number `first` on."""


@dataclass(frozen=True)
class RowBatches:
    """Batches of `size` rows of inputs, in a random order that follows (seed, epoch), or in order without a seed."""

    inputs: Inputs
    size: int
    seed: int | None = None

    def __len__(self) -> int:
        return len(cut_rows(len(self.inputs), self.size, self.seed))

    def batches(self, epoch: int, first: int = 0) -> Iterator[Minibatch]:
        """Yield the batches of an epoch, beginning with batch `first`."""
        rows = cut_rows(len(self.inputs), self.size, self.seed, epoch)
        for inputs, targets in self.inputs.batches(rows, epoch, first):
            yield Minibatch(inputs, targets, self.inputs.start)


def cut_rows(rows: int, size: int, seed: int | None, epoch: int = 0) -> list[Tensor]:
    """Return the rows of each batch of an epoch, in order without a seed.

    In random order a last row of its own joins the batch before, for layers that need two.
    """
    if seed is None:
        return list(torch.arange(rows).split(size))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [order[-size - 1 :]]
    return batches
