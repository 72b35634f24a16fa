"""Parts of a recipe against fitting images too closely: mixed images, drop path, rates by depth, balanced rows.

    mixup     x = λ x + (1 - λ) x',  y = λ y + (1 - λ) y'                      λ ~ Beta(α, α), x' another image of the batch
    cutmix    x' in a random box of the share 1 - λ of x, y in these shares
    drop path x + f(x) becomes x for some images of a batch, in later blocks more of them
    rates     lr decay^d for what lies d blocks before the head
    rows      drawn with replacement, all classes alike

Zhang, Cisse, Dauphin, Lopez-Paz: *mixup* (ICLR 2018), equation 1. Yun et al.: *CutMix* (ICCV 2019), equations 1 and 2. Huang,
Sun, Liu, Sedra, Weinberger: *Deep Networks with Stochastic Depth* (ECCV 2016), equation 4. Clark, Luong, Le, Manning:
*ELECTRA* (ICLR 2020), appendix A, rates by depth.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.ops import StochasticDepth

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.methods.method import Trainable
from modelpatch.patch.model import PatchedModel
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.kind import Kind
from modelpatch.train.batches import BatchSource, Minibatch
from modelpatch.train.inputs import Inputs, RowBatches
from modelpatch.train.settings import FitOptions, FitSettings

DROPPED = re.compile(r"drop_?path\d*")  # what networks call the places of drop path


@dataclass(frozen=True)
class MixedBatches:
    """Batches of images (B, C, H, W) and classes (B,) whose images are mixed; targets become shares of classes (B, K).

    Of mixup and CutMix, whose α is above 0, each batch takes one. The mixture follows (seed, epoch, number of the batch).
    """

    source: BatchSource
    classes: int
    mixup: float
    cutmix: float
    seed: int

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def batches(self, epoch: int, first: int = 0) -> Iterator[Minibatch]:
        for number, batch in enumerate(self.source.batches(epoch, first), first):
            yield self._mix(batch, np.random.default_rng([self.seed, epoch, number]))

    def _mix(self, batch: Minibatch, random: np.random.Generator) -> Minibatch:
        cuts = self.cutmix > 0 and (not self.mixup or random.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share, order = float(random.beta(alpha, alpha)), torch.from_numpy(random.permutation(len(batch)))
        images, other = batch.inputs, batch.inputs[order]
        if cuts:
            height, width = images.shape[-2:]
            top, bottom, left, right = cut_box(share, height, width, random)
            images = images.clone()
            images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
        else:
            images = torch.lerp(other, images, share)
        shares = F.one_hot(batch.targets, self.classes).float()
        return replace(batch, inputs=images, targets=torch.lerp(shares[order], shares, share))


def train_batches(inputs: Inputs, settings: FitSettings, data: Task) -> RowBatches | MixedBatches:
    """Return the batches of training inputs: shuffled or drawn, and mixed where the settings say so."""
    classes, weights = len(data.classes), None
    if settings.sampling == "balanced":
        weights = balanced_weights(torch.from_numpy(data.train.labels), classes)
    rows = RowBatches(inputs, settings.batch_size, settings.seed, weights)
    return MixedBatches(rows, classes, settings.mixup, settings.cutmix, settings.seed) if settings.mixes else rows


def cut_box(share: float, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a random box with the share 1 - `share` of an image, cut at the image's edges."""
    side = (1 - share) ** 0.5 / 2
    y, x = random.random() * height, random.random() * width

    def cut(edge: float, most: int) -> int:
        return round(min(max(edge, 0), most))

    top, bottom = cut(y - side * height, height), cut(y + side * height, height)
    return top, bottom, cut(x - side * width, width), cut(x + side * width, width)


def set_drop_path(model: PatchedModel, rate: float) -> None:
    """Drop the paths of a share of each batch's images in the patch's spans, rising from 0 to `rate` in the last one.

    Raises `TrainingError` for a network that has no places for it there.
    """
    if not rate:
        return
    places = [
        (owner, name, child)
        for variant in model.variants
        for owner in variant.modules()
        for name, child in owner.named_children()
        if isinstance(child, DropPath | StochasticDepth)
        or (DROPPED.fullmatch(name) and (type(child) is nn.Identity or hasattr(child, "drop_prob")))
    ]
    if not places:
        raise TrainingError(
            f"drop_path={rate:g}: what the patch changes of {model.backbone.spec} has no drop path. Leave the setting out, or "
            "take a method that changes residual blocks of timm, torchvision or transformers."
        )
    for number, (owner, name, child) in enumerate(places, 1):
        share = rate * number / len(places)
        dropping = StochasticDepth(share, "row") if isinstance(child, StochasticDepth) else DropPath(share)
        setattr(owner, name, dropping)
        model.trained_modules.append(dropping)


def by_depth(groups: list[dict[str, Any]], model: Trainable, backbone: Backbone, decay: float) -> list[dict[str, Any]]:
    """Divide an optimizer's groups by depth: what lies d blocks before the head has the rate lr decay^d."""
    if decay == 1:
        return groups
    depths = {id(parameter): depth_of(name, backbone) for name, parameter in model.trainable()}
    divided = []
    for group in groups:
        parts: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(depths[id(parameter)], []).append(parameter)
        divided += [{**group, "params": own, "lr": group["lr"] * decay**depth} for depth, own in sorted(parts.items())]
    return divided


def with_rates(optimizer: Optimizer, model: Trainable, backbone: Backbone, decay: float) -> Optimizer:
    """The optimizer, before its first step, with learning rates by depth."""
    optimizer.param_groups = by_depth(optimizer.param_groups, model, backbone, decay)
    return optimizer


def depth_of(name: str, backbone: Backbone) -> int:
    """The number of blocks from a tensor of a patch file, its own block included, to the head."""
    kind, _, rest = name.partition("/")
    if name.startswith("head."):
        return 0
    index = int(rest.partition("-")[0]) if kind == "graft" else backbone.chain.segment_of(rest).index
    return sum(block.index >= index for block in backbone.chain.blocks)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """The weight (N,) by which each image is drawn so that classes are drawn alike."""
    return 1 / torch.bincount(labels, minlength=classes)[labels].double()


def check_recipe(settings: FitSettings, options: FitOptions, kind: Kind, data: Task) -> None:
    """Raises `TrainingError` for settings that the task does not take, or that exclude each other."""
    plain = type(kind) is Classification
    for name, given in (
        ("mixup", settings.mixup),
        ("cutmix", settings.cutmix),
        ("sampling", settings.sampling == "balanced"),
    ):
        if given and not plain:
            raise TrainingError(
                f"{name} needs one class an image; {data.task.name} is a {kind.name} task. Leave it out."
            )
    if settings.mixes and options.loss is not None:
        raise TrainingError("mixup and cutmix give a loss shares of classes. Leave them out, or the loss of your own.")
    if settings.sampling == "balanced" and data.train.is_stream:
        raise TrainingError("sampling='balanced' draws images in any order, which a stream has not. Set class_weights.")
    if settings.swa and options.ema is not None:
        raise TrainingError("swa and ema are both averages of the weights. Set one of them.")
