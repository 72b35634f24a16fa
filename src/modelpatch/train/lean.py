"""Training in little memory, with the same steps.

    weights    made by a patch from frozen ones (W ⊙ m) are not kept for the backward pass but computed again there
    gradients  are used as soon as some of them are complete, and freed

A Piggyback run holds the scores and Adam's two moments, 12 bytes a weight, besides the backbone and the activations.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.patch.model import PatchedModel
from modelpatch.train.trainer import Callback, Trainer

SHARE = 32  # a step is taken with at least this part of all gradients
LEAST = 2**20  # bytes


class RemadeWeights:
    """Call it for a context around forward passes: reweighted weights made in it are freed, and computed again when needed."""

    def __init__(self, model: PatchedModel) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], nn.Module, Tensor]] = {}
        for path in model.reweighted.values():
            model.get_submodule(path).register_forward_hook(self._remember)

    def __call__(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._made[output.untyped_storage().data_ptr()] = (weakref.ref(output), module, inputs[0])

    def _pack(self, tensor: Tensor) -> Any:
        made = self._made.get(tensor.untyped_storage().data_ptr())
        if made is None or made[0]() is None:  # other bytes may lie where a freed weight did
            return tensor.detach()
        return made[1], made[2], (tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        module, weight, geometry = packed
        with torch.no_grad():
            return module.forward(weight).as_strided(*geometry)


class EagerSteps(Callback):
    """Take the optimizer's steps within the backward pass, whenever enough gradients are complete.

    The usual step after it uses the rest. For optimizers that treat every tensor on its own, as those of methods do.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Begin, unless gradients are scaled."""
        if not trainer.scaler.is_enabled():
            self.watch(trainer.optimizer)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Register a hook for every gradient of an optimizer."""
        self.optimizer, self._pending = optimizer, 0
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.limit = max(LEAST, sum(parameter.nbytes for parameter in parameters) // SHARE)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, parameter: Tensor) -> None:
        self._pending += parameter.nbytes
        if self._pending >= self.limit:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._pending = 0
