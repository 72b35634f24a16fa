"""What a selection chooses among: a method over some blocks of the chain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.linear_probe import head_alone
from modelpatch.methods.method import Method, confine
from modelpatch.select.trials import Trial


@dataclass(frozen=True)
class Candidate:
    """A method confined to `blocks`, none for the linear probe. With `parent` its trials start from the parent's patches."""

    name: str
    blocks: tuple[str, ...]
    method: Method
    parent: Candidate | None = None

    @classmethod
    def of(cls, method: Method, blocks: Sequence[str], parent: Candidate | None = None) -> Candidate:
        """The method over these blocks; over none, the linear probe with the method's head rate and optimizer."""
        if not blocks:
            probe = head_alone(method)
            return cls(probe.name, (), probe)
        return cls(" + ".join(blocks), tuple(blocks), confine(method, blocks), parent)

    def trial(self, fold: int, seed: int, epochs: int) -> Trial:
        """This candidate on one fold."""
        start = self.parent.trial(fold, seed, epochs) if self.parent else None
        return Trial(self.method, fold, seed, epochs, start)


def units(
    backbone: Backbone, *, consecutive: int = 1, pairs: bool = False, stages: bool = False
) -> list[tuple[str, ...]]:
    """What a profile fine-tunes at a time, by the names of blocks, in the order of the chain.

    Every block; or each run of `consecutive` blocks; or all `pairs`; or the `stages`. Raises `MethodError` for more than one
    of these, or for runs longer than the chain has blocks.
    """
    names = [block.name for block in backbone.chain.blocks]
    if (consecutive != 1) + pairs + stages > 1:
        raise MethodError("consecutive, pairs and stages exclude each other. Give one of them.")
    if not 1 <= consecutive <= len(names):
        raise MethodError(f"runs of {consecutive} blocks: {backbone.spec} has {len(names)} blocks.")
    if stages:
        return [tuple(block.name for block in stage) for stage in backbone.chain.stages]
    if pairs:
        return list(itertools.combinations(names, 2))
    return [tuple(names[start : start + consecutive]) for start in range(len(names) - consecutive + 1)]


def describe(backbone: Backbone, blocks: Sequence[str]) -> str:
    """A short name for some blocks: a run is `first to last`."""
    names = [block.name for block in backbone.chain.blocks]
    places = [names.index(block) for block in blocks]
    if len(blocks) > 2 and places == list(range(places[0], places[-1] + 1)):
        return f"{blocks[0]} to {blocks[-1]}"
    return " + ".join(blocks)
