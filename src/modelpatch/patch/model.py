"""A patch on its backbone as a plain `nn.Module`; `engine/resident.py` has the light form for patches by the hundred."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain, Segment
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.strided import lay_strided
from modelpatch.errors import AddedModulesError, ForeignTensorError, PatchError
from modelpatch.heads.base import Head, HeadRecord
from modelpatch.heads.reading import ChainPart, HeadInput, Read, Reading, run_chain
from modelpatch.patch.blueprint import Blueprint, Graft, Span
from modelpatch.patch.changes import Reweighting, resolve, set_strength
from modelpatch.patch.contents import Patch, PatchTask

Reweightings = Mapping[str, Reweighting]  # by the backbone's names of the weights


class PatchedModel(nn.Module):
    """Images (B, C, H, W) to the task's answer: the chain with its spans replaced by variants, then the head.

    All parameters but the patch's own lie in the backbone's bytes; no buffer is shared. Built from a patch, it is in
    eval mode and nothing requires gradients. Moving or casting it does not touch the backbone.

    `learned_statistics` says that the running statistics of BatchNorm layers which the patch owns are learned in train mode.
    `gradient_checkpointing` computes activations anew in the backward pass instead of keeping them.

        >>> model = method.build(backbone, 10)
        >>> optimizer = torch.optim.AdamW(parameter for _, parameter in model.trainable())
        >>> model.train()               # frozen normalisation stays in eval mode
        >>> ...                         # any loop
        >>> patch = model.eval().to_patch(task)
    """

    learned_statistics = False
    gradient_checkpointing = False
    _open: frozenset[str] = frozenset()  # weights of the backbone that are trained on purpose, for several tasks

    def __init__(self, backbone: Backbone, patch: Patch) -> None:
        super().__init__()
        patch.check_backbone(backbone)
        self.preprocessing, self._strength = patch.preprocessing, patch.strength
        check_added(backbone, patch)
        self._build(backbone, patch.blueprint, patch.head.build(), {})
        check_head(backbone.chain, patch)
        _fill(self.portable_state(), resolve(patch.tensors, backbone.chain, patch.strength))
        set_strength(self, patch.strength)
        self.eval().requires_grad_(False).to(backbone.device)
        self.try_grafts()

    @classmethod
    def draft(
        cls,
        backbone: Backbone,
        blueprint: Blueprint,
        head: nn.Module,
        reweightings: Reweightings | None = None,
        *,
        variants_only: bool = False,
    ) -> Self:
        """A model to be trained: owned parameters and the head require gradients, owned values start at the base's.

        `reweightings` say, by the backbone's names, which owned weights are not replaced but made from the frozen one.
        `variants_only` leaves out the segments between the spans: such a model only tells what its variants are.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.preprocessing, model._strength = backbone.preprocessing, 1.0
        model._build(backbone, blueprint, head, reweightings or {}, variants_only)
        return model.eval()

    def _build(
        self,
        backbone: Backbone,
        blueprint: Blueprint,
        head: nn.Module,
        reweightings: Reweightings,
        variants_only: bool = False,
    ) -> None:
        chain = backbone.chain
        self.backbone, self.blueprint = backbone, blueprint
        self.spans = blueprint.spans(chain)
        self.starts: list[int] = []
        self.parts = nn.ModuleList()
        self.head, self.reading = head, Reading(chain, getattr(head, "reads", (Read(),)), self.spans)
        self.twins = nn.ModuleDict()  # the base's own segments beside the variants, by part, for heads that read both
        self.names: dict[str, str] = {}  # what a tensor is called in the patch file -> what it is called here
        self.origins: dict[str, Graft] = {}  # an added tensor -> the graft that added it
        self.reweighted: dict[str, str] = {}  # a weight of the backbone -> what its reweighting is called here
        self.trained_modules: list[nn.Module] = []  # the modules that train() puts into train mode, besides the head
        ends = dict(self.spans)
        index = 0
        while index < len(chain):
            end = ends.get(index, index + 1)
            owned = frozenset(blueprint.owned) - reweightings.keys() if index in ends else frozenset[str]()
            self.starts.append(index)
            left_out = variants_only and index not in ends
            part = nn.Identity() if left_out else self._variant(chain[index:end], owned, reweightings, (index, end))
            self.parts.append(part)
            if self.reading.both and index in ends and not variants_only:
                clones = [clone_module(segment.module) for segment in chain[index:end]]
                self.twins[str(len(self.parts) - 1)] = nn.Sequential(*clones)
            index = end
        self.names |= {f"head.{name}": f"head.{name}" for name in head.state_dict()}
        self._open = frozenset(self._unfrozen())

    @torch.no_grad()
    def try_grafts(self) -> None:
        """Run every span with added modules once, on zeros. Raises `AddedModulesError` for a failure or another shape."""
        for (start, end), variant in zip(self.spans, self.variants, strict=True):
            if not any(start <= graft.start < end for graft in self.blueprint.grafts):
                continue
            given, expected = self.backbone.chain[start].input_shape, self.backbone.chain[end - 1].output_shape
            with torch.random.fork_rng(devices=[]):  # skips of random weights draw from it
                added = f"the modules that the patch adds to segments [{start}, {end})"
                try:
                    shape = tuple(variant(torch.zeros(1, *given, device=self.backbone.device)).shape[1:])
                except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
                    raise AddedModulesError(f"{added} do not fit: {error}") from error
            if shape != tuple(expected):
                raise AddedModulesError(f"{added} answer in shape {shape}; expected {expected}.")

    def _variant(
        self, segments: tuple[Segment, ...], owned: frozenset[str], reweightings: Reweightings, span: Span
    ) -> nn.Module:
        """A structural clone of the segments with the span's grafts; records what its own tensors are called."""
        clones, names, reweighted = [], {}, {}
        for segment in segments:
            local = {base: name for name, base in segment.tensor_names.items()}
            parameters = dict(segment.module.named_parameters())
            mine = {local[base]: base for base in local.keys() & owned}
            clone = clone_module(segment.module, mine.keys() & parameters.keys())
            tensors = {**dict(clone.named_parameters()), **dict(clone.named_buffers())}
            names.update({id(tensors[name]): f"replace/{base}" for name, base in mine.items()})
            for base in local.keys() & reweightings.keys():
                owner, _, leaf = local[base].rpartition(".")
                parametrize.register_parametrization(clone.get_submodule(owner), leaf, reweightings[base], unsafe=True)
                reweighted[id(reweightings[base])] = base
            clones.append(clone)
        variant = clones[0] if len(clones) == 1 else nn.Sequential(*clones)
        frozen = {one for one in variant.modules() if not (names or reweighted) or isinstance(one, _BatchNorm)}
        before = (*variant.parameters(), *variant.buffers())  # held, since ids are given again to what is freed
        grafted: dict[int, Graft | None] = dict.fromkeys(map(id, before))
        for graft in self.blueprint.grafts:
            if span[0] <= graft.start and graft.end <= span[1]:
                variant = graft.apply(variant)
                for tensor in (*variant.parameters(), *variant.buffers()):
                    grafted.setdefault(id(tensor), graft)
        if span in self.spans:
            lay_strided(variant)
            self.trained_modules += [module for module in variant.modules() if module not in frozen]
        place = f"parts.{len(self.parts)}."
        for name, tensor in (*variant.named_parameters(), *variant.named_buffers()):
            if (origin := grafted[id(tensor)]) is not None:
                names[id(tensor)] = f"graft/{span[0]}-{span[1]}/{name}"
                self.origins[names[id(tensor)]] = origin
            if id(tensor) in names:
                self.names[names[id(tensor)]] = place + name
        for name, module in variant.named_modules():
            if id(module) in reweighted:
                self.reweighted[reweighted[id(module)]] = place + name
        return variant

    def forward(self, images: Tensor) -> Tensor:
        return self.run_from(images, 0)

    def train(self, mode: bool = True) -> Self:
        """Put what the patch trains into train mode and everything frozen into eval mode; with `mode=False` everything.

        The patch trains its head, all of the spans of which it owns tensors, and the modules it adds to others. BatchNorm
        layers with the backbone's running statistics stay in eval mode: no patch stores them.
        """
        super().train(False)
        self.training = mode
        if mode:
            self.head.train()
            for module in (*self.trained_modules, *(self.owned_norms() if self.learned_statistics else ())):
                module.training = True
        return self

    def owned_norms(self) -> list[_BatchNorm]:
        """The BatchNorm layers whose running statistics belong to the patch."""
        own = {tensor.data_ptr() for tensor in self.state().values()}
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        return [norm for norm in norms if norm.running_mean is not None and norm.running_mean.data_ptr() in own]

    def to_patch(
        self,
        task: PatchTask,
        *,
        preprocessing: Preprocessing | None = None,
        method: Any = None,
        metrics: Mapping[str, Any] | None = None,
        created: Mapping[str, Any] | None = None,
    ) -> Patch:
        """The patch that the model has become, of strength 1, with copies of its tensors on the CPU.

        `task` is a `Task`, a `TaskRecord` or a name with the names of the classes; `preprocessing` the model's by default;
        `method` the one that made the model, or a name; `metrics` are measured figures and `created` facts of the run. Raises
        `PatchError` for a model that no patch file could hold.
        """
        if self._strength != 1 and self.blueprint.grafts:
            raise PatchError(f"the model has added modules at strength {self._strength}. Bind the patch at strength 1.")
        record = getattr(self.head, "record", None)
        if not isinstance(record, HeadRecord):
            raise PatchError(f"the model's head, a {type(self.head).__name__}, has no record to store it under.")
        if unfrozen := self._unfrozen():
            raise PatchError(
                f"{len(unfrozen)} of the backbone's tensors require gradients in this model, first {unfrozen[0]}; a patch "
                "does not store them, and training writes to the backbone. Load the backbone again, leave frozen parameters "
                "frozen, and choose a method that owns what is to be trained."
            )
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors().items()}
        seen, facts = preprocessing or self.preprocessing, {"method": method, "metrics": metrics, "created": created}
        return Patch.of(self.backbone, task, record, tensors, grafts=self.blueprint.grafts, preprocessing=seen, **facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with tensors of its own that belongs to the same backbone."""
        memo[id(self.backbone)] = self.backbone
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def run_from(self, x: Tensor, start: int) -> Tensor:
        """The answer from the input `x` of segment `start`, which begins a part (see `first`), or from the head's input."""
        return self.head(self.head_input(x, start))

    def head_input(self, x: Tensor, start: int) -> HeadInput:
        """The head's input, from the input `x` of segment `start`; at the end of the chain `x` itself."""
        if start == 0:
            self.backbone.chain.prepare(x)
        return x if start == self.end else self.reading.run(self.chain_parts(), x, start)

    @torch.no_grad()
    def run_prefix(self, images: Tensor, end: int) -> Tensor:
        """The input of segment `end` for images, or at the end of the chain that of the head: what `run_from` goes on from."""
        if end == self.end:
            features = self.head_input(images, 0)
            assert isinstance(features, Tensor), "a decoder goes on from images or from inner segments"
            return features
        if not end:
            return images
        self.backbone.chain.prepare(images)
        return run_chain(self.chain_parts(), images, [Read(end - 1)])[0]

    def chain_parts(self) -> list[ChainPart]:
        """The whole chain as it runs now: the variants in place of their spans, the base's own modules beside them."""
        twins, ends = dict(self.twins.items()), (*self.starts[1:], self.end)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        parts = []
        for number, (start, end, module) in enumerate(zip(self.starts, ends, self.parts, strict=True)):
            # a second pass through a module that learns batch statistics would count the batch twice
            again = recompute and start >= self.first and not has_batch_statistics(module)
            run = partial(checkpoint, module, use_reentrant=False) if again else module
            parts.append(ChainPart(start, end, run, twins.get(str(number)) if twins else None))
        return parts

    @property
    def end(self) -> int:
        """The number of segments of the chain."""
        return len(self.backbone.chain)

    @property
    def variants(self) -> tuple[nn.Module, ...]:
        """The parts that stand in for the patch's spans, in order."""
        return tuple(self.parts[self.starts.index(start)] for start, _ in self.spans)

    @property
    def first(self) -> int:
        """The first segment that has to run for every step of training; everything before it is frozen and deterministic.

        The end of the chain where nothing but the head differs from the backbone and its input is one tensor.
        """
        if not self.spans and not self.reading.maps:
            return self.end
        ends = (*self.starts[1:], self.end)
        read = next(start for start, end in zip(self.starts, ends, strict=True) if end - 1 in self.reading.segments)
        return min(read, self.spans[0][0]) if self.spans else read

    def tensors(self) -> dict[str, Tensor]:
        """The patch's own tensors under the names they have in a patch file, detached, not copied."""
        tensors = {name: self._tensor(local).detach() for name, local in self.names.items()}
        if isinstance(self.head, Head):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
            tensors |= {f"head.{name}": tensor for name, tensor in self.head.stored().items()}
        for name, path in self.reweighted.items():
            stored = self.get_submodule(path).stored()  # type: ignore[operator]
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in stored.items()}
        return tensors

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require gradients, by the names of what they train in a patch file; scores train their mask."""
        for name, local in self.names.items():
            tensor = self._tensor(local)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                yield name, tensor
        for name, path in self.reweighted.items():
            made = self.get_submodule(path)
            for parameter in made.parameters():
                if parameter.requires_grad:
                    yield f"{made.trains}/{name}", parameter

    def _unfrozen(self) -> list[str]:
        """Parameters that require gradients though no patch stores them and they were frozen when the model was built."""
        stored = {id(parameter) for parameter in (*(own for _, own in self.trainable()), *self.head.parameters())}
        asking = [name for name, tensor in self.named_parameters() if tensor.requires_grad and id(tensor) not in stored]
        return [name for name in asking if name not in self._open]

    def state(self) -> dict[str, Tensor]:
        """Everything that training may change, under the names it has here; more exact than `tensors` for masks."""
        return {local: self._tensor(local).detach() for local in self._places().values()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave. Raises `ForeignTensorError` for names or shapes that differ."""
        _fill(self.state(), state)

    def portable_state(self) -> dict[str, Tensor]:
        """Everything that training may change, under names that do not depend on which other spans the patch has."""
        return {name: self._tensor(local).detach() for name, local in self._places().items()}

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over what another model's `portable_state` has of this one's. Raises `ForeignTensorError` for other shapes."""
        own = {name: tensor for name, tensor in self.portable_state().items() if name in state}
        _fill(own, {name: state[name] for name in own})

    def _places(self) -> dict[str, str]:
        """The names here of everything that training may change, by portable names."""
        places = dict(self.names)
        for base, path in self.reweighted.items():
            own = self.get_submodule(path).state_dict()
            places |= {f"mask/{base}.{name}": f"{path}.{name}" for name in own}
        return places

    def _tensor(self, local: str) -> Tensor:
        owner, _, leaf = local.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Applies to the patch's own parameters; those of the backbone stay frozen."""
        for name in self.state():
            tensor = self._tensor(name)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(requires_grad)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        """Like `nn.Module.load_state_dict`, but by assignment: copying would write the backbone's bytes, and is refused."""
        return super().load_state_dict(state_dict, strict, assign)


