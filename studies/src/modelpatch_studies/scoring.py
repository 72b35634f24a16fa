"""Images of a split as a network sees them, and their features under a backbone or a patched model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modelpatch import Backbone, PatchedModel, Preprocessing
from modelpatch.data import Split

BATCH = 64


@dataclass(frozen=True)
class Reader:
    """Reads splits with one preprocessing; random orders follow `seed`."""

    backbone: Backbone
    preprocessing: Preprocessing
    seed: int = 0

    def images(self, split: Split, batch: int = BATCH, shuffle: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (B, C, H, W) on the backbone's device and their classes (B,)."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(split), generator=generator) if shuffle else torch.arange(len(split))
        labels = torch.from_numpy(split.labels)
        for rows in order.split(batch):
            yield self.preprocessing(*(split.images[int(row)] for row in rows)).to(self.backbone.device), labels[rows]

    def base_features(self, split: Split) -> Tensor:
        """The frozen backbone's features (N, D) of a split, on the CPU."""
        return self._gather(self.backbone.chain, split)

    def features(self, model: PatchedModel, split: Split) -> Tensor:
        """The input (N, D) of a patched model's head for a split, on the CPU."""
        return self._gather(lambda images: head_input(model, images), split)

    def _gather(self, compute: Callable[[Tensor], Tensor], split: Split) -> Tensor:
        with torch.no_grad():
            return torch.cat([compute(images).flatten(1).cpu() for images, _ in self.images(split)])


def head_input(model: PatchedModel, images: Tensor) -> Tensor:
    """The tensor that the model's head reads for these images, with gradients where they are enabled."""
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[0]
