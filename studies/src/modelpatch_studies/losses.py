"""Losses of a batch's features that any method can add with `with_loss`: hosts of transfer and of domain adaptation.

    BSS            strength sum of the k smallest σ², σ the singular values of the batch's features      Chen et al., 2019
    DELTA          strength / 2 sum_stages sum_c C a_c mean (f_c - f_c of the base)², a = softmax of what   Li et al., 2019
                   the loss grows by without channel c; + head_strength / 2 |head|²
    UniformPrior   strength log-likelihood of a discriminator of features and of points drawn uniformly    Sinha et al., 2020
                   from the unit sphere, which the body maximises and the discriminator minimises
    Confusion      the same of features of this task's images and of another's, without its classes:       Tzeng et al., 2017
                   as ADDA, in one stage and with reversed gradients (Ganin et al., 2016)

`contrast_classes` is a function for `modelpatch.methods.Custom`; `modelpatch.methods` has L2 (L2-SP) and LwF.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch import Backbone, PatchedModel
from modelpatch.heads import pooled_width
from modelpatch.methods import Batch, FeatureLoss, Keeper


@dataclass
class BSS(FeatureLoss):
    """Batch spectral shrinkage: what transfers badly lies in the features' smallest `count` singular values."""

    strength: float = 1e-3
    count: int = 1

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor:
        return self.strength * torch.linalg.svdvals(self.features.float())[-self.count :].square().sum()


def contrast_classes(features: Tensor, batch: Batch, temperature: float = 0.07) -> Tensor:
    """Features of one class together, others apart: supervised contrast (Khosla et al., 2020) within the batch.

    Bi-Tuning (Zhong et al., 2020) contrasts with a queue of keys of a slowly moving copy, behind a projection; here keys are
    the batch's own features.
    """
    unit = F.normalize(features.float(), dim=1)
    alike = batch.labels[:, None] == batch.labels[None]
    own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logs = (unit @ unit.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
    pairs = alike & ~own
    return -logs.masked_fill(~pairs, 0.0).sum() / pairs.sum().clamp(min=1)


# behaviour of the base ----------------------------------------------------------------------------------------------


@dataclass
class DELTA(Keeper):
    """Holds the outputs of the backbone's stages to the base's, most those channels that the new task depends on.

    `probe` is a linear head for the new task on the base's features, whose loss on the first batch that `labelled` yields
    tells the channels apart.
    """

    backbone: Backbone
    probe: nn.Module
    labelled: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    strength: float = 1e-2
    head_strength: float = 1e-2
    attention: dict[int, Tensor] = field(default_factory=dict)  # by stage's last segment: (C,), adding up to 1
    seen: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Callable[[], Iterable[Tensor]]) -> None:
        self.attention = self._attend([stage[-1].index for stage in self.backbone.chain.stages])
        lasts = [start - 1 for start in (*model.starts[1:], model.end)]
        for last, part in zip(lasts, model.parts, strict=True):
            if last in self.attention:
                part.register_forward_hook(lambda _, inputs, output, last=last: self.seen.update({last: output}))

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        x, at, total = (
            batch.inputs,
            batch.start,
            self.head_strength / 2 * sum(p.square().sum() for p in model.head.parameters()),
        )
        for last, weight in self.attention.items():
            if last < at or last not in self.seen:
                continue
            with torch.no_grad():
                x, at = self.backbone.chain.run(x, at, last + 1), last + 1
            axis = channel_axis(self.backbone, last)
            distance = (self.seen.pop(last).float() - x.float()).square().movedim(axis, 1).flatten(2).mean(2)
            total = total + self.strength / 2 * len(weight) * (weight * distance).sum()
        return total

    @torch.no_grad()
    def _attend(self, taps: list[int]) -> dict[int, Tensor]:
        """softmax(z / 5) over channels, z the standardised growth of the probe's loss with a channel at 0, stage by stage."""
        chain = self.backbone.chain
        x, labels = next(iter(self.labelled()))
        labels = labels.to(x.device)
        attention, at = {}, 0
        for last in taps:
            x, at = chain.run(x, at, last + 1), last + 1
            axis = channel_axis(self.backbone, last)
            losses = []
            for channel in range(x.shape[axis]):
                without = x.clone()
                without.select(axis, channel).zero_()
                features = chain.run(without, at, len(chain)) if at < len(chain) else without
                losses.append(F.cross_entropy(self.probe(features), labels))
            growth = torch.stack(losses)  # but for the loss with all channels, which the mean takes away
            attention[last] = ((growth - growth.mean()) / growth.std().clamp(min=1e-12) / 5).softmax(0)
        return attention


def channel_axis(backbone: Backbone, last: int) -> int:
    """The axis of channels in the output (B, ...) of segment `last`: 1 for maps with channels first, else the last."""
    shape = backbone.chain[last].output_shape
    return 1 if len(shape) == 3 and shape[0] == pooled_width(backbone.chain, last) else len(shape)


# adversaries --------------------------------------------------------------------------------------------------------


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Adversary(FeatureLoss):
    """The body's features (0) against others (1), told apart by a small network that is trained beside it."""

    strength: float
    rate: float
    discriminator: nn.Module | None = None

    def begin(self, model: PatchedModel, batches: Callable[[], Iterable[Tensor]]) -> None:
        super().begin(model, batches)
        self.discriminator = None  # made with the first features, whose width it has

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        if self.discriminator is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor:
        own, others = F.normalize(self.features.float(), dim=1), self.others(model, len(self.features))
        if self.discriminator is None:
            self._build(own)
        assert self.discriminator is not None
        both = torch.cat([_Reversed.apply(own), others])
        kinds = torch.cat([torch.zeros(len(own)), torch.ones(len(others))]).to(own.device)
        return self.strength * F.binary_cross_entropy_with_logits(self.discriminator(both).flatten(), kinds)

    def _build(self, features: Tensor) -> None:
        width = features.shape[1]
        self.discriminator = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)).to(features.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=self.rate)

    @abstractmethod
    def others(self, model: PatchedModel, count: int) -> Tensor:
        """Unit vectors (count, D) that the discriminator tells from the features."""


@dataclass
class UniformPrior(Adversary):
    """Features spread over the whole sphere keep what a task does not need, and serve others better. Reads no other data."""

    strength: float = 0.1
    rate: float = 1e-3

    def others(self, model: PatchedModel, count: int) -> Tensor:
        return F.normalize(torch.randn_like(self.features.float()), dim=1)


@dataclass
class Confusion(Adversary):
    """Features that do not tell this task's images from another's: `images` yields those, normalised, without classes."""

    images: Callable[[], Iterable[Tensor]]
    strength: float = 0.1
    rate: float = 1e-3
    _stream: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def begin(self, model: PatchedModel, batches: Callable[[], Iterable[Tensor]]) -> None:
        super().begin(model, batches)
        self._stream = itertools.chain.from_iterable(iter(self.images, None))

    def others(self, model: PatchedModel, count: int) -> Tensor:
        model(next(self._stream))  # the hook of `begin` keeps its features
        return _Reversed.apply(F.normalize(self.features.float(), dim=1))
