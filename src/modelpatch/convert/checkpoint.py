"""Read fine-tuned checkpoints as plain tensors, by the backbone's names.

Only tensors are unpickled: a `.pth` file is read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import widen
from modelpatch.errors import PatchError

HOLDERS = ("state_dict", "model_state_dict", "model")  # keys of the tensors in .pth files of training scripts
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # prefixes that wrappers add to names


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or `.pth` file by their names; half precision is widened to float32, exactly.

    Raises `PatchError` for a file that cannot be read, is no dictionary of tensors, or holds other objects than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise PatchError(f"{path} does not exist. Expected a safetensors file or a .pth of tensors.")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PatchError(
            f"{path} cannot be read as plain tensors: {reason}. Save the network's state_dict() alone, best as safetensors."
        ) from error
    for holder in HOLDERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(holder), Mapping):
            loaded = loaded[holder]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise PatchError(f"{path} holds no tensors by name. Expected a state_dict().")
    return {str(name): widen(value.detach()) for name, value in loaded.items() if isinstance(value, Tensor)}


def match_names(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by the backbone's names, without prefixes that wrappers add.

    Raises `PatchError` for missing tensors of the backbone's chain and for tensors that the network does not have.
    """
    own = backbone.module.state_dict().keys()
    while not own & tensors.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    needed = {name for segment in backbone.chain for name, t in segment.named_tensors() if t.is_floating_point()}
    needed &= own
    if missing := sorted(needed - tensors.keys()):
        raise PatchError(
            f"the checkpoint lacks {len(missing)} of the {len(needed)} tensors of {backbone.spec}: {', '.join(missing[:3])}. "
            f"It has {', '.join(sorted(tensors)[:3])}. Expected the state_dict() of the same architecture."
        )
    head = f"{backbone.classifier}." if backbone.classifier else None
    foreign = sorted(name for name in tensors.keys() - own if head is None or not name.startswith(head))
    if foreign:
        raise PatchError(
            f"{backbone.spec} does not have {len(foreign)} tensors of the checkpoint: {', '.join(foreign[:3])}. Expected "
            "the state_dict() of the same architecture."
        )
    return dict(tensors)
