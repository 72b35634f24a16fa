"""Head2Toe: a linear head on features chosen from all blocks, not the last one alone. A baseline.

    h = [pool(block_1(x)) / |.|, ..., pool(block_n(x)) / |.|]        all pooled outputs, each block's at unit length
    min_W  CE(W h) + λ Σ_j |W_:,j|₂                                  group lasso: features that matter keep their norm
    logits = W_S h_S                                                 S the share of features with the largest norms

Evci, Dumoulin, Larochelle and Mozer: *Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning*
(ICML 2022), section 3. Nothing of the backbone changes; the patch is its head and which features it reads.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.heads.base import DraftHead, HeadRecord
from modelpatch.heads.reading import pooled_width
from modelpatch.methods.blocks import find_segments
from modelpatch.methods.hooks import Batch, Hook
from modelpatch.methods.linear_probe import HeadMethod
from modelpatch.methods.method import register_method
from modelpatch.patch.model import PatchedModel

Share = Annotated[float, Field(gt=0, le=1)]


@register_method
class Head2Toe(HeadMethod):
    """Trains a head on the outputs of all blocks, chooses the share `keep` of the features, and trains on.

    `lasso` is λ, `choose_after` the share of all steps after which features are chosen. `until` names the last block that is
    read (as in `Subset.blocks`), for an early exit: nothing after it runs in an engine.
    """

    name = "head2toe"
    paper = "Evci et al., Head2Toe, ICML 2022"
    order = 1
    compared = ("head2toe",)

    keep: Share = 0.25
    lasso: NonNegativeFloat = 1e-4
    choose_after: Annotated[float, Field(gt=0, lt=1)] = 0.5
    until: str | None = None

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        """A head on the blocks that are read. Raises `MethodError` where `until` lies before all of them."""
        chain = backbone.chain
        last = len(chain) - 1 if self.until is None else find_segments(backbone, (self.until,))[-1].index
        read = {block.index for block in chain.blocks if not block.bundles} | {len(chain) - 1}
        taps = [tap for tap in sorted(read) if tap <= last]
        if not taps:
            raise MethodError(f"head2toe: until={self.until!r} lies before the first block, {chain.blocks[0].name!r}.")
        return ChoosingHead(sum(pooled_width(chain, tap) for tap in taps), classes, tuple(taps), self.keep)

    def hooks(self) -> tuple[Hook, ...]:
        return (ChooseFeatures(self.lasso, self.choose_after),)


@dataclass(frozen=True)
class ChooseFeatures(Hook):
    """Add the group lasso until the features are chosen, after a share of all steps."""

    lasso: float
    after: float

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        if step == round(self.after * total) and isinstance(model.head, ChoosingHead):
            model.head.choose()

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        head = model.head
        if not isinstance(head, ChoosingHead) or not head.chosen.all():
            return 0.0
        return self.lasso * head.weight.norm(dim=0).sum()


class ChoosingHead(nn.Linear, DraftHead):
    """Logits (B, K) from all pooled outputs (B, D), of which those that are not `chosen` are read as 0."""

    chosen: Tensor

    def __init__(self, features: int, outputs: int, taps: tuple[int, ...], keep: float) -> None:
        super().__init__(features, outputs)
        self.taps, self.count = taps, max(1, round(keep * features))
        self.register_buffer("chosen", torch.ones(features, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.chosen, self.bias)

    @torch.no_grad()
    def choose(self) -> None:
        best = self.weight.norm(dim=0).topk(self.count).indices
        self.chosen.zero_()
        self.chosen[best] = True

    @property
    def record(self) -> HeadRecord:
        return HeadRecord(kind="selected", features=int(self.chosen.sum()), outputs=len(self.bias), taps=self.taps)

    def stored(self) -> dict[str, Tensor]:
        selected = self.chosen.nonzero()[:, 0]
        return {
            "weight": self.weight.detach()[:, selected],
            "bias": self.bias.detach(),
            "selected": selected.to(torch.int32),
        }
