"""Several processes that train together, as torchrun starts them: batches are cut into parts, gradients added up.

    batch     [ process 0 | process 1 | ... ]          every process sees the whole batch's augmentation, and keeps its part
    gradient  sum_r share_r g_r                        g_r of the mean loss over part r, share_r the part's share of the batch

so that a run of any number of processes equals the run of one, but for rounding. A `Team` is the processes that share what
they train. Process 0 of a team leads: it writes files.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # a process that died is noticed by its closed connection, long before


@dataclass(frozen=True)
class Team:
    """The processes `ranks` of all; this one is `rank`. Alone unless said otherwise."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: Any = None

    @classmethod
    def everyone(cls) -> Self:
        """All processes that `torch.distributed` knows; this one alone where it was not started."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(tuple(range(dist.get_world_size())), dist.get_rank())

    def some(self, ranks: Sequence[int]) -> Self:
        """A part of the team. Every process of the team must ask for the same parts in the same order."""
        group = dist.new_group(list(ranks)) if 1 < len(ranks) < len(self.ranks) else self.group
        return replace(self, ranks=tuple(ranks), group=group)

    @property
    def alone(self) -> bool:
        return len(self.ranks) == 1

    @property
    def leads(self) -> bool:
        """True for the team's first process."""
        return self.rank == self.ranks[0]

    def part(self, count: int) -> slice:
        """This process's rows of a batch of `count`; none if there are fewer rows than processes before it."""
        place, parts = self.ranks.index(self.rank), len(self.ranks)
        return slice(place * count // parts, (place + 1) * count // parts)

    def add_up_gradients(self, parameters: Iterable[Tensor], *others: Tensor) -> None:
        """Replace gradients, of which a missing one is zero, and `others` by their sums over the team's processes."""
        if self.alone:
            return
        tensors = list(others)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            tensors.append(parameter.grad)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def follow(self, value: T) -> T:
        """The leader's value, in every process."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.ranks[0], group=self.group)
        return box[0]

    def collect(self, value: T) -> list[T]:
        """Every process's value by rank, in every process."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self.group)
        return values


ALONE = Team()


def is_lonely() -> bool:
    """Return True where torchrun started this process among others with which it is not connected."""
    return not dist.is_initialized() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined() -> Iterator[Team]:
    """All processes that torchrun started with this one, connected while the context lasts; alone without torchrun."""
    if not is_lonely():
        yield Team.everyone()
        return
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store through its restarts; addresses that dead processes left there must not be read.
        # On several machines the restarts are not counted alike.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # type: ignore[attr-defined]
    with process_group(store=store, rank=rank, world_size=count) as team:
        yield team


@contextmanager
def process_group(**meeting: Any) -> Iterator[Team]:
    """The processes that meet as `init_process_group` is told. Gradients travel through gloo, those on GPUs through NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, **meeting)
    try:
        yield Team.everyone()
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Return True where torchrun started this process in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
