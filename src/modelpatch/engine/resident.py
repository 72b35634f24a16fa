"""A patch on its backbone as a light record, among hundreds that share one structure.

    BoundPatch: numbers in one flat tensor
        parts[0]   variant of segments [3, 4)    -- lends its slice of the numbers to -->  Shelf: a module, a lock
        parts[1]   variant of segments [7, 8)    -- lends ...                               (one per structure)
        head

A bound patch costs its own bytes and next to nothing else: the modules that compute with them, one `Shelf` a span, are
shared by all patches of the same structure. Patches that use the same shelf take turns.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment, count_macs
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.fingerprint import hash_tensors
from modelpatch.heads.base import HeadRecord
from modelpatch.heads.reading import HeadInput, read_taps, reads_maps
from modelpatch.patch.blueprint import Span
from modelpatch.patch.changes import MADE, StoredWeight, resolve
from modelpatch.patch.model import PatchedModel, check_features, check_fit, check_selection

if TYPE_CHECKING:
    from modelpatch.patch.contents import Patch


RECENT = 32
HEAD = -1  # the number of the head among a patch's parts
Step = tuple[int, Callable[[Tensor], Tensor]]  # the last segment that is run, and what runs it


class BoundPatch:
    """A patch bound to a backbone at the cost of its own bytes. Calls are thread-safe.

    `parts` are the variants of its spans in order, `head` the module that answers, `taps` the segments whose outputs the head
    reads, pooled or as maps, with the axes of each that are positions; empty where it reads the chain's features, and beside
    them the base's if `reads_base`.
    Raises `WrongBackboneError` for a patch of another backbone, `ForeignTensorError` for tensors that do not fit.
    """

    def __init__(self, backbone: Backbone, patch: Patch) -> None:
        skeleton = skeleton_for(backbone, patch)
        self.task, self.preprocessing = patch.task, patch.preprocessing
        stored = StoredWeight.collect(patch.tensors, backbone, patch.strength)
        made = {f"replace/{name}": weight for name, weight in stored.items()}
        kept = {f"{kind}{name}" for name in stored for kind in MADE}
        plain = {name: tensor for name, tensor in patch.tensors.items() if name not in kept}
        values = resolve(plain, backbone.chain, patch.strength)
        check_fit({n: s for n, s in {**skeleton.shapes, **patch.head.shapes()}.items() if n not in made}, values)
        check_features(backbone.chain, patch)
        check_selection(patch.tensors.get("head.selected"), backbone.chain, patch.head)
        whole = {name: t.to(backbone.device) for name, t in values.items() if not t.is_floating_point()}
        layout = skeleton.layout(patch.head, made.keys() | whole.keys())
        flat = layout.fill(values, backbone.device)
        numbers = [
            Numbers(
                flat,
                layout.entries[part],
                {name: tensor for name, tensor in whole.items() if skeleton.owner(name) == part},
                {name: weight for name, weight in made.items() if skeleton.owner(name) == part},
            )
            for part in (*range(len(skeleton.shelves)), HEAD)
        ]
        self.parts = tuple(BoundPart(shelf, own) for shelf, own in zip(skeleton.shelves, numbers, strict=False))
        self.taps: Mapping[int, tuple[int, ...]] = skeleton.model.taps
        self.reads_base = skeleton.model.reads_base
        self.head = _build_head(patch.head, numbers[HEAD])
        self.backbone = backbone
        self._steps, self._beside = skeleton.steps({part.span[0]: part for part in self.parts})
        self.nbytes = flat.nbytes + sum(t.nbytes for t in whole.values()) + sum(w.nbytes for w in made.values())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The answer, logits (B, K) for classes, for images (B, C, H, W), normalised as `preprocessing` says."""
        features = self._features(images, self._steps)
        if self.reads_base:
            beside = self._features(images, self._beside)
            assert isinstance(features, Tensor) and isinstance(beside, Tensor)  # noqa: PT018
            features = torch.cat([features, beside], 1)
        return self.head(features)

    def _features(self, x: Tensor, steps: Sequence[Step]) -> HeadInput:
        """What the steps give one after another, or what the head reads of its taps."""
        tapped = []
        for last, module in steps:
            x = module(x)
            if last in self.taps:
                tapped.append((x, self.taps[last]))
                if reads_maps(self.head) and len(tapped) == len(self.taps):
                    break  # nobody reads what comes behind
        return read_taps(self.head, *zip(*tapped, strict=True)) if self.taps else x


