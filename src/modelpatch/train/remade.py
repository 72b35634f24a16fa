"""Memory of training with masks: weights that are made from frozen ones are not kept for the backward pass."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.patch.model import PatchedModel


class RemadeWeights:
    """Call it for a context around forward passes, in which weights made from frozen ones (W ⊙ m) are not kept.

    They are computed again in the backward pass. With `EagerSteps` a run of Piggyback holds the scores and Adam's two moments,
    12 bytes a weight, besides the backbone and the activations.
    """

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
