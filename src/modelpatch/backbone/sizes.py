"""The cuts of a network at every size of images that it has run."""

import threading
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.cuts import Cutter, Run
from modelpatch.backbone.record import ROWS, Call, Recording, Value
from modelpatch.backbone.steps import Bundle, Programs, SegmentProgram, Shared, Steps, names_of
from modelpatch.errors import BackboneError, UntraceableBackboneError

Shape = tuple[int, ...]


class Cuts:
    """The runs of a network at one size of images, each with what it needs beside its input."""

    def __init__(self, module: nn.Module, recording: Recording, runs: list[Run], rest: Run | None) -> None:
        if not runs:
            raise UntraceableBackboneError(f"{type(module).__name__} has nothing before its classifier")
        self.recording, self.runs, self.rest = recording, runs, rest
        self.shared = Shared(module, recording)
        self.all = (*runs, rest) if rest else tuple(runs)
        self._needs = [self.shared.needs(run.calls) for run in self.all]
        self._readers = Counter(id(call) for needs in self._needs for call in needs)

    @property
    def names(self) -> list[str]:
        """A name for each run: that of its first module, else of its last function."""
        names = list[str]()
        for run in self.runs:
            modules = [call.name for call in run.calls if isinstance(call.target, str)]
            name = base = modules[0] if modules else run.calls[-1].name
            number = 0
            while name in names:
                number += 1
                name = f"{base}_{number}"
            names.append(name)
        return names

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of the image and of every run's output, without batch axis."""
        return [self._bundle(run.sources).shape for run in self.runs] + [self._bundle(self.runs[-1].results).shape]

    def _bundle(self, numbers: frozenset[int]) -> Bundle:
        return Bundle.of(numbers, self.recording.values, ROWS[0])

    def plain(self, place: int) -> str | None:
        """The name of the module that a run is, if it is the call of one with its input alone."""
        run = self.all[place]
        call = run.calls[0]
        alone = len(run.calls) == len(run.sources) == 1 and isinstance(call.target, str) and call.bare
        return str(call.target) if alone and call.arguments == ((Value(next(iter(run.sources))),), {}) else None

    def program(self, place: int) -> SegmentProgram:
        """The calls of a run: those of the image, and those without it that are not shared."""
        run, own = self.all[place], [call for call in self._needs[place] if self._is_own(call)]
        calls = tuple(sorted((*run.calls, *own), key=self.shared.order))
        made = {number for call in own for number in call.makes}
        read = {slot.number for call in calls for slot in call.slots if isinstance(slot, Value)}
        constants = tuple(sorted((read & self.shared.makers.keys()) - made))
        return SegmentProgram(calls, constants, self._bundle(run.sources), self._bundle(run.results), self.shared)

    def named(self, place: int) -> list[str]:
        """The modules and tensors that a run holds: all it needs but for what other runs need too."""
        alone = [call for call in self._needs[place] if self._readers[id(call)] == 1]
        return names_of([*self.all[place].calls, *alone])

    @property
    def tables(self) -> dict[str, Tensor]:
        """The network's tensors that only calls read which several runs need, by name."""
        shared = [call for needs in self._needs for call in needs if self._readers[id(call)] > 1]
        state = {**dict(self.shared.module.named_parameters()), **dict(self.shared.module.named_buffers())}
        read = names_of(shared)
        held = {name for place in range(len(self.all)) for name in self.named(place)}
        return {name: tensor for name, tensor in state.items() if _is_under(name, read) and not _is_under(name, held)}

    def _is_own(self, call: Call) -> bool:
        """True for a call that makes its tensor of parameters, for one run, or one that is written later."""
        if call.makes & self.recording.written:
            return True
        parameters = dict(self.shared.module.named_parameters())
        read = names_of([call, *self.shared.needs([call])])
        trains = any(_is_under(name, read) for name in parameters)
        return trains and self._readers[id(call)] == 1


def _is_under(name: str, others: Collection[str]) -> bool:
    """True for one of these names, and for a tensor of a module of that name."""
    return any(name == other or name.startswith(f"{other}.") for other in others)


class Sizes:
    """Programs of a network's `Steps` at every size of images, added as sizes are met. Thread-safe.

    `example` (N, C, H, W) says which device, dtype and size images have. `parts` are (name, module) of every run.
    """

    def __init__(self, cutter: Cutter, example: Tensor) -> None:
        self._cutter, self._example = cutter, example[:0]
        self._steps: dict[int, Programs] = {}
        self._known = {tuple(example.shape[1:])}
        self._lock = threading.Lock()
        cuts = self._cut(cutter.module, tuple(example.shape[1:]))
        self.names, self.shapes, self.tables = cuts.names, cuts.shapes, cuts.tables
        parts = [self._part(cuts, place) for place in range(len(cuts.all))]
        self._plain = {place: name for place in range(len(cuts.all)) if (name := cuts.plain(place)) is not None}
        self.parts = list(zip(self.names, parts, strict=False))
        self.rest = parts[-1] if cuts.rest else nn.Identity()

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, which is this process's own."""
        return {name: one for name, one in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @torch.inference_mode(False)
    def prepare(self, images: Tensor) -> None:
        """Add the programs for images (B, C, H, W) of a new size.

        Raises `BackboneError` for one that is cut differently, or that segments cannot tell from a size before.
        """
        shape = tuple(images.shape[1:])
        if shape in self._known:
            return
        with self._lock:
            if shape not in self._known:
                # a clone, since other threads may run the network, or somebody may have put it into train mode
                try:
                    cuts = self._cut(clone_module(self._cutter.module), shape)
                except (RuntimeError, AssertionError, TypeError, ValueError, LookupError):
                    if self._steps:
                        raise
                    self._known.add(shape)  # the own run of a chain of modules alone says better what does not fit
                    return
                plain = {place: cuts.plain(place) for place in self._plain if place < len(cuts.all)}
                if cuts.names != self.names or plain != self._plain:
                    raise BackboneError(
                        f"the network is cut differently for images of shape {shape}, and cannot run them."
                    )
                programs = {place: cuts.program(place) for place in self._steps}
                if not all(self._steps[place].takes(program) for place, program in programs.items()):
                    raise BackboneError(
                        f"images of shape {shape} cannot be told from those of another size that the chain has run: inside "
                        "the network both have as many positions, in other places. Load the backbone once more for them."
                    )
                for place, program in programs.items():
                    self._steps[place][program.sources.shape] = program
                self._known.add(shape)

    def _cut(self, module: nn.Module, shape: Shape) -> Cuts:
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(rows, *shape, generator=generator).to(self._example) for rows in ROWS)
        images = [first, torch.cat([first[:1], second[1:]])]
        return Cuts(module, *self._cutter.cut(module, images))

    def _part(self, cuts: Cuts, place: int) -> nn.Module:
        """The module of a run."""
        if (name := cuts.plain(place)) is not None:
            return self._cutter.module.get_submodule(name)
        steps, program = Steps(self._cutter.module, cuts.named(place)), cuts.program(place)
        steps.programs[program.sources.shape] = program
        self._steps[place] = steps.programs
        return steps
