"""PackNet: a task in the weights that the earlier ones can do without. A baseline for masks.

    1. free the smallest |W| of every layer, keep the rest            W ⊙ kept
    2. train the freed weights, from zero                             W ⊙ kept + V
    3. prune the smallest |V| and go on with what is left             W ⊙ kept + V ⊙ left

Mallya and Lazebnik: *PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning* (CVPR 2018). Tasks are packed
one after another into what was pruned, so that their order matters and room runs out; the base itself is untouched here,
because the patch holds what it keeps as a mask and what it adds as a sparse difference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.hooks import Hook
from modelpatch.methods.method import Method, Optimizer, register_method
from modelpatch.methods.piggyback import weight_names
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel

Share = Annotated[float, Field(gt=0, lt=1)]


@register_method
class PackNet(Method):
    """Frees the share `free` of every weight matrix, trains it, prunes the share `prune` of that and trains on.

    Pruning comes after the share `prune_after` of all steps. `after` names the PackNet patch file of an earlier task on the
    same backbone: its weights are kept too and this task is packed into what it left.
    """

    name = "packnet"
    paper = "Mallya and Lazebnik, PackNet, CVPR 2018"
    order = 10
    compared = ("packnet",)

    optimizer: Optimizer = "adam"
    free: Share = 0.5
    prune: Share = 0.75
    prune_after: Share = 0.6
    after: str | None = None

    def changes(self, backbone: Backbone) -> Blueprint:
        return Blueprint(owned=weight_names(backbone))

    def reweightings(self, backbone: Backbone) -> dict[str, Callable[[], Reweighting]]:
        earlier: Mapping[str, Tensor] = {}
        if self.after is not None:
            patch = Patch.load(self.after)
            patch.check_backbone(backbone)
            if patch.method.name != self.name:
                raise MethodError(f"packnet: after={self.after!r} is a patch of {patch.method.name}, not of packnet.")
            earlier = patch.tensors

        def pack(name: str) -> Packed:
            weight = backbone.chain.tensor(name).detach()
            mask, delta = earlier.get(f"mask/{name}"), earlier.get(f"delta/{name}")
            kept = largest(weight, 1 - self.free) if mask is None else mask.to(weight.device)
            rest = torch.zeros_like(weight) if delta is None else delta.float().to(weight.device)
            return Packed(kept, torch.where(kept, weight, rest))

        return {name: partial(pack, name) for name in weight_names(backbone)}

    def hooks(self) -> tuple[Hook, ...]:
        return (PruneOnce(self.prune, self.prune_after),)


@dataclass(frozen=True)
class PruneOnce(Hook):
    """Prune a share of the freed weights after a share of all steps."""

    share: float
    after: float

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        if step == round(self.after * total):
            for module in model.modules():
                if isinstance(module, Packed):
                    module.prune(self.share)


def largest(tensor: Tensor, share: float) -> Tensor:
    """A bool mask of the `share` of elements that are largest in magnitude; ties are settled by place."""
    count = round(share * tensor.numel())
    if count == 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    sizes = tensor.abs().flatten()
    least = sizes.kthvalue(sizes.numel() - count + 1).values  # much faster than sorting
    mask = sizes > least
    mask[(sizes == least).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask.view(tensor.shape)


class Packed(Reweighting):
    """W -> V, trained, where the task has weights `left`, else `fixed`: W where `kept`, or an earlier task's own weight."""

    follows = False
    kept: Tensor
    fixed: Tensor
    left: Tensor

    def __init__(self, kept: Tensor, fixed: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)
        self.register_buffer("fixed", fixed)
        self.register_buffer("left", ~kept & (fixed == 0))
        self.values = nn.Parameter(torch.zeros_like(fixed))
        self.idle = fixed.numel() - int(self.left.sum())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.left, self.values, self.fixed)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Let go of the share of the task's own weights that are smallest."""
        count = int(self.left.sum())
        self.left &= largest(self.values * self.left, (1 - share) * count / self.left.numel())

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        return {"mask": self.kept, "delta": torch.where(self.left, self.values, self.fixed.masked_fill(self.kept, 0))}
