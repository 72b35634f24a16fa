"""Templates: one module a span for all bound patches of one structure.

    bound patch 1 ─ part ─┐
    bound patch 2 ─ part ─┼─ bind ─> Template: a module over the backbone's bytes, with room for a part's tensors
    bound patch 3 ─ part ─┘

A template holds no tensors of a patch: those of the part that runs are bound to it, one part at a time.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment, count_macs
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.fingerprint import hash_tensors
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.changes import StoredWeight, set_strength
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel

RECENT = 32  # parts whose views a template keeps, since making them takes time
HEAD = -1  # the number of the head among a patch's parts
Entry = tuple[str, torch.Size, int]  # a tensor's name in a patch file, its shape, its place in a flat tensor


@dataclass(frozen=True, eq=False)
class PartTensors:
    """A patch's tensors for one of its parts: floating ones in a flat tensor, others `whole`, masked weights as bits.

    `strength` is that of the patch, for added modules that scale their effect.
    """

    flat: Tensor
    entries: Sequence[Entry]
    whole: Mapping[str, Tensor]
    made: Mapping[str, StoredWeight]
    strength: float = 1.0

    def load(self) -> dict[str, Tensor]:
        """Tensors by their names in a patch file: views of what is held, and masked weights, which are made anew."""
        return self._held() | {name: weight.make() for name, weight in self.made.items()}

    def _held(self) -> dict[str, Tensor]:
        views = {name: self.flat[at : at + shape.numel()].view(shape) for name, shape, at in self.entries}
        return {**views, **self.whole}

    def digest(self) -> str:
        """SHA-256 of names, shapes and bytes, of masks as bits."""
        pieces = self._held()
        for name, weight in self.made.items():
            held = enumerate((*weight.planes, weight.places, weight.values))
            pieces |= {f"{name}#{number}": tensor for number, tensor in held if tensor is not None}
        return hash_tensors(pieces.items())


class Template:
    """The module of one span, to which parts of one structure bind their tensors one at a time. Thread-safe.

    `names` map a tensor's name in a patch file to its name in the module.
    """

    def __init__(
        self, segments: Sequence[Segment], module: nn.Module, names: Mapping[str, str], structure: str
    ) -> None:
        first, last = segments[0], segments[-1]
        self.span = (first.index, last.index + 1)
        self.name = first.name if first is last else f"{first.name} to {last.name}"
        self.input_shape, self.output_bytes = first.input_shape, 4 * prod(last.output_shape)
        self.structure = structure
        self.nbytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        self._module, self._names = module, dict(names)
        self._places = {name: _place(module, path) for name, path in self._names.items()}
        self._empty = {name: _empty(place[leaf]) for name, (place, leaf) in self._places.items()}
        self._scaled = [one for one in module.modules() if isinstance(getattr(one, "strength", None), float)]
        self._strength = 1.0
        self._lock = threading.Lock()
        self._bound: weakref.ref[PartTensors] | None = None
        self._recent: OrderedDict[int, tuple[weakref.ref[PartTensors], dict[str, Tensor]]] = OrderedDict()
        self._unbind()
        frozen = {tensor.data_ptr() for segment in segments for _, tensor in segment.named_tensors()}
        own = (tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta)
        self.held = sum(tensor.nbytes for tensor in own if tensor.data_ptr() not in frozen)

    def key(self, tensors: PartTensors) -> str:
        """The structure and a hash of the tensors: equal for parts that compute the same."""
        scale = f" {tensors.strength}" if self._scaled else ""
        return f"{self.span} {self.structure}{scale} {tensors.digest()}"

    def run(self, tensors: PartTensors, x: Tensor) -> Tensor:
        """The module's output with these tensors. Weights made from masks are freed at once."""
        with self._lock:
            self._bind(tensors)
            try:
                return self._module(x)
            finally:
                if tensors.made:
                    self._unbind()

    def count_macs(self, tensors: PartTensors) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        with self._lock:
            if "_macs" not in self.__dict__:
                self._bind(tensors)
                self._macs = count_macs(self._module, self.input_shape)
                self._unbind()
            return self._macs

    def copy_with(self, tensors: PartTensors) -> nn.Module:
        """A copy of the module in eval mode with these tensors, over the same frozen bytes."""
        with self._lock:
            self._unbind()
            copy = clone_module(self._module)
        loaded = tensors.load()
        for name, path in self._names.items():
            place, leaf = _place(copy, path)
            place[leaf] = nn.Parameter(loaded[name], False) if isinstance(place[leaf], nn.Parameter) else loaded[name]
        set_strength(copy, tensors.strength)
        return copy.requires_grad_(False)

    def _bind(self, tensors: PartTensors) -> None:
        if self._bound is not None and self._bound() is tensors:
            return
        self._put(self._views(tensors))
        for module in self._scaled if self._strength != tensors.strength else ():
            module.strength = tensors.strength  # type: ignore[assignment]
        self._strength = tensors.strength
        self._bound = self._recent[id(tensors)][0] if id(tensors) in self._recent else weakref.ref(tensors)

    def _views(self, tensors: PartTensors) -> dict[str, Tensor]:
        if tensors.made:
            return tensors.load()
        owner, views = self._recent.pop(id(tensors), (None, {}))
        if owner is None or owner() is not tensors:
            owner, views = weakref.ref(tensors, self._forget), tensors.load()
        self._recent[id(tensors)] = owner, views
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return views

    def _unbind(self) -> None:
        self._put(self._empty)
        self._bound = None

    def _forget(self, gone: weakref.ref[PartTensors]) -> None:
        """Free the views of a part that is gone, unless another part is running."""
        if self._lock.acquire(blocking=False):
            try:
                self._recent = OrderedDict((key, kept) for key, kept in self._recent.items() if kept[0] is not gone)
                if self._bound is gone:
                    self._unbind()
            finally:
                self._lock.release()

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, (place, leaf) in self._places.items():
            place[leaf] = tensors[name]


