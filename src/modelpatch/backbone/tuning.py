"""Settings of the computation of frozen segments, and the frozen copies that follow them.

Settings follow a rule by device and architecture, or come from the user or a file that `modelpatch tune` wrote. A frozen
module costs the bytes of all weights it reads, so the backbone's segments are frozen as they are first used, and a patch's
variants only where the engine's budget has room.
"""

import json
import threading
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Self

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.backbone.clone import clone_module
from modelpatch.errors import BackboneError, EngineError
from modelpatch.plain_files import read_plain
from modelpatch.text import first_line

Module = Callable[[Tensor], Tensor]
CACHE = 2 * 2**20
FEW_ROWS = 16


@dataclass(frozen=True)
class Tuning:
    """Settings of an engine; the defaults change nothing: every segment then runs as it is."""

    channels_last: bool = False  # activations lie pixel by pixel instead of channel by channel
    fold: bool = False  # BatchNorm is folded into the convolution before it, in a frozen copy of the segment
    bfloat16: bool = False  # segments compute in 16 bits; only where allowed, since answers change in the third digit
    compile: str = ""  # a backend of `torch.compile` ("inductor") that compiles segments; only where the user says so
    piece_bytes: int = 0  # bytes of the activations of a piece of a large batch, which then stay in the caches
    merge_rows: int = 0  # streams of at most this many rows are concatenated where they meet the same module
    measured: tuple[str, ...] = field(default=(), compare=False)
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Raises `EngineError` for negative sizes."""
        for name in ("piece_bytes", "merge_rows"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise EngineError(f"{name}={value!r}; expected a whole number from 0 on.")

    @classmethod
    def of(cls, backbone: Backbone, *, bfloat16: bool = False, device: torch.device | None = None) -> Self:
        """Settings for a backbone by a rule, the same on a busy machine and at rest.

        Channels-last activations where most blocks convolve, folding where there is BatchNorm; on a CPU with convolutions
        pieces of 2 MiB, whose activations stay in the caches; streams of up to 16 rows are concatenated.
        `bfloat16` allows 16 bits where the `device`, by default the backbone's, computes in them.
        """
        place = device or backbone.device
        blocks = backbone.chain.blocks or backbone.chain
        convolving = [block for block in blocks if any(isinstance(one, nn.Conv2d) for one in block.module.modules())]
        convolves = 2 * len(convolving) > len(blocks)
        return cls(
            channels_last=convolves,
            fold=any(isinstance(module, _BatchNorm) for module in backbone.module.modules()),
            bfloat16=bfloat16 and has_bfloat16(place),
            piece_bytes=CACHE if convolves and place.type == "cpu" else 0,
            merge_rows=FEW_ROWS,
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read settings that `save` wrote. Raises `EngineError` for a file that is missing or holds something else."""
        try:
            return TypeAdapter(cls).validate_json(read_plain(path))
        except (OSError, ValidationError) as error:
            problem = first_line(error) if isinstance(error, OSError) else error.errors()[0]["msg"]
            made = "`modelpatch tune` makes such a file"
            raise EngineError(f"{path} holds no settings of an engine: {problem}. {made}.") from error

    def save(self, path: str | Path) -> Path:
        """Write the settings as JSON, whole or not at all."""
        write_bytes(Path(path), (json.dumps(asdict(self), indent=2) + "\n").encode())
        return Path(path)

    @property
    def plain(self) -> bool:
        """True if modules run as they are."""
        return not (self.channels_last or self.fold or self.bfloat16 or self.compile)

    def __str__(self) -> str:
        chosen = [name for name in ("channels_last", "fold", "bfloat16") if getattr(self, name)]
        chosen += [f"compiled by {self.compile}"] if self.compile else []
        chosen += [f"pieces of {self.piece_bytes / 2**20:.0f} MiB"] if self.piece_bytes else []
        chosen += [f"streams of up to {self.merge_rows} rows concatenated"] if self.merge_rows else []
        return "\n".join(["tuning: " + (", ".join(chosen) or "plain"), *self.measured])


def has_bfloat16(device: torch.device) -> bool:
    """True for a device that computes in bfloat16: a GPU, or a CPU with AVX-512 BF16 or AMX."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type != "cpu" or any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def run_in_pieces(modules: Sequence[Module], widths: Sequence[int], x: Tensor, tuning: Tuning) -> Tensor:
    """The modules one after another on `x` (B, ...), in pieces of the batch that `tuning` lets stay in the caches.

    `widths` are the bytes a row of each module's larger side. Pieces grow along the way, as activations become narrower.
    """
    for start, end, rows in _cuts(widths, tuning):
        outputs = []
        for piece in x.split(rows) if 0 < rows < len(x) else (x,):
            for module in modules[start:end]:
                piece = module(piece)
            outputs.append(piece)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return x


def _cuts(widths: Sequence[int], tuning: Tuning) -> list[tuple[int, int, int]]:
    """(start, end, rows of a piece) of runs of modules: a new run where twice as many rows fit, or fewer. 0 rows are all."""
    if not tuning.piece_bytes:
        return [(0, len(widths), 0)]
    cuts: list[tuple[int, int, int]] = []
    for place, width in enumerate(widths):
        fitting = max(tuning.piece_bytes // max(width, 1), 1)
        start, _, rows = cuts[-1] if cuts else (0, 0, 0)
        if rows <= fitting < 2 * rows:
            cuts[-1] = (start, place + 1, rows)
        else:
            cuts.append((place, place + 1, fitting))
    return cuts


def lay(x: Tensor, tuning: Tuning) -> Tensor:
    """Images and feature maps in the memory format that the tuning wants; other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if tuning.channels_last and x.ndim == 4 else x


