"""Batches for the training loop: a user's loader, or any source that can start an epoch at any batch.

    BatchSource.batches(epoch, first) -> Minibatch, Minibatch, ...

The order and the augmentation of a batch follow (seed, epoch, number of the batch) alone, so that an interrupted run
continues with the very batches it would have had.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

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

    def part(self, rows: slice) -> Self:
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])

    def to(self, device: torch.device) -> Self:
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
    if isinstance(given, dict | list | tuple):
        shape += f" of {', '.join(str(one) if isinstance(given, dict) else type(one).__name__ for one in given)}"
    raise DataError(
        f"a batch is {shape}; expected a pair (images, targets) of tensors. Give the DataLoader a collate_fn that makes one."
    )
