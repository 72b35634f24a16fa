"""What every method is: a dataclass of hyperparameters that says what a patch owns and how it is trained.

    blueprint(backbone)   which tensors the patch owns, which modules it adds        -> patch.Blueprint
    draft(...)            the model to train: the frozen chain, variants and a head  -> patch.PatchedModel
    prepare(model, ...)   work before the first step (recomputing statistics)
    train_mode(model)     which norm layers use batch statistics while training
    parameter_groups(...) learning rates and weight decay

A new method is one file and its line in `methods/__init__.py`; whatever it makes is an ordinary patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.patch import Blueprint, LinearHead, PatchedModel

Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyperparameters common to all methods.

    `lr` is the patch's learning rate and `head_lr` the head's. `head="random"` leaves the head as it was initialised.
    Weight decay is never applied to vectors (norm parameters, biases).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    lists: ClassVar[frozenset[str]] = frozenset()

    lr: PositiveFloat = 1e-3
    head_lr: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    head: Literal["trained", "random"] = "trained"

    @abstractmethod
    def blueprint(self, backbone: Backbone) -> Blueprint:
        """What a patch of this method owns and adds. Raises `MethodNotApplicableError` where there is nothing."""

    def draft(self, backbone: Backbone, classes: int) -> PatchedModel:
        """The model to train, with a fresh head for `classes` outputs that follows torch's random state."""
        head = LinearHead(backbone.chain.feature_dim, classes)
        head.requires_grad_(self.head == "trained")
        return PatchedModel.draft(backbone, self.blueprint(backbone), head)

    def count_parameters(self, backbone: Backbone) -> int:
        """Trainable parameters without the head."""
        model = self.draft(backbone, 1)
        return sum(
            p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")
        )

    def prepare(self, model: PatchedModel, batches: Batches) -> None:
        """Work on the model before the first step; `batches()` yields normalised training images in random order."""
        return

    def train_mode(self, model: PatchedModel) -> None:
        """Training state for the patched spans and the head; frozen parts and all BatchNorm layers stay in eval mode."""
        model.eval()
        model.head.train()
        for part in model.variants:
            part.train()
        for norm in batch_norms(model):
            norm.eval()

    def parameter_groups(self, model: PatchedModel) -> list[dict[str, Any]]:
        """Optimizer groups: patch matrices, patch vectors (no decay), head weight, head bias (no decay)."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                lr = self.head_lr if name.startswith("head.") else self.lr
                decay = self.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((lr, decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def make_optimizer(self, model: PatchedModel) -> torch.optim.Optimizer:
        """The method's optimizer over its parameter groups. Adam and AdamW use PyTorch's other defaults.

        Raises `MethodError` if there is nothing to train.
        """
        groups = self.parameter_groups(model)
        if not groups:
            raise MethodError(f"{self.name} trains nothing with head={self.head!r}. Set head='trained'.")
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=self.lr, fused=True)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every layer that normalises by batch or running statistics."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]
