"""Losses that keep a network to its base while it is fine-tuned: alternatives to PAINT that choose a trade-off in advance.

    Recorder    early stopping: the weights at several moments; and their exponential moving average (EMA)
    L2          strength / 2 |theta - theta_0|² + head_strength / 2 |head|²      Xuhong et al., L2-SP, 2018
    EWC         strength / 2 sum_i F_i (theta_i - theta_0,i)², F the Fisher      Kirkpatrick et al., 2017, equation 3
                information of the supported tasks at theta_0
    LwF         strength KL(base's answers for supported tasks || the model's),  Li and Hoiem, 2016, section 3
                on the new task's images
    Mix         strength cross entropy on images of the supported tasks          mixing objectives; replay

PAINT's interpolation needs none of this: its trade-off is chosen after the training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.methods.hooks import Batch, Batches, Hook
from modelpatch.patch.model import PatchedModel

Labelled = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # normalised images (B, C, H, W) and their classes (B,)


class Keeper(Hook):
    """A hook that sees a model while it is fine-tuned, and may add a penalty to its loss."""

    def penalty(self, model: PatchedModel) -> Tensor | float:
        """A loss that does not depend on the batch."""
        return 0.0

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        return self.penalty(model)


@dataclass
class Recorder(Keeper):
    """Keeps the weights after each of `moments` even shares of all steps but the last, and their moving average."""

    moments: int = 8
    decay: float = 0.99
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        self.snapshots, self.average = [], _copy(model)

    def step(self, model: PatchedModel, step: int, total: int) -> None:
        if step:
            for name, tensor in model.tensors().items():
                self.average[name].lerp_(tensor.cpu().float(), 1 - self.decay)
        if step in {round(total * number / self.moments) for number in range(1, self.moments)}:
            self.snapshots.append(_copy(model))


@dataclass
class L2(Keeper):
    """Pulls the weights back to where they started, and those of the head, which started nowhere, to 0."""

    strength: float
    head_strength: float = 0.0
    start: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in _body(model)}

    def penalty(self, model: PatchedModel) -> Tensor | float:
        body = sum((p - self.start[name]).square().sum() for name, p in _body(model))
        return self.strength / 2 * body + pull_head(model, self.head_strength)


@dataclass
class EWC(Keeper):
    """Pulls back those weights that the supported tasks depend on: `heads` answer them, `supported` yields their images."""

    strength: float
    heads: Sequence[nn.Module]
    supported: Sequence[Labelled]
    start: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in _body(model)}
        self.fisher = {name: torch.zeros_like(value) for name, value in self.start.items()}
        seen = 0
        for head, labelled in zip(self.heads, self.supported, strict=True):
            for images, labels in labelled():
                for image, label in zip(images.split(1), labels.split(1), strict=True):
                    loss = F.cross_entropy(head(run_features(model, image)), label.to(image.device))
                    named = dict(_body(model))
                    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                    for name, gradient in zip(named, gradients, strict=True):
                        self.fisher[name] += 0 if gradient is None else gradient.square()
                    seen += 1
        self.fisher = {name: value / max(seen, 1) for name, value in self.fisher.items()}

    def penalty(self, model: PatchedModel) -> Tensor | float:
        parts = ((self.fisher[name] * (p - self.start[name]).square()).sum() for name, p in _body(model))
        return self.strength / 2 * sum(parts)


@dataclass
class LwF(Keeper):
    """Holds the answers for supported tasks, as `heads` give them, to the base's on images of the new task.

    Above 1 the `temperature` T softens both answers, and the divergence counts T² times (Hinton et al., 2015).
    """

    strength: float
    heads: Sequence[nn.Module]
    temperature: float = 1.0
    _held: Iterator[tuple[Tensor, list[Tensor]]] = field(default_factory=lambda: iter(()))

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        held = []
        with torch.no_grad():
            for images in batches():
                features = run_features(model, images)
                held.append((images, [(head(features) / self.temperature).softmax(1) for head in self.heads]))
        self._held = itertools.cycle(held)

    def penalty(self, model: PatchedModel) -> Tensor | float:
        images, answers = next(self._held)
        features = run_features(model, images)
        return (
            self.strength
            * self.temperature**2
            * sum(
                F.kl_div((head(features) / self.temperature).log_softmax(1), answer, reduction="batchmean")
                for head, answer in zip(self.heads, answers, strict=True)
            )
        )


@dataclass
class Mix(Keeper):
    """Trains on images of the supported tasks along."""

    strength: float
    heads: Sequence[nn.Module]
    supported: Sequence[Labelled]
    _streams: list[Iterator[tuple[Tensor, Tensor]]] = field(default_factory=list)

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        self._streams = [itertools.chain.from_iterable(iter(one, None)) for one in self.supported]

    def penalty(self, model: PatchedModel) -> Tensor | float:
        total: Tensor | float = 0.0
        for head, stream in zip(self.heads, self._streams, strict=True):
            images, labels = next(stream)
            total = total + F.cross_entropy(head(run_features(model, images)), labels.to(images.device))
        return self.strength * total


def run_features(model: PatchedModel, images: Tensor) -> Tensor:
    """The features that the head reads, with gradients."""
    features = model.head_input(images, 0)
    assert isinstance(features, Tensor), "a decoder reads maps"
    return features


def pull_head(model: PatchedModel, strength: float) -> Tensor | float:
    """strength / 2 |head|²."""
    return strength / 2 * sum(p.square().sum() for name, p in model.trainable() if name.startswith("head."))


def _body(model: PatchedModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.trainable() if not name.startswith("head."))


def _copy(model: PatchedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().float().clone() for name, tensor in model.tensors().items()}
