"""Patches bound to their backbone at the cost of their own bytes, hundreds of which share one structure.

BoundPatch: tensors in one flat tensor
    parts[0]   variant of segments [3, 4)  ─ binds its tensors to ─>  Template: a module over the backbone's bytes
    parts[1]   variant of segments [7, 8)  ─ binds ...                with room for the tensors of one part at a time
    head
"""

import hashlib
import itertools
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment, count_macs
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.fingerprint import hash_tensors
from modelpatch.backbone.tuning import FrozenBackbone, Tuning, run_in_pieces
from modelpatch.engine.plan import Link
from modelpatch.errors import WrongBackboneError
from modelpatch.heads.base import HeadRecord
from modelpatch.heads.reading import ChainPart, Reading
from modelpatch.patch.changes import MADE, StoredWeight, resolve, set_strength
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel, check_added, check_fit, check_head

RECENT = 32  # parts whose views a template keeps, since making them takes time
LINE = 16  # a tensor in a flat one begins at whole lines of 64 bytes, which kernels read faster
Entry = tuple[str, torch.Size, int]  # a tensor's name in a patch file, its shape, its place in a flat tensor
Layout = tuple[list[list[Entry]], int]  # the entries of every part, the head's last; the elements of the flat tensor
T = TypeVar("T")


class BoundPart:
    """One variant of a bound patch, and a link of plans: it stands in for the segments `[span[0], span[1])`.

    Its floating tensors are `entries` of the patch's `flat` tensor, others are `whole`, and masked weights are `made` at every
    call. `strength` is that of the patch, for added modules that scale their effect.
    """

    def __init__(
        self,
        template: "Template",
        flat: Tensor,
        entries: Sequence[Entry],
        whole: Mapping[str, Tensor],
        made: Mapping[str, StoredWeight],
        strength: float,
    ) -> None:
        self.template, self.strength, self.own = template, strength, True
        self.flat, self.entries, self.whole, self.made = flat, entries, whole, made
        self.span, self.name = template.span, template.name
        self.nbytes, self.output_bytes = template.nbytes, template.output_bytes

    @cached_property
    def key(self) -> str:
        """A hash of the structure, the tensors and the masks' bits: equal for variants that compute the same."""
        pieces = self._held()
        for name, weight in self.made.items():
            held = enumerate((*weight.planes, weight.places, weight.values))
            pieces |= {f"{name}#{number}": tensor for number, tensor in held if tensor is not None}
        scale = f" {self.strength}" if self.template.scaled else ""
        text = f"{self.span} {self.template.structure}{scale} {hash_tensors(pieces.items())}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return self.template.count_macs(self)

    @property
    def made_bytes(self) -> int:
        """Bytes of the weights that are made from masks at every call; 0 for a part without masks."""
        return sum(weight.weight.nbytes for weight in self.made.values())

    def copy(self) -> nn.Module:
        """A module with the part's tensors; frozen ones stay the backbone's bytes."""
        return self.template.copy_with(self)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.template.run(self, x)

    def load(self) -> dict[str, Tensor]:
        """Tensors by their names in a patch file: views of what is held, and masked weights, which are made anew."""
        return self._held() | {name: weight.make() for name, weight in self.made.items()}

    def _held(self) -> dict[str, Tensor]:
        return {**view_flat(self.flat, self.entries), **self.whole}


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
        self.scaled = [one for one in module.modules() if isinstance(getattr(one, "strength", None), float)]
        self._strength = 1.0
        self._lock = threading.Lock()
        self._bound: weakref.ref[BoundPart] | None = None
        self._recent: weakref.WeakKeyDictionary[BoundPart, dict[str, Tensor]] = weakref.WeakKeyDictionary()
        self._unbind()
        frozen = {tensor.data_ptr() for segment in segments for _, tensor in segment.named_tensors()}
        own = (tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta)
        self.held = sum(tensor.nbytes for tensor in own if tensor.data_ptr() not in frozen)

    def run(self, part: BoundPart, x: Tensor) -> Tensor:
        """The module's output with the tensors of a part. Weights made from masks are freed at once."""
        with self._lock:
            self._bind(part)
            try:
                return self._module(x)
            finally:
                if part.made:
                    self._unbind()

    def count_macs(self, part: BoundPart) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        with self._lock:
            if "_macs" not in self.__dict__:
                self._bind(part)
                self._macs = count_macs(self._module, self.input_shape)
                self._unbind()
            return self._macs

    def copy_with(self, part: BoundPart) -> nn.Module:
        """A copy of the module in eval mode with the tensors of a part; frozen tensors stay the backbone's bytes."""
        with self._lock:
            self._unbind()
            copy = clone_module(self._module)
        loaded = part.load()
        for name, path in self._names.items():
            place, leaf = _place(copy, path)
            place[leaf] = nn.Parameter(loaded[name], False) if isinstance(place[leaf], nn.Parameter) else loaded[name]
        set_strength(copy, part.strength)
        return copy.requires_grad_(False)

    def _bind(self, part: BoundPart) -> None:
        if self._bound is not None and self._bound() is part:
            return
        self._put(self._views(part))
        for module in self.scaled if self._strength != part.strength else ():
            module.strength = part.strength  # type: ignore[assignment]
        self._strength = part.strength
        self._bound = weakref.ref(part, self._forget)

    def _views(self, part: BoundPart) -> dict[str, Tensor]:
        if part.made:
            return part.load()
        views = self._recent.pop(part, None) or part.load()
        self._recent[part] = views
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]  # the one used least recently
        return views

    def _unbind(self) -> None:
        self._put(self._empty)
        self._bound = None

    def _forget(self, gone: weakref.ref[BoundPart]) -> None:
        """Free the views of the bound part when it is gone, unless another part is running."""
        if self._lock.acquire(blocking=False):
            try:
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