def _place(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The dictionary of the module that holds the parameter or buffer, and its name there."""
    owner, _, leaf = path.rpartition(".")
    held = module.get_submodule(owner)
    return (held._parameters if leaf in held._parameters else held._buffers), leaf


def _empty(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare


class FlatLayout:
    """The places of a patch's tensors in a flat tensor, part after part, the head last."""

    def __init__(self, shapes: Mapping[str, torch.Size], owner: Callable[[str], int], parts: int) -> None:
        self.entries: dict[int, list[Entry]] = {part: [] for part in (*range(parts), HEAD)}
        self.size = 0
        for part, held in self.entries.items():
            for name in sorted(name for name in shapes if owner(name) == part):
                held.append((name, shapes[name], self.size))
                self.size += padded(shapes[name])

    def fill(self, values: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """A flat tensor that holds these values."""
        flat = torch.zeros(self.size, device=device)
        for name, shape, at in itertools.chain.from_iterable(self.entries.values()):
            flat[at : at + shape.numel()].copy_(values[name].reshape(-1))
        return flat


def padded(shape: torch.Size) -> int:
    """The elements that a tensor takes in a flat one: whole lines of 64 bytes, which kernels read faster."""
    return -(-shape.numel() // 16) * 16


class Structure:
    """All that patches of one structure have in common: a template for every span, and names and shapes of tensors.

    Raises `ForeignTensorError` for a structure that does not fit the backbone.
    """

    def __init__(self, backbone: Backbone, patch: Patch) -> None:
        with torch.device("meta"):
            head = patch.head.build()
        model = PatchedModel.draft(backbone, patch.blueprint, head)
        model.parts.to(backbone.device).requires_grad_(False)
        model.try_grafts(patch.blueprint, backbone)
        numbers = {start: number for number, (start, _) in enumerate(model.spans)}
        places = {place: numbers[start] for place, start in enumerate(model.starts) if start in numbers}
        self.shapes = {name: shape for name, shape in model.shapes().items() if not name.startswith("head.")}
        self._owners = {name: places[int(model.names[name].split(".")[1])] for name in self.shapes}
        self.templates = tuple(self._template(backbone, patch, model, number) for number in range(len(model.spans)))
        self.reading = model.reading
        self._layouts: dict[tuple[HeadRecord, frozenset[str]], FlatLayout] = {}

    def _template(self, backbone: Backbone, patch: Patch, model: PatchedModel, number: int) -> Template:
        start, end = model.spans[number]
        place = model.starts.index(start)
        names = {name: model.names[name] for name, owner in self._owners.items() if owner == number}
        local = {name: path.removeprefix(f"parts.{place}.") for name, path in names.items()}
        grafts = [graft.model_dump_json() for graft in patch.grafts if start <= graft.start and graft.end <= end]
        return Template(backbone.chain[start:end], model.parts[place], local, f"{sorted(local)} {grafts}")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the templates beyond the backbone's and the patches' own: their copies of buffers."""
        return sum(template.held for template in self.templates)

    def owner(self, name: str) -> int:
        """The number of the part that a tensor of a patch file belongs to, `HEAD` for the head."""
        return self._owners.get(name, HEAD)

    def layout(self, head: HeadRecord, left_out: Collection[str]) -> FlatLayout:
        """The layout of a patch's tensors without those `left_out`: one for all patches with such a head."""
        key = head, frozenset(left_out)
        if key not in self._layouts:
            shapes = {name: shape for name, shape in {**self.shapes, **head.shapes()}.items() if name not in left_out}
            self._layouts[key] = FlatLayout(shapes, self.owner, len(self.templates))
        return self._layouts[key]


class Templates:
    """The structures of a backbone's bound patches, each made once and freed with the last patch that uses it. Thread-safe."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._structures: weakref.WeakValueDictionary[str, Structure] = weakref.WeakValueDictionary()
        self._frozen: dict[int, nn.Module] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, backbone: Backbone) -> Templates:
        """The templates that the backbone's bound patches outside engines share; new ones where no such patch is left."""
        with _SHARING:
            found = _SHARED.get(backbone)
            templates = found() if found is not None else None
            if templates is None:
                templates = cls(backbone)
                _SHARED[backbone] = weakref.ref(templates)
            return templates

    def structure(self, patch: Patch) -> Structure:
        """The structure of a patch. Raises `WrongBackboneError` for a patch of another backbone, or as `Structure` does."""
        patch.check_backbone(self.backbone)
        key = f"{self.backbone.device} {patch.blueprint.model_dump_json()} {patch.head.reads}"
        found = self._structures.get(key)
        if found is None:
            made = Structure(self.backbone, patch)
            with self._lock:
                found = self._structures.setdefault(key, made)
        return found

    def segment(self, index: int) -> nn.Module:
        """Segment `index` of the backbone in eval mode, independent of the mode of the backbone's own module."""
        with self._lock:
            if index not in self._frozen:
                self._frozen[index] = clone_module(self.backbone.chain[index].module)
            return self._frozen[index]

    def __len__(self) -> int:
        return len(self._structures)


_SHARED: weakref.WeakKeyDictionary[Backbone, weakref.ref[Templates]] = weakref.WeakKeyDictionary()
_SHARING = threading.Lock()
