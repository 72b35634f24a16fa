"""A checkpoint's tensors by a network's own names, whatever wrapped the network when it was saved.

    "module.encoder._orig_mod.layer1.0.conv1.weight"  ->  layer1.0.conv1.weight

A file may hold several networks (the weights and their average, a teacher and a student) beside tensors of others: the one
that has all of the network's tensors is found, averages are preferred, and what is left out is listed.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelpatch.backbone.states import State
from modelpatch.errors import CheckpointError, CheckpointWarning, warn_caller
from modelpatch.text import count_of, nearest

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
MODULE = re.compile(r"(?:^|(?<=\.))module\.")  # of DistributedDataParallel, and of averages
OPTIMIZER = re.compile(r"(^|\.)(optim\w*|\w*scheduler\w*|exp_avg\w*|momentum_buffer|grad\w*)(\.|$)")
PREFERRED, RATHER_NOT = {"ema", "teacher", "averaged", "swa"}, {"student", "momentum", "target", "k", "key"}
DERIVED = {"num_batches_tracked", "total_ops", "total_params", "relative_position_index", "attn_mask", "position_ids"}
LISTED = 8  # foreign tensors that a warning names
PART_OF_INPUT = re.compile("token|embed")
HEADS = {
    "head",
    "heads",
    "fc",
    "classifier",
    "linear",
    "cls",
    "logits",
    "last_linear",
    "probe",
    "out",
    "output",
    "score",
}


@dataclass(frozen=True)
class Match:
    """A network's tensors in a checkpoint, by its own names.

    `part` is the place they were found at, `others` are places that have all of them too, `head` is what lies below the
    network's classifier, by its own names below it, and `outside` what belongs to no part of the network; `foreign` lists
    the names that are left out.
    """

    tensors: State
    part: str
    others: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    head: State = field(default_factory=dict)
    outside: State = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """One place and prefix: what it has by the network's names, and the rest of its state."""

    place: str
    prefix: str
    own: State
    rest: State  # by names without the prefix
    outside: State
    missing: frozenset[str]
    misfits: int

    @property
    def part(self) -> str:
        return ".".join(filter(None, (self.place, self.prefix.rstrip("."))))

    @property
    def rank(self) -> tuple[int, int, int]:
        """Complete ones first, then those whose shapes fit, then averages."""
        words = set(re.split(r"[._/]", self.part.lower()))
        liking = 1 if words & PREFERRED else -1 if words & RATHER_NOT else 0
        return (-len(self.missing), -self.misfits, liking)


def match_states(
    states: Mapping[str, State],
    own: Mapping[str, torch.Size],
    needed: Collection[str],
    classifier: str | None,
    *,
    network: str,
    part: str | None = None,
) -> Match:
    """Find a network's tensors among a checkpoint's state dicts.

    `own` has the shape of every tensor of the network, `needed` names those that must be there; what lies below `classifier`
    may have any shape. `part` names a place where there are several, such as "model_ema" or "state_dict.student". Raises
    `CheckpointError` for missing tensors, for layers that the network does not have, and for several networks that differ.
    """
    found = [one for place, state in states.items() for one in _candidates(place, state, own, set(needed), classifier)]
    if part is not None:
        kept = [one for one in found if one.part == part or one.part.startswith(f"{part}.")]
        if not kept:
            listed = sorted({one.part for one in found if not one.missing})
            known = ", ".join(map(repr, listed[:5])) or "none"
            hint = nearest(part, listed)
            raise CheckpointError(
                f"the checkpoint has no tensors of {network} at {part!r}.{hint} It has them at: {known}."
            )
        found = kept
    found.sort(key=lambda one: one.rank, reverse=True)
    if not found or found[0].missing:
        raise CheckpointError(_lacking(found, states, set(needed), network))
    best = found[0]
    rivals = [one for one in found[1:] if one.rank[:2] == best.rank[:2] and not _equal(one, best, needed)]
    if even := [one.part for one in rivals if one.rank == best.rank]:
        parts = ", ".join(repr(name) for name in (best.part, *even))
        raise CheckpointError(
            f"the checkpoint holds {len(even) + 1} networks that {network} could be, at {parts}. Name one: part={best.part!r}."
        )
    below = f"{classifier}." if classifier else None
    head = {name.removeprefix(below): tensor for name, tensor in best.rest.items() if below and name.startswith(below)}
    rest = {name: tensor for name, tensor in best.rest.items() if not (below and name.startswith(below))}
    if layers := sorted(name for name in rest if _belongs(name, own, needed)):
        raise CheckpointError(
            f"{network} does not have {count_of(len(layers), 'tensor')} of the checkpoint, which lie among its own: "
            f"{', '.join(layers[:3])}. Expected the state_dict() of the same architecture."
        )
    told = tuple(one.prefix for one in rivals if one.place == best.place)  # whose tensors are told as a network
    foreign = sorted(name for name in {**rest, **best.outside} if not (told and name.startswith(told)))
    return Match(
        tensors=best.own,
        part=best.part,
        others=tuple(one.part for one in rivals),
        foreign=tuple(foreign),
        head=head,
        outside={**best.outside, **rest},
    )


