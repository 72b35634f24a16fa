"""Checks of the images that an engine is given: a batch, batches by preprocessing, or files and pictures."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modelpatch.backbone.preprocessing import ImageSource, Preprocessing
from modelpatch.engine.steps import Batches
from modelpatch.errors import EngineError

Images = Tensor | Mapping[Preprocessing, Tensor] | Sequence[ImageSource]


def make_batches(images: Images, kinds: Mapping[str, Preprocessing], device: torch.device) -> dict[Hashable, Tensor]:
    """The images by root, on the device: one for a batch that is given (None), else one for every preprocessing.

    `kinds` are the preprocessings of the tasks that ask. Raises `EngineError` for anything but images, and for images
    that do not fit a task.
    """
    if isinstance(images, Tensor):
        check_batch(images, "images")
        _check_alike(kinds)
        return {None: images.to(device)}
    if not isinstance(images, Mapping):
        return {kind: batch.to(device) for kind, batch in read(images, kinds.values()).items()}
    missing = [task for task, kind in kinds.items() if kind not in images]
    if missing:
        said = f"there are no images for the preprocessing of: {', '.join(missing)}."
        raise EngineError(said, "engine.read(files) makes them all.")
    for task, kind in kinds.items():
        check_batch(images[kind], f"the images of {task}")
        if images[kind].shape[1:] != kind.input_size:
            given = tuple(images[kind].shape[1:])
            raise EngineError(f"the images of {task} have shape {given}; its preprocessing gives {kind.input_size}.")
    counts = sorted({len(images[kind]) for kind in kinds.values()})
    if len(counts) > 1:
        raise EngineError(f"the batches hold {', '.join(map(str, counts))} images; expected the same number in each.")
    return {kind: images[kind].to(device) for kind in dict.fromkeys(kinds.values())}


def read(sources: Sequence[ImageSource], kinds: Iterable[Preprocessing]) -> dict[Preprocessing, Tensor]:
    """Files and pictures as each preprocessing sees them: batches (B, 3, S, S). Raises `EngineError`, `DataError`."""
    check_sources(sources)
    return {kind: kind(*sources) if len(sources) else torch.zeros(0, *kind.input_size) for kind in dict.fromkeys(kinds)}


def check_sources(sources: object) -> None:
    """Raises `EngineError` for anything but a sequence of files and pictures."""
    single = isinstance(sources, str | Path | bytes | Image.Image | np.ndarray)
    if single or not isinstance(sources, Sequence):
        given = f"one {type(sources).__name__}" if single else f"a {type(sources).__name__}"
        raise EngineError(
            f"images are {given}; expected a list of files or pictures, normalised floats (B, 3, H, W), or what "
            "engine.read(files) gives."
        )


def check_batch(images: object, name: str) -> None:
    """Raises `EngineError` unless these are normalised images."""
    if not isinstance(images, Tensor):
        raise EngineError(f"{name} are a {type(images).__name__}; expected normalised floats (B, 3, H, W).")
    sized = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0
    if not sized or images.dtype != torch.float32:
        raise EngineError(
            f"{name} are a {images.dtype} tensor of shape {tuple(images.shape)}; expected normalised floats (float32) "
            "(B, 3, H, W), or a list of files or pictures."
        )


def _check_alike(kinds: Mapping[str, Preprocessing]) -> None:
    first: dict[Hashable, str] = {}
    for task, kind in kinds.items():
        first.setdefault((kind.mean, kind.std), task)
    if len(first) > 1:
        raise EngineError(
            f"{' and '.join(list(first.values())[:2])} normalise images differently, so one batch cannot be right for "
            "both. Give files or pictures, engine.read(files), or only=[...]."
        )


def count_rows(batches: Batches) -> int:
    """The number of images."""
    return len(next(iter(batches.values()))) if batches else 0


def check_names(given: Iterable[str] | None, option: str) -> list[str] | None:
    """The names in a list. Raises `EngineError` for a single text, which is most likely a mistake."""
    if isinstance(given, str):
        raise EngineError(f"{option}={given!r} is one text; expected a list of task names: {option}=[{given!r}].")
    if given is not None and not isinstance(given, Iterable):
        raise EngineError(f"{option}={given!r} is a {type(given).__name__}; expected a list of task names.")
    return None if given is None else list(given)
