"""Backbones that recipes make: with random weights, or with weights that a fit left."""

from __future__ import annotations

import copy

import torch
from torch import nn

from modelpatch import Backbone, Patch
from modelpatch.convert import state_dict_of
from modelpatch.methods import Method
from modelpatch.tasks import TaskRecord


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The backbone's network with every layer as it is initialised, statistics included."""
    module = copy.deepcopy(backbone.module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in module.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    return _around(backbone, module)


def retrained(backbone: Backbone, patch: Patch) -> Backbone:
    """The network with the patch's weights; its own classifier stays. Raises `PatchError` for a patch that adds modules."""
    trained = state_dict_of(backbone, patch)
    module = copy.deepcopy(backbone.module)
    own = f"{backbone.classifier}."
    module.load_state_dict(module.state_dict() | {n: t for n, t in trained.items() if not n.startswith(own)})
    return _around(backbone, module)


def _around(backbone: Backbone, module: nn.Module) -> Backbone:
    """A backbone of its own name: what loads by the old one's is another network."""
    return backbone.around(module, f"module:{type(module).__name__}", {})


def untrained_patch(backbone: Backbone, task: TaskRecord, method: Method) -> Patch:
    """A patch of the method as it is before training, for sizes and times."""
    with torch.random.fork_rng(devices=[]):
        model = method.draft(backbone, len(task.classes))
    return model.to_patch(task, preprocessing=backbone.preprocessing, method=method)