def _candidates(
    place: str, state: State, own: Mapping[str, torch.Size], needed: set[str], classifier: str | None
) -> list[Placement]:
    """Every prefix under which a state has tensors by the network's names; none for the state of an optimizer."""
    if OPTIMIZER.search(place):
        return []
    state = _unwrap(state, own)
    counts: Counter[str] = Counter()
    for name in state:
        cut = 0
        while True:
            if name[cut:] in own:
                counts[name[:cut]] += 1
            cut = name.find(".", cut) + 1
            if not cut:
                break
    found = []
    for prefix, _ in counts.most_common(8):
        inside = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        mine = {name: tensor for name, tensor in inside.items() if name in own}
        below = f"{classifier}." if classifier else "\0"
        misfits = sum(one.shape != own[name] for name, one in mine.items() if not name.startswith(below))
        found.append(
            Placement(
                place=place,
                prefix=prefix,
                own=mine,
                rest={name: tensor for name, tensor in inside.items() if name not in own},
                outside={name: tensor for name, tensor in state.items() if not name.startswith(prefix)},
                missing=frozenset(needed - mine.keys()),
                misfits=misfits,
            )
        )
    return found


def _unwrap(state: State, own: Mapping[str, torch.Size]) -> State:
    """Names without those of wrappers that lie inside them; `module` stays where the network has one, or names would meet."""
    plain = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    plain = plain if len(plain) == len(state) else state
    if any(MODULE.search(name) for name in own):
        return plain
    bare = {MODULE.sub("", name): tensor for name, tensor in plain.items()}
    return bare if len(bare) == len(plain) else plain


def _belongs(name: str, own: Mapping[str, torch.Size], needed: Collection[str]) -> bool:
    """True for a tensor that computes something inside the network, which it would compute without."""
    first, _, last = name.partition(".")[0], *name.rpartition(".")[1:]
    if last in DERIVED or "mask_token" in name:
        return False
    tops = {one.partition(".")[0] for one in needed if "." in one}
    if "." in name:
        return first in tops or (first.isdigit() and any(top.isdigit() for top in tops))
    return PART_OF_INPUT.search(name) is not None


def _equal(first: Placement, second: Placement, needed: Collection[str]) -> bool:
    return all(torch.equal(first.own[name], second.own[name]) for name in needed)


def _lacking(found: list[Placement], states: Mapping[str, State], needed: set[str], network: str) -> str:
    """The message for a checkpoint without some of a network's tensors."""
    if not found:
        names = sorted(name for state in states.values() for name in state)
        missing, where = needed, ""
    else:
        names, missing = sorted({**found[0].own, **found[0].rest}), set(found[0].missing)
        where = f" at {found[0].part!r}" if found[0].part else ""
    return (
        f"the checkpoint lacks {len(missing)} of the {len(needed)} tensors of {network}: {', '.join(sorted(missing)[:3])}. It "
        f"has{where} {', '.join(names[:3])}. Expected the state_dict() of the same architecture."
    )


