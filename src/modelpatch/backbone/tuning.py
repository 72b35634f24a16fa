"""Settings of the computation of frozen segments: chosen by the engine's measurement, reported, or set by the user.

| setting | what it changes |
|---|---|
| channels_last | activations lie pixel by pixel instead of channel by channel |
| fold | BatchNorm is folded into the convolution before it, in a frozen copy of the segment |
| bfloat16 | segments compute in 16 bits; only where allowed, since answers change in the third digit |
| piece_bytes | large batches go through in pieces whose activations have about this many bytes and stay in the caches |
| compile | segments are compiled by this backend of `torch.compile` ("inductor") instead of being traced; never measured |
| merge_rows | streams of at most this many rows are concatenated where they meet the same module |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelpatch.errors import EngineError

Module = Callable[[Tensor], Tensor]
CACHE = 2 * 2**20


@dataclass(frozen=True)
class Tuning:
    """Settings of an engine; the defaults change nothing: every segment then runs as it is."""

    channels_last: bool = False
    fold: bool = False
    bfloat16: bool = False
    compile: str = ""
    piece_bytes: int = 0
    merge_rows: int = 0
    measured: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Raises `EngineError` for negative sizes."""
        for name in ("piece_bytes", "merge_rows"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise EngineError(f"{name}={value!r}; expected a whole number from 0 on.")

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
