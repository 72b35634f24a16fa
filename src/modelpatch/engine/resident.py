"""A patch bound to its backbone at the cost of its own bytes, among hundreds that share one structure.

BoundPatch: tensors in one flat tensor
    parts[0]   variant of segments [3, 4)    -- binds its tensors to -->  a template, see `template.py`
    parts[1]   variant of segments [7, 8)    -- binds ...
    head
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.engine.template import HEAD, PartTensors, Structure, Template, Templates
from modelpatch.errors import WrongBackboneError
from modelpatch.heads.reading import ChainPart, Reading
from modelpatch.patch.changes import MADE, StoredWeight, resolve
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import check_fit, check_head


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
        *parts, head = self._load(structure, patch)
        self.parts = tuple(BoundPart(template, own) for template, own in zip(structure.templates, parts, strict=True))
        with torch.device("meta"):
            self.head = patch.head.build()
        self.head.load_state_dict({name.removeprefix("head."): one for name, one in head.load().items()}, assign=True)
        self.head.eval().requires_grad_(False)

    def _load(self, structure: Structure, patch: Patch) -> list[PartTensors]:
        """Check the patch's tensors and lay them out: one for each part, the head's last."""
        chain, device = self.backbone.chain, self.backbone.device
        stored = StoredWeight.collect(patch.tensors, self.backbone, patch.strength)
        made = {f"replace/{name}": weight for name, weight in stored.items()}
        kept = {f"{kind}{name}" for name in stored for kind in MADE}
        plain = {name: tensor for name, tensor in patch.tensors.items() if name not in kept}
        values = resolve(plain, chain, patch.strength)
        check_fit({n: s for n, s in {**structure.shapes, **patch.head.shapes()}.items() if n not in made}, values)
        check_head(chain, patch)
        whole = {name: t.to(device) for name, t in values.items() if not t.is_floating_point()}
        layout = structure.layout(patch.head, made.keys() | whole.keys())
        flat = layout.fill(values, device)
        self.nbytes = flat.nbytes + sum(t.nbytes for t in whole.values()) + sum(w.nbytes for w in made.values())
        return [
            PartTensors(
                flat,
                layout.entries[part],
                {name: tensor for name, tensor in whole.items() if structure.owner(name) == part},
                {name: weight for name, weight in made.items() if structure.owner(name) == part},
                patch.strength,
            )
            for part in (*range(len(structure.templates)), HEAD)
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The task's answer, logits (B, K) for classes, for images (B, C, H, W) that are normalised by `preprocessing`."""
        return self.head(self.reading.run(self._chain, images))

    @cached_property
    def _chain(self) -> list[ChainPart]:
        found: list[ChainPart] = []
        for one in self.path():
            if isinstance(one, int):
                found.append(ChainPart(one, one + 1, self.templates.segment(one)))
                continue
            base = nn.Sequential(*map(self.templates.segment, range(*one.span))) if self.reading.both else None
            found.append(ChainPart(*one.span, one, base))
        return found

    def path(self) -> Iterator[BoundPart | int]:
        """The variants and the numbers of the segments between them, in the order of the chain."""
        at = 0
        for part in self.parts:
            yield from range(at, part.span[0])
            yield part
            at = part.span[1]
        yield from range(at, len(self.backbone.chain))


class BoundPart:
    """One variant of a bound patch, and a link of plans: it stands in for the segments `[span[0], span[1])`."""

    def __init__(self, template: Template, tensors: PartTensors) -> None:
        self.template, self.tensors, self.own = template, tensors, True
        self.span, self.name = template.span, template.name
        self.nbytes, self.output_bytes = template.nbytes, template.output_bytes

    @cached_property
    def key(self) -> str:
        """A hash of the structure and the tensors: equal for variants that compute the same."""
        return hashlib.sha256(self.template.key(self.tensors).encode()).hexdigest()

    @property
    def macs(self) -> int:
        """Multiply-adds for one image of the backbone's input size."""
        return self.template.count_macs(self.tensors)

    @property
    def made_bytes(self) -> int:
        """Bytes of the weights that are made from masks at every call; 0 for a part without masks."""
        return sum(weight.weight.nbytes for weight in self.tensors.made.values())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.template.run(self.tensors, x)

    def make(self) -> nn.Module:
        """The variant as a module of its own, in eval mode; frozen tensors stay the backbone's bytes."""
        return self.template.copy_with(self.tensors)
