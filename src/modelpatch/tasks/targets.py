"""Targets of dense tasks: read from disk when they are needed, framed and augmented with their image.

image  ─ resize, crop ─ random view ─ network ─ answer ─┐
target ─ the same ──────────────────────────────────────┴ loss
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing


class Target(ABC):
    """The target of one image, undecoded."""

    @abstractmethod
    def content(self) -> bytes:
        """Bytes that identify the target."""

    @abstractmethod
    def frame(self, image: Image.Image, preprocessing: Preprocessing) -> Any:
        """The target in pixels of the framed image, `resize_to` a side. `image` is upright and in its own size."""

    @staticmethod
    @abstractmethod
    def batch(framed: Sequence[Any], preprocessing: Preprocessing, matrices: Tensor | None) -> Any:
        """Framed targets as a batch: of centre crops, or of the views that `Augmentation.matrices` (B, 2, 3) give."""


def source_name(source: ImageSource) -> str:
    """The name of a target's file for messages."""
    return str(source) if isinstance(source, str | Path) else "the mask"