Backbone.patched_model = PatchedModel


def has_batch_statistics(module: nn.Module) -> bool:
    """Return True if a BatchNorm layer of the module is in train mode."""
    return any(isinstance(one, _BatchNorm) and one.training for one in module.modules())


def check_head(chain: Chain, patch: Patch) -> None:
    """Raises `ForeignTensorError` for a head that does not fit the chain: its features, its maps or its tensors' values."""
    patch.head.head.check_chain(patch.head, chain, patch.preprocessing.image_size, patch.tensors)


def _fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy values to a model's tensors. Raises `ForeignTensorError` for names, shapes or kinds of numbers that differ."""
    check_fit({name: (tensor.shape, tensor.is_floating_point()) for name, tensor in own.items()}, given)
    for name, tensor in own.items():
        tensor.copy_(given[name])


def check_fit(expected: Mapping[str, tuple[torch.Size, bool]], tensors: Mapping[str, Tensor]) -> None:
    """Raises `ForeignTensorError` unless `tensors` has exactly the expected names, shapes and kinds of numbers.

    A kind is True for floating-point numbers, False for others.
    """
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ForeignTensorError(f"the patch lacks {len(missing)} tensors that it needs: {', '.join(missing[:3])}.")
    if foreign := sorted(tensors.keys() - expected.keys()):
        raise ForeignTensorError(f"the backbone has no place for {len(foreign)} tensors: {', '.join(foreign[:3])}.")
    for name, (shape, floating) in expected.items():
        if tensors[name].shape != shape:
            given = tuple(tensors[name].shape)
            raise ForeignTensorError(f"{name} has shape {given}; the backbone expects {tuple(shape)}.")
        if tensors[name].is_floating_point() != floating:
            wanted = "floating-point numbers" if floating else "integers"
            raise ForeignTensorError(f"{name} holds {tensors[name].dtype}; the backbone expects {wanted}.")


def check_added(backbone: Backbone, patch: Patch) -> None:
    """Raises `ForeignTensorError` unless the modules that a patch adds have the tensors of its file, name by name.

    They are made without memory first: a few words of a header can ask for any number of parameters.
    """
    if not patch.grafts:
        return
    with torch.device("meta"):
        added = Blueprint(grafts=patch.grafts)
        model = PatchedModel.draft(backbone, added, patch.head.build(), variants_only=True)
    shapes = {name: tensor.shape for name, tensor in model.portable_state().items() if name.startswith("graft/")}
    given = {name: tensor.shape for name, tensor in patch.tensors.items() if name.startswith("graft/")}
    for name in sorted(shapes.keys() | given.keys()):
        if shapes.get(name) != given.get(name):
            made, stored = (tuple(one[name]) if name in one else None for one in (shapes, given))
            raise ForeignTensorError(
                f"the patch's tensor {name} has shape {stored}; what the patch adds expects {made}."
            )
