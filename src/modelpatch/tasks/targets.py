"""Targets of dense tasks: read from disk when they are needed, framed and augmented with their image.

image  ─ resize, crop ─ random view ─ network ─ answer ─┐
target ─ the same ──────────────────────────────────────┴ loss
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing

Allocate = Callable[[tuple[int, ...]], Tensor]  # makes an empty uint8 tensor


class TargetStore(Protocol):
    """The targets of a split as its images are seen. `matrices` (B, 2, 3) are those of `Augmentation.matrices`."""

    def add(self, row: int, image: Image.Image) -> None:
        """Read the target of an image, which is given upright and in its own size."""

    def plain(self, rows: Tensor) -> Any:
        """Targets of images as they are."""

    def augmented(self, rows: Tensor, matrices: Tensor) -> Any:
        """Targets of augmented views."""


class Target(ABC):
    """The target of one image, undecoded."""

    @abstractmethod
    def content(self) -> bytes:
        """Bytes that identify the target."""

    @classmethod
    @abstractmethod
    def open(cls, targets: Sequence[Any], preprocessing: Preprocessing, allocate: Allocate) -> TargetStore:
        """An empty store for targets of this class."""


def source_name(source: ImageSource) -> str:
    """The name of a target's file for messages."""
    return str(source) if isinstance(source, str | Path) else "the mask"
