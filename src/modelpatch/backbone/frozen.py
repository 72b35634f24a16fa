"""Frozen copies for inference: BatchNorm folded into the convolution before it, weights with their channels last.

A frozen module costs the bytes of all weights it reads, so the backbone's segments are frozen as they are first used,
and a patch's variants only where the engine's budget has room for them.
"""

from __future__ import annotations

import threading
import warnings
from copy import deepcopy
from math import prod

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Segment
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.tuning import Module, Tuning, lay, run_in_pieces
from modelpatch.errors import BackboneError
from modelpatch.text import first_line


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
                if given.shape != expected.shape or not _close(given, expected, 2e-2 if tuning.bfloat16 else 1e-4):
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


def _close(given: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))


class FrozenBackbone:
    """The backbone's segments, frozen one by one as they are first run."""

    def __init__(self, backbone: Backbone, tuning: Tuning) -> None:
        self._chain, self._device, self.tuning = backbone.chain, backbone.device, tuning
        self._modules: dict[int, Module] = {}
        self._shared: set[int] = set()  # those that cost no bytes
        self._lock = threading.Lock()

    def module(self, index: int) -> Module:
        """The module that runs segment `index`."""
        module = self._modules.get(index)
        if module is None:
            with self._lock:
                if index not in self._modules:
                    self._modules[index] = self._make(self._chain[index])
                module = self._modules[index]
        return module

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
