"""Method: a dataclass of hyperparameters that says what a patch owns and how it is trained.

Only `changes` must be written. A new method is one file: a dataclass decorated with `register_method`, in this folder or in
another distribution that lists it as an entry point of the group `modelpatch.methods` (docs/own-method.md).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, dataclass_transform, get_type_hints

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import AddedModulesError, MethodError, MethodNotApplicableError
from modelpatch.heads.base import Decoder
from modelpatch.heads.linear import LinearHead, SiameseHead
from modelpatch.methods.blocks import find_segments
from modelpatch.methods.hooks import Batch as Batch
from modelpatch.methods.hooks import Hook
from modelpatch.patch.blueprint import Blueprint, Graft
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.model import PatchedModel
from modelpatch.registry import Registry
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord

Head = Literal["trained", "random", "siamese"]
Optimizer = Literal["adamw", "adam", "sgd", "rmsprop"]
OPTIMIZERS: dict[Optimizer, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adam": (torch.optim.Adam, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.9, "eps": 1.0}),  # TF-slim's for MobileNets
}


class Trainable(Protocol):
    """Anything with trainable parameters, such as a `PatchedModel`."""

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their names in a patch file."""

    @property
    def origins(self) -> Mapping[str, Graft]:
        """By name, the graft that added a tensor."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyperparameters common to all methods.

    `lr` is the patch's learning rate and `head_lr` the head's. `head="random"` leaves the head as it was initialised;
    `head="siamese"` trains one that reads the base's features beside the patch's (SubTuning, section 4.1). `blocks` names the
    segments outside of which nothing changes (as in `Subset`), by default none. Weight decay is never applied to vectors (norm
    parameters, biases). `a + b` combines methods in one patch.

    Class attributes tell other parts of the library what they need to know: `trains_everything`, so that other methods have
    nothing to add but what `rewires` the network; `stands_alone` for a method that cannot be combined; `trains_head_alone`;
    `shares_across_tasks` where it trains weights as they are, which several tasks can share; `names_blocks` where `blocks` has
    a meaning of the method's own; `compared` and `searched`, the spellings that `compare` and `search` try by default, sorted
    by `order`, from small patches to large.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    order: ClassVar[int] = 50
    compared: ClassVar[Sequence[str]] = ()
    searched: ClassVar[Sequence[str]] = ()
    trains_everything: ClassVar[bool] = False
    trains_head_alone: ClassVar[bool] = False
    shares_across_tasks: ClassVar[bool] = False
    stands_alone: ClassVar[bool] = False
    rewires: ClassVar[bool] = False
    names_blocks: ClassVar[bool] = False

    lr: PositiveFloat = 1e-3
    head_lr: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Optimizer = "adamw"
    head: Head = "trained"
    blocks: tuple[str, ...] = ()
    losses: tuple[Hook, ...] = field(default=(), repr=False, metadata={"internal": True})  # added by `with_loss`

    def __post_init__(self) -> None:
        """Check and convert every hyperparameter; strings may stand for the values they spell. Raises `MethodError`."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(one.default, tuple) and isinstance(value, str):
                value = tuple(part.strip() for part in value.split(","))
            try:
                object.__setattr__(self, one.name, _adapters(type(self))[one.name].validate_python(value))
            except ValidationError as error:
                input, message = error.errors()[0]["input"], error.errors()[0]["msg"]
                raise MethodError(f"{self.name}: {one.name} = {input!r} is not valid: {message}.") from error

    @abstractmethod
    def changes(self, backbone: Backbone) -> Blueprint:
        """Everything that a patch of this method owns and adds. Raises `MethodNotApplicableError` where there is nothing."""

    def reweightings(self, backbone: Backbone) -> Mapping[str, Callable[[], Reweighting]]:
        """Builders of the modules that make owned weights from the frozen ones, by the backbone's names of the weights."""
        return {}

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        """A fresh head for `classes` outputs."""
        if self.head == "siamese":
            return SiameseHead(2 * backbone.chain.feature_dim, classes)
        return LinearHead(backbone.chain.feature_dim, classes)

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        """Set the values to start from, if not those as built."""
        return

    def hooks(self) -> tuple[Hook, ...]:
        """Work of the method while a model is trained."""
        return ()

    def rate(self, name: str) -> float:
        """The learning rate of a tensor by its name in the patch file."""
        return self.head_lr if name.startswith("head.") else self.lr

    def warn(self, reach: float) -> str | None:
        """A warning before a run whose steps' learning rates add up to `reach` times the full ones, None without any."""
        return None

    def sizes(self, backbone: Backbone) -> Sequence[tuple[str, "Method"]]:
        """The method at each of its sizes with a label, for a search; empty where blocks decide the size."""
        return ()

    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter as plain values."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "losses"}
        if not (self.names_blocks or self.blocks):
            del values["blocks"]
        return values | ({"loss": self.losses[0].describe()} if self.losses else {})

    @property
    def members(self) -> tuple["Method", ...]:
        """The methods that are combined in this one; itself alone if none are."""
        return (self,)

    @property
    def solves_head(self) -> bool:
        """True where a linear head over frozen features is solved to convergence and not trained by steps."""
        return False

    @property
    def has_own_head(self) -> bool:
        """True for a method that makes another head than a linear or siamese one."""
        return type(self).make_head is not Method.make_head

    def blueprint(self, backbone: Backbone) -> Blueprint:
        """Tensors that a patch owns and modules that it adds in the blocks. Raises `MethodNotApplicableError` without any."""
        whole = self.changes(backbone)
        if self.names_blocks or not self.blocks:
            return whole
        chain = backbone.chain
        chosen = {segment.index for segment in find_segments(backbone, self.blocks)}
        blocks = {block.index for block in chain.blocks}

        def inside(graft: Graft) -> bool:
            span = set(range(graft.start, graft.end))
            return bool(span & chosen) and span & blocks <= chosen

        owned = tuple(name for name in whole.owned if chain.segment_of(name).index in chosen)
        grafts = tuple(filter(inside, whole.grafts))
        if not (owned or grafts):
            raise MethodNotApplicableError(f"{self.name} has nothing to change in {', '.join(self.blocks)}.")
        return Blueprint(owned=owned, grafts=grafts)

    def build(self, backbone: Backbone, task: Any, decoder: Decoder | None = None) -> PatchedModel:
        """A model to train on a task: a `Task`, a `TaskRecord`, the names of its classes, or their number.

        Its head is a `decoder`, that of the task's kind, or a fresh one for classes of whole images. Raises `MethodError`.

            >>> model = ScaleBias().build(backbone, ["cat", "dog"])
            >>> optimizer = torch.optim.AdamW(parameter for _, parameter in model.trainable())
        """
        record = getattr(task, "task", task)
        classes = getattr(record, "classes", record)
        if isinstance(classes, str) or not isinstance(classes, int | Sequence):
            raise MethodError(f"cannot build a model for {task!r}; expected a task, names of classes or their number.")
        count = classes if isinstance(classes, int) else len(classes)
        if decoder is None and isinstance(record, TaskRecord):
            decoder = kind_of(record.kind).make_head(backbone, count, backbone.preprocessing.image_size)
        if decoder is None:
            head = self.make_head(backbone, count)
            if self.head == "siamese" and not any(read.of == "base" for read in getattr(head, "reads", ())):
                raise MethodError(f"{self.name} brings a head of its own, which cannot be siamese. Set head='trained'.")
            return self._assemble(backbone, head)
        if self.head == "siamese":
            raise MethodError(f"{self.name}: a siamese head reads features of whole images. Set head='trained'.")
        if self.has_own_head:
            raise MethodError(f"{self.name} makes a head of its own, which answers for whole images alone.")
        if hooks := [*self.losses, *(hook for hook in self.hooks() if hook.whole_images)]:
            name = hooks[0].describe()["kind"]
            raise MethodError(f"{name} is a loss of classes of whole images. Train {self.name} without it.")
        return self._assemble(backbone, decoder)

    draft = build  # for a number of classes

    def _assemble(self, backbone: Backbone, head: nn.Module) -> PatchedModel:
        if self.head == "random":
            head.requires_grad_(False)
        blueprint = self.blueprint(backbone)
        if self.head == "siamese" and not (blueprint.owned or blueprint.grafts):
            raise MethodError(f"{self.name} changes no features: a siamese head would read the base's twice.")
        made = {name: make() for name, make in self.reweightings(backbone).items() if name in blueprint.owned}
        try:
            model = PatchedModel.draft(backbone, blueprint, head, made)
            model.try_grafts()
        except AddedModulesError as error:
            raise MethodNotApplicableError(
                f"{self.name}: {backbone.spec} has blocks that it cannot change: {error} Name others with `blocks`."
            ) from error
        model.learned_statistics = any(getattr(one, "statistics", None) == "learned" for one in self.members)
        self.initialise(model, backbone)
        return model

    def all_hooks(self) -> tuple[Hook, ...]:
        """The method's hooks and the losses that `with_loss` added."""
        return (*self.hooks(), *self.losses)

    def count_parameters(self, on: Backbone | PatchedModel) -> int:
        """Trainable parameters without the head, of a model that this method built or would build on a backbone."""
        if isinstance(on, PatchedModel):
            model = on
        else:
            model = replace(self, head="trained")._assemble(on, LinearHead(on.chain.feature_dim, 1))
        counted = sum(p.numel() for name, p in model.trainable() if not name.startswith("head."))
        return counted - sum(model.get_submodule(path).idle for path in model.reweighted.values())  # type: ignore[misc]

    def parameter_groups(self, model: Trainable, backbone: Backbone) -> list[dict[str, Any]]:
        """Optimizer groups: one for every learning rate and weight decay."""
        trainers = self.trainers(model, backbone)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.trainable():
            method = trainers.get(name, self)
            decay = method.weight_decay if parameter.ndim > 1 and not name.startswith("mask/") else 0.0
            groups.setdefault((method.rate(name), decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def trainers(self, model: Trainable, backbone: Backbone) -> Mapping[str, "Method"]:
        """The member that trains a tensor, by its name in the patch file, where it is not the method itself."""
        return {}

    def make_optimizer(self, model: Trainable, backbone: Backbone) -> torch.optim.Optimizer:
        """The method's optimizer over its parameter groups. Raises `MethodError` if there is nothing to train."""
        groups = self.parameter_groups(model, backbone)
        if not groups:
            raise MethodError(f"{self.name} trains nothing with head={self.head!r}. Set head='trained'.")
        kind, options = OPTIMIZERS[self.optimizer]
        return kind(groups, lr=self.lr, **options)

    def __add__(self, other: "Method") -> "Method":
        """Both methods in one patch. Raises `MethodError` for methods that exclude each other."""
        if not isinstance(other, Method):
            return NotImplemented
        return Composite.of(self, other)


@dataclass(frozen=True, kw_only=True)
class Composite(Method):
    """Several methods in one patch; where two of them train the same tensor, the later one says how.

        W' = (fine-tuned copy | W + strength δ | W) ⊙ mask + low-rank update, then the task's norm, then skips, then the head

    Each member trains what its own blueprint names, at its own learning rates. Changes of a tensor that exclude each other,
    such as a mask over a fine-tuned weight, are refused.
    """

    methods: tuple[Method, ...]

    @classmethod
    def of(cls, *methods: Method) -> Self:
        """A composite of these methods and of the members of composites among them. Raises `MethodError`."""
        members = [replace(member, losses=()) for method in methods for member in method.members]
        names = [member.name for member in members]
        if twice := {name for name in names if names.count(name) > 1}:
            raise MethodError(f"{' + '.join(names)} holds {sorted(twice)[0]} twice. Give its options to one of them.")
        for whole in (member for member in members if member.trains_everything):
            if any(whole.stands_alone or not (one is whole or one.rewires) for one in members):
                raise MethodError(f"{' + '.join(names)}: {whole.name} already trains everything. Leave the others out.")
        return cls(
            methods=tuple(members),
            losses=tuple(loss for method in methods for loss in method.losses),
            lr=members[0].lr,
            head_lr=members[0].head_lr,
            weight_decay=members[0].weight_decay,
            optimizer=_agreed("optimizer", members, "optimizers"),
            head=_agreed("head", members),
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(member.name for member in self.methods)

    @property
    def members(self) -> tuple[Method, ...]:
        return self.methods

    @property
    def has_own_head(self) -> bool:
        return any(member.has_own_head for member in self.methods)

    def hyperparameters(self) -> dict[str, Any]:
        """The members' hyperparameters by their names."""
        added = {"loss": self.losses[0].describe()} if self.losses else {}
        return {member.name: member.hyperparameters() for member in self.methods} | added

    def changes(self, backbone: Backbone) -> Blueprint:
        """Everything the members own and add. Raises `MethodError` for members that exclude each other."""
        _agreed("statistics", self.methods)
        pairs = [(member, member.blueprint(backbone)) for member in self.methods]
        for (first, one), (second, other) in itertools.combinations(pairs, 2):
            for a, b in itertools.product(one.grafts, other.grafts):
                if a.start < b.end and b.start < a.end:
                    raise MethodError(
                        f"{first.name} and {second.name} both add modules to segment {max(a.start, b.start)}, where each "
                        "expects the backbone's own. Name other blocks, or drop one of them."
                    )
        for (first, one), (second, other) in itertools.permutations(pairs, 2):
            if both := first.reweightings(backbone).keys() & set(one.owned) & set(other.owned):
                raise MethodError(
                    f"{first.name} and {second.name} exclude each other on {min(both)}: a weight is masked or trained, not "
                    "both. Name other blocks, or drop one of them."
                )
        owned = dict.fromkeys(name for _, one in pairs for name in one.owned)
        return Blueprint(owned=tuple(owned), grafts=tuple(graft for _, one in pairs for graft in one.grafts))

    def reweightings(self, backbone: Backbone) -> Mapping[str, Callable[[], Reweighting]]:
        """All members', which share no weight (see `changes`)."""
        made: dict[str, Callable[[], Reweighting]] = {}
        for member in self.methods:
            owned = set(member.blueprint(backbone).owned)
            made |= {name: make for name, make in member.reweightings(backbone).items() if name in owned}
        return made

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        for member in self.methods:
            member.initialise(model, backbone)

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        """The head of the first member that has one of its own, else a linear one."""
        own = [member for member in self.methods if member.has_own_head]
        return own[0].make_head(backbone, classes) if own else super().make_head(backbone, classes)

    def hooks(self) -> tuple[Hook, ...]:
        return tuple(hook for member in self.methods for hook in member.hooks())

    def warn(self, reach: float) -> str | None:
        return "; ".join(text for member in self.methods if (text := member.warn(reach))) or None

    def trainers(self, model: Trainable, backbone: Backbone) -> Mapping[str, Method]:
        found: dict[str, Method] = {}
        for member in self.methods:
            blueprint = member.blueprint(backbone)
            found |= {f"{kind}/{name}": member for name in blueprint.owned for kind in ("replace", "mask", "delta")}
            found |= {name: member for name, graft in model.origins.items() if graft in blueprint.grafts}
        return found


def _agreed(field: str, members: Sequence[Method], fields: str = "") -> Any:
    """The one value of a field that some members have, for statistics besides `frozen`. Raises `MethodError` for several.

    Adam and AdamW make AdamW, which decays as both do where the decay is 0.
    """
    given = {getattr(member, field) for member in members if hasattr(member, field)} - {"frozen"}
    if given == {"adam", "adamw"}:
        return "adamw"
    if len(given) > 1:
        names, values = " + ".join(member.name for member in members), " and ".join(sorted(given))
        raise MethodError(f"{names}: their {fields or field} must agree, but are {values}.")
    return given.pop() if given else None


METHODS = Registry[type[Method]]("method", "modelpatch.methods", error=MethodError)
M = TypeVar("M", bound=type[Method])


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def register_method(method: M) -> M:
    """Register a method under its name; a class that is no dataclass yet becomes a frozen one, with keywords only."""
    if "__dataclass_params__" not in vars(method):
        dataclass(frozen=True, kw_only=True)(method)
    return METHODS.register(method.name)(method)


def confine(method: Method, blocks: Sequence[str]) -> Method:
    """The method with only the named segments to change; of a `Composite` the members that name blocks, else all."""
    if len(method.members) == 1:
        return replace(method, blocks=tuple(blocks))
    some = any(member.names_blocks for member in method.members)
    members = [confine(one, blocks) if one.names_blocks or not some else one for one in method.members]
    return replace(method, methods=tuple(members))  # type: ignore[call-arg]


def with_loss(method: Method, keeper: Hook) -> Method:
    """The method with another loss added to its own: `with_loss(FullFinetune() + DeltaNetwork(), L2(0.001))`.

    A keeper serves one fit at a time. It holds what it has seen so far, which no checkpoint has: such a fit cannot be resumed.
    """
    return replace(method, losses=(*method.losses, keeper))


@cache
def _adapters(kind: type[Method]) -> dict[str, TypeAdapter[Any]]:
    """A validator for each hyperparameter of a class, by its name."""
    hints = get_type_hints(kind, include_extras=True)
    loose = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    return {one.name: TypeAdapter(hints[one.name], config=loose) for one in fields(kind)}
