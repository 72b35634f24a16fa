"""Several methods in one patch: `ScaleBias() + Subset(blocks=("layer4",))`.

    W' = (fine-tuned copy | W + strength δ | W) ⊙ mask + low-rank update,  then the task's norm,  then skips,  then the head

Each member trains what its own blueprint names, at its own learning rates. A tensor that two members would change in ways
that exclude each other, such as a mask over a fine-tuned weight, is refused. `FullFinetune() + DeltaNetwork()` puts Δ-modules
into a network that is trained as a whole (Δ-Networks, section 4, transfer learning and training from scratch).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.method import Batch, Batches, Head, Method, Optimizer, Trainable
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.model import PatchedModel


@dataclass(frozen=True, kw_only=True)
class Composite(Method):
    """The members in order; where two of them train the same tensor, the later one says how.

    Head and optimizer are the first member's, which must not contradict the others'.
    """

    methods: tuple[Method, ...]

    @classmethod
    def of(cls, *methods: Method) -> Composite:
        """A composite of these methods and of the members of composites among them. Raises `MethodError`."""
        members = [member for method in methods for member in getattr(method, "methods", (method,))]
        names = [member.name for member in members]
        if twice := {name for name in names if names.count(name) > 1}:
            raise MethodError(f"{' + '.join(names)} holds {sorted(twice)[0]} twice. Give its options to one of them.")
        if (whole := {"full-finetune", "paint"} & set(names)) and set(names) - {"full-finetune", "delta"}:
            raise MethodError(f"{' + '.join(names)}: {min(whole)} already trains everything. Leave the others out.")
        return cls(
            methods=tuple(members),
            lr=members[0].lr,
            head_lr=members[0].head_lr,
            weight_decay=members[0].weight_decay,
            optimizer=_agreed_optimizer(members),
            head=cast(Head, _agreed("head", members, set(get_args(Head)))),
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(member.name for member in self.methods)

    @property
    def paper(self) -> str:  # type: ignore[override]
        return "; ".join(dict.fromkeys(member.paper for member in self.methods))

    @property
    def learns_statistics(self) -> bool:
        return any(member.learns_statistics for member in self.methods)

    def hyperparameters(self) -> dict[str, Any]:
        """The members' hyperparameters by their names."""
        return {member.name: member.hyperparameters() for member in self.methods}

    def blueprint(self, backbone: Backbone) -> Blueprint:
        """Everything the members own and add. Raises `MethodError` for members that exclude each other."""
        _agreed("statistics", self.methods, {"recomputed", "learned"})
        prints = [member.blueprint(backbone) for member in self.methods]
        self._check_grafts(prints)
        self._check_weights(prints, backbone)
        grafts = tuple(graft for one in prints for graft in one.grafts)
        return Blueprint(owned=tuple(dict.fromkeys(name for one in prints for name in one.owned)), grafts=grafts)

    def _check_grafts(self, prints: Sequence[Blueprint]) -> None:
        for (first, one), (second, other) in itertools.combinations(zip(self.methods, prints, strict=True), 2):
            for a, b in itertools.product(one.grafts, other.grafts):
                if a.start < b.end and b.start < a.end:
                    raise MethodError(
                        f"{first.name} and {second.name} both add modules to segment {max(a.start, b.start)}, where each "
                        "expects the backbone's own. Name other blocks, or drop one of them."
                    )

    def _check_weights(self, prints: Sequence[Blueprint], backbone: Backbone) -> None:
        for member, (other, owned) in itertools.product(self.methods, zip(self.methods, prints, strict=True)):
            both = set(member.reweighted(backbone)) & set(owned.owned) if other is not member else ()
            if both:
                raise MethodError(
                    f"{member.name} and {other.name} exclude each other on {min(both)}: a weight is masked or trained, not "
                    "both. Name other blocks, or drop one of them."
                )

    def reweighted(self, backbone: Backbone) -> tuple[str, ...]:
        """All members'."""
        return tuple(name for member in self.methods for name in member.reweighted(backbone))

    def reweightings(self, backbone: Backbone) -> dict[str, Reweighting]:
        """All members', which share no weight (see `blueprint`)."""
        return {name: one for member in self.methods for name, one in member.reweightings(backbone).items()}

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        for member in self.methods:
            member.initialise(model, backbone)

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        """The head of the first member that has one of its own, else a linear one."""
        own = [member for member in self.methods if member.has_own_head]
        return own[0].make_head(backbone, classes) if own else super().make_head(backbone, classes)

    def check_decoder(self) -> None:
        for member in self.methods:
            member.check_decoder()

    def penalty(self, model: PatchedModel) -> Tensor | float:
        return sum(member.penalty(model) for member in self.methods)

    def added_loss(self, model: PatchedModel, batch: Batch) -> Tensor | float:
        return sum(member.added_loss(model, batch) for member in self.methods)

    def prepare(self, model: PatchedModel, batches: Batches) -> None:
        for member in self.methods:
            member.prepare(model, batches)

    def before_step(self, model: PatchedModel, step: int, total: int) -> None:
        for member in self.methods:
            member.before_step(model, step, total)

    def warn(self, reach: float) -> str | None:
        return "; ".join(text for member in self.methods if (text := member.warn(reach))) or None

    def parameter_groups(self, model: Trainable, backbone: Backbone) -> list[dict[str, Any]]:
        """Optimizer groups with every tensor at the rate and decay of the member that trains it."""
        trainers: dict[str, Method] = {}
        for member in self.methods:
            blueprint = member.blueprint(backbone)
            trainers |= {f"{kind}/{name}": member for name in blueprint.owned for kind in ("replace", "mask", "delta")}
            trainers |= {name: member for name, graft in model.origins.items() if graft in blueprint.grafts}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.trainable():
            trainer = trainers.get(name, self.methods[0])
            groups.setdefault((trainer.rate(name), trainer.decay(name, parameter)), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def _agreed(field: str, members: Sequence[Method], values: set[str]) -> str | None:
    """The one of `values` that the members which have the field set it to. Raises `MethodError` if they set several."""
    given = {getattr(member, field, None) for member in members} & values
    if len(given) > 1:
        names = " + ".join(member.name for member in members)
        raise MethodError(f"{names}: their {field} must agree, but are {' and '.join(sorted(map(str, given)))}.")
    return given.pop() if given else None


def _agreed_optimizer(members: Sequence[Method]) -> Optimizer:
    """Adam and AdamW make AdamW, which decays as both do where the decay is 0; others go with themselves only."""
    given = {member.optimizer for member in members}
    if len(given) == 1:
        return given.pop()
    if given & {"sgd", "rmsprop"}:
        names, kinds = " + ".join(member.name for member in members), " and ".join(sorted(given))
        raise MethodError(f"{names}: their optimizers must agree, but are {kinds}.")
    return "adamw"