def _build_head(record: HeadRecord, numbers: Numbers) -> nn.Module:
    with torch.device("meta"):
        head = record.build()
    tensors = {name.removeprefix("head."): tensor for name, tensor in numbers.tensors().items()}
    head.load_state_dict(tensors, assign=True)
    return head.eval().requires_grad_(False)


Entry = tuple[str, torch.Size, int]  # a tensor's name in a patch file, its shape, its place in a flat tensor


@dataclass(frozen=True)
class Numbers:
    """What a patch holds for one of its parts: floating tensors in a flat one, others `whole`, masked weights as bits."""

    flat: Tensor
    entries: tuple[Entry, ...]
    whole: Mapping[str, Tensor]
    made: Mapping[str, StoredWeight]

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a patch file; views, but for masked weights, which are made anew."""
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


class BoundPart:
    """One variant of a bound patch: it stands in for the segments `[span[0], span[1])`."""

    def __init__(self, shelf: Shelf, numbers: Numbers) -> None:
        self.shelf, self.numbers = shelf, numbers

    @property
    def span(self) -> Span:
        return self.shelf.span

    @property
    def name(self) -> str:
        return self.shelf.name

    @cached_property
    def key(self) -> str:
        """Equal for variants that compute the same: the hash of the structure and the numbers."""
        return hashlib.sha256(f"{self.span} {self.shelf.structure} {self.numbers.digest()}".encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.shelf.run(self, x)

    def make(self) -> nn.Module:
        """The variant as a module of its own, in eval mode; frozen tensors stay the backbone's bytes."""
        return self.shelf.copy_with(self.numbers.tensors())


class Shelf:
    """The module of one span that patches of one structure lend their numbers to, one at a time."""

    def __init__(
        self, segments: Sequence[Segment], module: nn.Module, local: Mapping[str, str], structure: str
    ) -> None:
        first, last = segments[0], segments[-1]
        self.span = (first.index, last.index + 1)
        self.name = first.name if first is last else f"{first.name} to {last.name}"
        self.input_shape = first.input_shape
        self.module, self.structure = module, structure
        self.local = dict(local)  # what a tensor is called in a patch file -> what it is called in the module
        self._places = {name: _place(module, path) for name, path in self.local.items()}
        self._resting = {name: place[path] for name, (place, path) in self._places.items()}
        self._lock = threading.Lock()
        self._holder: weakref.ref[BoundPart] | None = None
        self._recent: OrderedDict[int, tuple[weakref.ref[BoundPart], dict[str, Tensor]]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the module: what a patch owns and the frozen tensors it reads."""
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))

    @cached_property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        with self._lock:
            return count_macs(self.module, self.input_shape)

    def run(self, part: BoundPart, x: Tensor) -> Tensor:
        """The module's output with the part's numbers. Weights made from masks are given back at once."""
        with self._lock:
            if self._holder is None or self._holder() is not part:
                self._lend(self._views(part))
                self._holder = self._recent[id(part)][0] if id(part) in self._recent else weakref.ref(part)
            try:
                return self.module(x)
            finally:
                if part.numbers.made:
                    self._give_back()

    def _views(self, part: BoundPart) -> dict[str, Tensor]:
        """The part's tensors; as views they are kept for the `RECENT` parts that lent last, since making them takes time."""
        if part.numbers.made:
            return part.numbers.tensors()
        owner, views = self._recent.pop(id(part), (None, {}))
        if owner is None or owner() is not part:
            owner, views = weakref.ref(part, self._forget), part.numbers.tensors()
        self._recent[id(part)] = owner, views
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return views

    def _give_back(self) -> None:
        self._lend(self._resting)
        self._holder = None

    def _forget(self, holder: weakref.ref[BoundPart]) -> None:
        """The part that lent its numbers is gone: let go of them, unless another has just taken its place."""
        if self._lock.acquire(blocking=False):
            try:
                self._recent = OrderedDict((key, kept) for key, kept in self._recent.items() if kept[0] is not holder)
                if self._holder is holder:
                    self._give_back()
            finally:
                self._lock.release()

    def _lend(self, numbers: Mapping[str, Any]) -> None:
        for name, (place, leaf) in self._places.items():
            place[leaf] = numbers[name]

    def copy_with(self, numbers: Mapping[str, Tensor]) -> nn.Module:
        """A clone of the module over the same frozen bytes, with these numbers."""
        with self._lock:
            self._give_back()
            copy = clone_module(self.module)
        for name, path in self.local.items():
            place, leaf = _place(copy, path)
            tensor = numbers[name]
            place[leaf] = nn.Parameter(tensor, False) if isinstance(place[leaf], nn.Parameter) else tensor
        return copy.requires_grad_(False)


def _place(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The dictionary of the module that holds the parameter or buffer, and its name there."""
    owner, _, leaf = path.rpartition(".")
    held = module.get_submodule(owner)
    return (held._parameters if leaf in held._parameters else held._buffers), leaf


@dataclass(frozen=True)
class _Layout:
    """Where a flat tensor holds each of a patch's tensors, part after part, the head last."""

    entries: Mapping[int, tuple[Entry, ...]]
    size: int

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], owner: Callable[[str], int], parts: int) -> _Layout:
        entries, offset = {}, 0
        for part in (*range(parts), HEAD):
            held = []
            for name in sorted(name for name in shapes if owner(name) == part):
                held.append((name, shapes[name], offset))
                offset += padded(shapes[name])
            entries[part] = tuple(held)
        return cls(entries, offset)

    def fill(self, values: Mapping[str, Tensor], device: torch.device) -> Tensor:
        flat = torch.zeros(self.size, device=device)
        for name, shape, at in itertools.chain.from_iterable(self.entries.values()):
            flat[at : at + shape.numel()].copy_(values[name].reshape(-1))
        return flat


