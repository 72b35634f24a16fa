"""A method confined to some segments of the chain: scale and bias of one stage, a mask over one block.

    blueprint = { tensors, added modules of the method } that lie in the named segments; all else stays frozen

This is what a finetuning profile varies (SubTuning, 2023, section 2), for any method and not for whole blocks alone.
`scale-bias(blocks=[layer4])` spells it where a method has no `blocks` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.composite import Composite
from modelpatch.methods.method import Method
from modelpatch.methods.subset import find_segments
from modelpatch.methods.wrapped import Wrapped
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.changes import Reweighting


def confine(method: Method, blocks: Sequence[str]) -> Method:
    """The method with only the named segments to change (names as in `Subset.blocks`).

    A method with a hyperparameter `blocks` gets it. Of several methods in one patch those are confined that have one; if
    none has, all are.
    """
    if isinstance(method, Composite):
        own = [_has_blocks(member) for member in method.methods]
        chosen = own if any(own) else [True] * len(own)
        pairs = zip(method.methods, chosen, strict=True)
        return Composite.of(*(confine(member, blocks) if confined else member for member, confined in pairs))
    if isinstance(method, Confined):
        return Confined.of(method.method, blocks)
    if _has_blocks(method):
        return replace(method, blocks=tuple(blocks))  # type: ignore[call-arg]
    return Confined.of(method, blocks)


def _has_blocks(method: Method) -> bool:
    return any(field.name == "blocks" for field in fields(method))


@dataclass(frozen=True, kw_only=True)
class Confined(Wrapped):
    """`method` within `blocks` only. Everything else about it, rates and training state included, is the method's own."""

    blocks: tuple[str, ...]

    @classmethod
    def of(cls, method: Method, blocks: Sequence[str]) -> Confined:
        """The method, confined."""
        return cls(method=method, blocks=tuple(blocks), **cls.common(method))

    def hyperparameters(self) -> dict[str, Any]:
        return {**self.method.hyperparameters(), "blocks": list(self.blocks)}

    def blueprint(self, backbone: Backbone) -> Blueprint:
        """What the method owns and adds in these segments. Raises `MethodNotApplicableError` where that is nothing."""
        chain, chosen = backbone.chain, self._chosen(backbone)
        whole = self.method.blueprint(backbone)
        blocks = {block.index for block in chain.blocks}

        def inside(graft: Graft) -> bool:
            span = set(range(graft.start, graft.end))
            return bool(span & chosen) and span & blocks <= chosen

        owned = tuple(name for name in whole.owned if chain.segment_of(name).index in chosen)
        grafts = tuple(graft for graft in whole.grafts if inside(graft))
        if not owned and not grafts:
            raise MethodNotApplicableError(f"{self.name} has nothing to change in {', '.join(self.blocks)}.")
        return Blueprint(owned=owned, grafts=grafts)

    def reweighted(self, backbone: Backbone) -> tuple[str, ...]:
        """Those in these segments."""
        chain, chosen = backbone.chain, self._chosen(backbone)
        return tuple(name for name in self.method.reweighted(backbone) if chain.segment_of(name).index in chosen)

    def reweightings(self, backbone: Backbone) -> dict[str, Reweighting]:
        """Those of weights in these segments."""
        made = self.method.reweightings(backbone)
        return {name: made[name] for name in self.reweighted(backbone)}

    def _chosen(self, backbone: Backbone) -> set[int]:
        return {segment.index for segment in find_segments(backbone, self.blocks)}