class Structure:
    """All that patches of one structure have in common: a template for every span, and names and shapes of tensors.

    `nbytes` are the templates' copies of buffers. Raises `ForeignTensorError` for a structure that does not fit the backbone.
    """

    def __init__(self, backbone: Backbone, patch: Patch) -> None:
        check_added(backbone, patch)
        with torch.device("meta"):
            head = patch.head.build()
        model = PatchedModel.draft(backbone, patch.blueprint, head, variants_only=True)
        model.parts.to(backbone.device).requires_grad_(False)
        model.try_grafts()
        self.reading = model.reading
        self.templates: list[Template] = []
        self._owners: dict[str, int] = {}
        for start, end in model.spans:
            place = model.starts.index(start)
            prefix = f"parts.{place}."
            local = {name: path.removeprefix(prefix) for name, path in model.names.items() if path.startswith(prefix)}
            grafts = [graft.model_dump_json() for graft in patch.grafts if start <= graft.start and graft.end <= end]
            self._owners |= dict.fromkeys(local, len(self.templates))
            template = Template(backbone.chain[start:end], model.parts[place], local, f"{sorted(local)} {grafts}")
            self.templates.append(template)
        self.nbytes = sum(template.held for template in self.templates)
        tensors = model.portable_state()
        self.fit = {name: (tensors[name].shape, tensors[name].is_floating_point()) for name in self._owners}
        self._layouts: dict[tuple[HeadRecord, frozenset[str]], Layout] = {}

    def owner(self, name: str) -> int:
        """The number of the part that a tensor of a patch file belongs to; the head is the last."""
        return self._owners.get(name, len(self.templates))

    def own(self, values: Mapping[str, T], part: int) -> dict[str, T]:
        """Those of a patch's values that belong to a part."""
        return {name: value for name, value in values.items() if self.owner(name) == part}

    def layout(self, head: HeadRecord, left_out: Collection[str]) -> Layout:
        """The layout of a patch's tensors without those `left_out`: one for all patches with such a head."""
        key = head, frozenset(left_out)
        if key not in self._layouts:
            own = {name: shape for name, (shape, _) in self.fit.items()}
            shapes = {name: shape for name, shape in {**own, **head.shapes()}.items() if name not in left_out}
            entries: list[list[Entry]] = [[] for _ in range(len(self.templates) + 1)]
            size = 0
            for part, name in sorted((self.owner(name), name) for name in shapes):
                entries[part].append((name, shapes[name], size))
                size += -(-shapes[name].numel() // LINE) * LINE
            self._layouts[key] = entries, size
        return self._layouts[key]


class Templates:
    """The structures of a backbone's bound patches, each made once and freed with the last patch that uses it. Thread-safe."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._structures: weakref.WeakValueDictionary[str, Structure] = weakref.WeakValueDictionary()
        self.frozen = FrozenBackbone(backbone, Tuning())
        self.segments = tuple(SegmentLink(segment) for segment in backbone.chain)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, backbone: Backbone) -> "Templates":
        """The templates that the backbone's bound patches outside engines share; new ones where no such patch is left."""
        with _SHARING:
            templates = _SHARED.get(id(backbone))
            if templates is None:
                templates = _SHARED[id(backbone)] = cls(backbone)
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


_SHARED: weakref.WeakValueDictionary[int, Templates] = weakref.WeakValueDictionary()  # by ids of their backbones
_SHARING = threading.Lock()


class SegmentLink:
    """A segment of the backbone as it is, as a link of plans."""

    def __init__(self, segment: Segment) -> None:
        self.segment, self.own, self.name = segment, False, segment.name
        self.span, self.key = (segment.index, segment.index + 1), f"base {segment.index}"
        self.nbytes = sum(tensor.nbytes for _, tensor in segment.named_tensors())
        self.output_bytes = 4 * prod(segment.output_shape)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return self.segment.macs

    def copy(self) -> nn.Module:
        """A clone of the segment's module."""
        return clone_module(self.segment.module)


class NetworkLink:
    """The whole network as one link, for a base whose own answer is not computed from its features."""

    def __init__(self, backbone: Backbone) -> None:
        self.module = clone_module(backbone.module)
        self.own, self.name, self.key, self.span = False, "network", "base network", (0, len(backbone.chain))
        self.nbytes = sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))
        self.output_bytes, self._shape = 4 * backbone.chain.feature_dim, backbone.input_size

    @cached_property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return count_macs(self.module, self._shape)

    def copy(self) -> nn.Module:
        """A clone of the network."""
        return clone_module(self.module)


