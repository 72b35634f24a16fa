"""Structural clones: a module's own Python structure over the frozen tensors of another.

    clone.conv.weight is backbone.conv.weight      frozen: the same object, no bytes of its own
    clone.bn.weight                                owned: a parameter of its own, started from the backbone's values
    clone.bn.running_mean                          buffers are always copied: a BatchNorm in train mode writes them

A clone has its own train/eval flags and hooks, may be edited, and cannot move what it was cloned from.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn


def clone_module(module: nn.Module, owned: Collection[str] = ()) -> nn.Module:
    """A clone of `module` in eval mode that owns the parameters named in `owned` and shares all others.

    Owned parameters are copies that require gradients; shared ones are the same objects as in `module`.
    Raises KeyError for a name in `owned` that is no parameter of `module`.
    """
    parameters = dict(module.named_parameters())
    if unknown := set(owned) - set(parameters):
        raise KeyError(f"no parameters named {sorted(unknown)}; the module has {sorted(parameters)}")
    shared = {id(parameter): parameter for name, parameter in parameters.items() if name not in owned}
    clone = copy.deepcopy(module, dict(shared)).eval()
    for name, parameter in clone.named_parameters():
        if name in owned:
            parameter.requires_grad_(True)
    return clone