@torch.inference_mode(False)
@torch.no_grad()
def freeze(module: nn.Module, example: Tensor, tuning: Tuning) -> Module | None:
    """A copy for inference as `tuning` says; None for a module that does not compute the same when frozen.

    The module is in eval mode, `example` (2, ...) an input of it. Both are compared on it, on one row of it, and on more.
    """
    dtype = torch.bfloat16 if tuning.bfloat16 else torch.float32
    copy = deepcopy(module).eval().requires_grad_(False).to(dtype)
    if tuning.channels_last:
        copy = copy.to(memory_format=torch.channels_last)
    if tuning.compile:
        return _compile(copy, lay(example, tuning).to(dtype), tuning)
    if not tuning.fold:
        return casting(copy, tuning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen = torch.jit.freeze(torch.jit.trace(copy, lay(example, tuning).to(dtype), check_trace=False))
            for x in (example, example[:1], torch.cat([example, example, example])):
                expected, given = module(x), frozen(lay(x, tuning).to(dtype)).float()
                allowed = (2e-2 if tuning.bfloat16 else 1e-4) * expected.abs().max().clamp(min=1e-6)
                if given.shape != expected.shape or not (given - expected).abs().max() <= allowed:  # NaN is not
                    return None
    except (RuntimeError, TypeError, ValueError, LookupError):
        return None
    return casting(frozen, tuning)


def _compile(module: nn.Module, example: Tensor, tuning: Tuning) -> Module:
    """Compiled and run once, so that what is missing is found now. Raises `BackboneError`."""
    try:
        compiled = torch.compile(module, backend=tuning.compile, dynamic=True)
        compiled(example)
    except Exception as error:
        raise BackboneError(
            f"torch.compile with the backend {tuning.compile!r} fails here: {first_line(error)}. Its default, inductor, needs "
            'a C++ compiler. Leave compile="" to trace instead.'
        ) from error
    return casting(compiled, tuning)


def casting(module: Module, tuning: Tuning, dtype: torch.dtype = torch.bfloat16) -> Module:
    """The module for inputs of either precision, computing in `dtype`; as it is where nothing computes in 16 bits."""
    return (lambda x: module(x.to(dtype))) if tuning.bfloat16 else module


class FrozenBackbone:
    """The backbone's segments, frozen one by one as they are first run."""

    def __init__(self, backbone: Backbone, tuning: Tuning) -> None:
        self._chain, self._device, self.tuning = backbone.chain, backbone.device, tuning
        self._modules: dict[int, Module] = {}
        self._shared: set[int] = set()  # those that cost no bytes
        self._lock = threading.Lock()

    def module(self, index: int) -> Module:
        """The module that runs segment `index`."""
        if index not in self._modules:
            with self._lock:
                if index not in self._modules:
                    self._modules[index] = self._make(self._chain[index])
        return self._modules[index]

    def _make(self, segment: Segment) -> Module:
        clone = clone_module(segment.module)  # in eval mode whatever becomes of the backbone's own module
        if self.tuning.plain or next(clone.parameters(), None) is None:
            self._shared.add(segment.index)
            return clone
        frozen = freeze(clone, sample(segment.input_shape, self._device), self.tuning)
        if frozen is None:
            self._shared.add(segment.index)
            return casting(clone, self.tuning, torch.float32)
        return frozen

    def run(self, images: Tensor, end: int) -> Tensor:
        """The output of segments `[0, end)` for images (B, C, H, W), in the pieces that the tuning asks for."""
        self._chain.prepare(images)
        modules = [self.module(index) for index in range(end)]
        widths = [4 * max(prod(segment.input_shape), prod(segment.output_shape)) for segment in self._chain[:end]]
        return run_in_pieces(modules, widths, lay(images, self.tuning), self.tuning).float()

    @property
    def nbytes(self) -> int:
        """Bytes of the frozen copies."""
        made = [self._chain[index] for index in self._modules.keys() - self._shared]
        return sum(tensor.nbytes for segment in made for _, tensor in segment.named_tensors())


def sample(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Two rows of noise of this shape, always the same."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