class BoundPatch:
    """A patch bound to a backbone. Calls are thread-safe.

    Patches with the same `templates`, by default all of a backbone outside engines, share the modules that compute with them.
    `parts` are the variants of its spans in order, `head` the module that answers and `reading` its reads of the chain.
    Raises `WrongBackboneError` for a patch of another backbone, `ForeignTensorError` for tensors that do not fit.
    """

    def __init__(self, backbone: Backbone, patch: Patch, templates: Templates | None = None) -> None:
        self.templates = templates = Templates.of(backbone) if templates is None else templates
        if templates.backbone is not backbone:
            raise WrongBackboneError(f"the templates belong to another backbone than {backbone.spec}.")
        self.structure = structure = templates.structure(patch)
        self.backbone, self.task, self.preprocessing = backbone, patch.task, patch.preprocessing
        self.reading: Reading = structure.reading
        stored = StoredWeight.collect(patch.tensors, backbone, patch.strength)
        made = {f"replace/{name}": weight for name, weight in stored.items()}
        kept = {f"{kind}{name}" for name in stored for kind in MADE}
        plain = {name: tensor for name, tensor in patch.tensors.items() if name not in kept}
        values = resolve(plain, backbone.chain, patch.strength)
        with torch.device("meta"):
            self.head = patch.head.build()
        fit = structure.fit | {f"head.{n}": (t.shape, t.is_floating_point()) for n, t in self.head.state_dict().items()}
        check_fit({name: kind for name, kind in fit.items() if name not in made}, values)
        check_head(backbone.chain, patch)
        whole = {name: t.to(backbone.device) for name, t in values.items() if not t.is_floating_point()}
        layout, size = structure.layout(patch.head, made.keys() | whole.keys())
        flat = torch.zeros(size, device=backbone.device)
        for name, shape, at in itertools.chain.from_iterable(layout):
            flat[at : at + shape.numel()].copy_(values[name].reshape(-1))
        self.nbytes = flat.nbytes + sum(t.nbytes for t in whole.values()) + sum(w.nbytes for w in made.values())
        self.parts = tuple(
            BoundPart(template, flat, entries, structure.own(whole, part), structure.own(made, part), patch.strength)
            for part, (template, entries) in enumerate(zip(structure.templates, layout[:-1], strict=True))
        )
        head = view_flat(flat, layout[-1]) | structure.own(whole, len(self.parts))
        self.head.load_state_dict({name.removeprefix("head."): one for name, one in head.items()}, assign=True)
        self.head.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The task's answer, logits (B, K) for classes, for images (B, C, H, W) that are normalised by `preprocessing`."""
        self.backbone.chain.prepare(images)
        return self.head(self.reading.run(self._chain, images))

    @cached_property
    def _chain(self) -> list[ChainPart]:
        frozen, found = self.templates.frozen, list[ChainPart]()
        for link in self.path:
            own = [frozen.module(index) for index in range(*link.span)]
            if not isinstance(link, BoundPart):
                found.append(ChainPart(*link.span, *own))
                continue
            base = partial(run_in_pieces, own, [0] * len(own), tuning=Tuning()) if self.reading.both else None
            found.append(ChainPart(*link.span, link, base))
        return found

    @cached_property
    def path(self) -> tuple[Link, ...]:
        """The variants and the segments between them, in the order of the chain."""
        links: list[Link] = [*self.templates.segments]
        for part in reversed(self.parts):
            links[slice(*part.span)] = [part]
        return tuple(links)


def view_flat(flat: Tensor, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Views of the entries of a flat tensor, by name."""
    return {name: flat[at : at + shape.numel()].view(shape) for name, shape, at in entries}
