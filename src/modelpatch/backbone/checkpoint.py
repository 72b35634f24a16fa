"""Load a checkpoint as the weights of a backbone: the trunk must be there, the classifier may have other outputs or none."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from modelpatch.backbone.files import check_finite
from modelpatch.backbone.matching import DERIVED, Match, find_head, match_states, tell_rest
from modelpatch.backbone.states import read_states
from modelpatch.errors import CheckpointError, CheckpointWarning, warn_caller


def load_checkpoint(module: nn.Module, path: Path, classifier: str | None, resizes: bool = True) -> int | None:
    """Load a checkpoint into a network of its architecture, whose classifier may be missing, or `resizes` to its outputs.

    Returns the new number of outputs, None for the network's own. Foreign tensors, other networks in the checkpoint and a
    missing classifier are told in a warning. Raises `CheckpointError` for missing tensors, for other shapes, and for NaN or
    infinity.
    """
    kind, own = type(module).__name__, module.state_dict()
    below = f"{classifier}." if classifier else None
    trunk = {name for name in own if not (below and name.startswith(below)) and name.rpartition(".")[2] not in DERIVED}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    try:
        match = match_states(read_states(path), shapes, trunk, classifier, network=kind)
        head = _head(module, classifier, match)
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if str(path) in message else f"{path}: {message}") from error
    tensors = {
        name: tensor for name, tensor in match.tensors.items() if not (head and below and name.startswith(below))
    }
    outputs = _resize(module, classifier, head["weight"]) if classifier and head and resizes else None
    tensors |= {f"{classifier}.{leaf}": tensor for leaf, tensor in head.items()}
    own = module.state_dict()
    _check_shapes(tensors, own, kind, path)
    tell_rest(match, kind, str(path))
    if below and not any(name.startswith(below) for name in tensors):
        warn_caller(
            f"{path} has no classifier {classifier!r}: it stays random, and with it the base's own answers.",
            CheckpointWarning,
        )
    module.load_state_dict(tensors, strict=False)
    check_finite(module, str(path))
    return outputs


def _head(module: nn.Module, classifier: str | None, match: Match) -> dict[str, Tensor]:
    """The checkpoint's linear classifier; empty where the network's is another layer, or the checkpoint has none."""
    layer = module.get_submodule(classifier) if classifier else None
    has = match.head or any(name.startswith(f"{classifier}.") for name in match.tensors)
    return find_head(match, classifier, layer.in_features) if isinstance(layer, nn.Linear) and has else {}


def _resize(module: nn.Module, classifier: str, weight: Tensor) -> int | None:
    """Give the classifier the outputs of the checkpoint's. Returns their number if it is another."""
    layer = module.get_submodule(classifier)
    if not isinstance(layer, nn.Linear) or len(weight) == layer.out_features:
        return None
    parent, _, leaf = classifier.rpartition(".")
    fresh = nn.Linear(layer.in_features, len(weight), layer.bias is not None)
    setattr(module.get_submodule(parent), leaf, fresh)
    if hasattr(module, "num_classes"):
        vars(module)["num_classes"] = len(weight)
    return len(weight)


def _check_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], kind: str, path: Path) -> None:
    wrong = sorted(name for name, tensor in tensors.items() if name in own and tensor.shape != own[name].shape)
    if wrong:
        shapes = (f"{name} is {tuple(tensors[name].shape)} and not {tuple(own[name].shape)}" for name in wrong[:3])
        raise CheckpointError(
            f"{len(wrong)} tensors of {path} do not fit {kind}: {', '.join(shapes)}. Give the arguments that the network was "
            "built with."
        )