def padded(shape: torch.Size) -> int:
    """Numbers a tensor takes in a flat one: whole 64-byte lines, since kernels differ in the last bit off them."""
    return -(-shape.numel() // 16) * 16


class _Skeleton:
    """The model that all bound patches of one structure share."""

    def __init__(self, backbone: Backbone, patch: Patch) -> None:
        self.model = PatchedModel(backbone, patch)
        self.shapes = {name: shape for name, shape in self.model.shapes().items() if not name.startswith("head.")}
        numbers = {start: number for number, (start, _) in enumerate(self.model.spans)}
        places = {place: numbers[start] for place, start in enumerate(self.model.starts) if start in numbers}
        self._owners = {name: places[int(self.model.names[name].split(".")[1])] for name in self.shapes}
        self.shelves = tuple(self._shelf(backbone, patch, number) for number in range(len(self.model.spans)))
        self._layouts: dict[tuple[Any, ...], _Layout] = {}

    def _shelf(self, backbone: Backbone, patch: Patch, number: int) -> Shelf:
        start, end = self.model.spans[number]
        place = self.model.starts.index(start)
        names = {name: self.model.names[name] for name, owner in self._owners.items() if owner == number}
        local = {name: path.removeprefix(f"parts.{place}.") for name, path in names.items()}
        grafts = [graft.model_dump_json() for graft in patch.grafts if start <= graft.start and graft.end <= end]
        structure = f"{sorted(local)} {grafts} {patch.strength}"
        return Shelf(backbone.chain[start:end], self.model.parts[place], local, structure)

    def steps(self, parts: Mapping[int, BoundPart]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """The chain with these parts, by their first segments, and the base's own beside it where the head reads both."""
        model = self.model
        lasts = [start - 1 for start in (*model.starts[1:], model.end)]
        own = [parts.get(start, module) for start, module in zip(model.starts, model.parts, strict=True)]
        if not model.reads_base:
            return tuple(zip(lasts, own, strict=True)), ()
        twins = dict(model.twins.items())
        beside = [twins.get(str(place), module) for place, module in enumerate(model.parts)]
        return tuple(zip(lasts, own, strict=True)), tuple(zip(lasts, beside, strict=True))

    def owner(self, name: str) -> int:
        """The number of the part that a tensor of a patch file belongs to, `HEAD` for the head."""
        return self._owners.get(name, HEAD)

    def layout(self, head: HeadRecord, made: Collection[str]) -> _Layout:
        """How a flat tensor holds the numbers, without the weights that are `made` from masks: one for all patches."""
        key = head, frozenset(made)
        if key not in self._layouts:
            shapes = {name: shape for name, shape in {**self.shapes, **head.shapes()}.items() if name not in made}
            self._layouts[key] = _Layout.of(shapes, self.owner, len(self.shelves))
        return self._layouts[key]


_SKELETONS: weakref.WeakKeyDictionary[Backbone, dict[str, _Skeleton]] = weakref.WeakKeyDictionary()
_SKELETONS_LOCK = threading.Lock()


def skeleton_for(backbone: Backbone, patch: Patch) -> _Skeleton:
    """The shared model for the patch's structure. Raises `WrongBackboneError` for a patch of another backbone."""
    patch.check_backbone(backbone)
    key = f"{backbone.device} {patch.structure}"
    with _SKELETONS_LOCK:
        skeletons = _SKELETONS.setdefault(backbone, {})
        if key not in skeletons:
            skeletons[key] = _Skeleton(backbone, patch)
        return skeletons[key]