def tell_rest(match: Match, network: str, source: str) -> None:
    """Warn of what a checkpoint holds beside the tensors that are read."""
    if match.others:
        listed = ", ".join(map(repr, match.others[:3]))
        warn_caller(f"{source} holds several networks: {match.part!r} is read, not {listed}.", CheckpointWarning)
    foreign = [name for name in match.foreign if name.rpartition(".")[2] not in DERIVED]
    if foreign:
        more = f" and {len(foreign) - LISTED} more" if len(foreign) > LISTED else ""
        listed = ", ".join(foreign[:LISTED])
        warn_caller(f"left out of {source}, as {network} does not have them: {listed}{more}.", CheckpointWarning)


# heads ------------------------------------------------------------------------------------------------------------


def find_head(match: Match, classifier: str | None, features: int, head: str | None = None) -> dict[str, Tensor]:
    """Weight (K, D) and, where it has one, bias (K,) of the linear layer that a fine-tuned network ends with.

    It is the classifier itself, or the one linear layer below it (`fc.1` of `Sequential(Dropout, Linear)`), or else the one
    of D = `features` inputs outside the network whose name is that of a head. `head` names it where there are several.
    Raises `CheckpointError` for none, for several, and for heads of more than one layer.
    """
    if head is not None:
        named = {**match.tensors, **{f"{classifier}.{name}": one for name, one in match.head.items()}, **match.outside}
        layers = {name: one for name, one in _layers(named).items() if name == head or name.endswith(f".{head}")}
        if len(layers) != 1:
            raise CheckpointError(
                f"the checkpoint has {count_of(len(layers), 'layer')} {head!r}; expected one. Name the layer of the head."
            )
        return _linear(next(iter(layers)), next(iter(layers.values())), features)
    own = {name: one for name, one in match.tensors.items() if classifier and name.startswith(f"{classifier}.")}
    below = {f"{classifier}.{name}": one for name, one in match.head.items()}
    if layers := _layers({**own, **below}):
        if len(layers) > 1:
            raise CheckpointError(
                f"the checkpoint's classifier {classifier} has {len(layers)} layers with weights: "
                f"{', '.join(sorted(layers)[:4])}. A patch's head is one linear layer: train it again with fit."
            )
        return _linear(next(iter(layers)), next(iter(layers.values())), features)
    words = {name: one for name, one in _layers(match.outside).items() if HEADS & set(name.split("."))}
    fitting = {name: one for name, one in words.items() if _is_linear(one, features)}
    if len(fitting) == 1:
        return _linear(next(iter(fitting)), next(iter(fitting.values())), features)
    if fitting:
        raise CheckpointError(
            f"the checkpoint has {len(fitting)} layers that could be its head: {', '.join(sorted(fitting)[:4])}. "
            f"Name one: head={min(fitting)!r}."
        )
    raise CheckpointError(
        f"the checkpoint has no classifier {classifier or '(the backbone names none)'}. Load the backbone with "
        "classifier=... naming the linear layer that ends it."
    )


def _layers(tensors: State) -> dict[str, dict[str, Tensor]]:
    """Tensors by the module that holds them, where it has a weight."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        layers.setdefault(owner, {})[leaf] = tensor
    return {owner: held for owner, held in layers.items() if "weight" in held}


def _is_linear(layer: dict[str, Tensor], features: int) -> bool:
    weight = layer["weight"]
    return weight.ndim >= 2 and weight.shape[1] == features and weight.numel() == len(weight) * features


def _linear(name: str, layer: dict[str, Tensor], features: int) -> dict[str, Tensor]:
    weight = layer["weight"]
    if not _is_linear(layer, features) or len(weight) == 0 or layer.keys() - {"weight", "bias"}:
        shape = tuple(weight.shape)
        raise CheckpointError(
            f"the checkpoint's classifier has a weight of shape {shape} ({name}); expected (classes, {features})."
        )
    bias = layer.get("bias")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise CheckpointError(f"the bias of {name} has shape {tuple(bias.shape)}; expected ({len(weight)},).")
    return {"weight": weight.flatten(1), **({} if bias is None else {"bias": bias})}
