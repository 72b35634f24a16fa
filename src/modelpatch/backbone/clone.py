"""Structural clones: a module's own Python structure over the frozen tensors of another.

clone.conv.weight            frozen: an object of its own over the backbone's bytes
clone.bn.weight              owned: a parameter of its own, started from the backbone's values
clone.bn.running_mean        buffers are always copied: a BatchNorm in train mode writes them
"""

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from modelpatch.errors import ModelpatchError

_ORIGINALS: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()


def clone_module(module: nn.Module, owned: Collection[str] = ()) -> nn.Module:
    """A clone of `module` in eval mode that owns the parameters named in `owned`, which require gradients, and shares others.

    It has its own flags and hooks; editing, casting or moving it leaves `module` as it is. State dicts are loaded by
    assignment only; copying, which would write `module`'s bytes, raises `ModelpatchError`.
    Raises KeyError for a name in `owned` that is no parameter of `module`.
    """
    parameters = dict(module.named_parameters())
    if unknown := set(owned) - set(parameters):
        raise KeyError(f"no parameters named {sorted(unknown)}; the module has {sorted(parameters)}")
    copies: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for name, parameter in parameters.items()
        if name not in owned
    }
    for child in module.modules():  # its dozen empty dicts are most of what there is to copy
        copies |= {id(one): type(one)() for one in vars(child).values() if type(one) in (dict, OrderedDict) and not one}
    clone = copy.deepcopy(module, copies).eval()
    for name in owned:
        clone.get_parameter(name).requires_grad_(True)
    for child in clone.modules():
        child.register_load_state_dict_pre_hook(_refuse_copying)
    _ORIGINALS[clone] = ref(original_of(module))
    return clone


def original_of(module: nn.Module) -> nn.Module:
    """The module that a clone, or a clone of a clone, was made of; any other module itself."""
    found = _ORIGINALS[module]() if module in _ORIGINALS else None
    return module if found is None else found


def _refuse_copying(module: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *rest: Any) -> None:
    if not metadata.get("assign_to_params_buffers", False):
        raise ModelpatchError("this module shares the backbone's bytes: load_state_dict needs assign=True.")
