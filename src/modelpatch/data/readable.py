"""Images that can be read: every one of a split is decoded once, and rows of others are left out and named."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.seeding import seeded
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.kind import Target

UNREADABLE = "image that cannot be read"
AT_ONCE = 256


def keep_readable(split: Split, name: str) -> tuple[Split, list[str]]:
    """The rows of a split whose image and target can be decoded, and the names of the others.

    Raises `DataError` for a stream, whose images are read while it is trained on, and where no image can be read.
    """
    if split.is_stream:
        raise DataError(
            f"the split {name} is a stream, whose images cannot be looked at beforehand. Leave skip_unreadable out."
        )
    if split.reads_in_threads:
        rows, good = range(len(split)), list[bool]()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(split), AT_ONCE):
                good += pool.map(lambda row: _is_readable(split, row), rows[start : start + AT_ONCE])
    else:
        good = [_is_readable(split, row) for row in range(len(split))]
    if all(good):
        return split, []
    lost = [row for row, kept in enumerate(good) if not kept]
    if len(lost) == len(split):
        raise DataError(
            f"none of the {len(lost):,} images of the split {name} can be read, first {_name(split, name, 0)}."
        )
    return split.take(np.flatnonzero(good)), [_name(split, name, row) for row in lost]


def _is_readable(split: Split, row: int) -> bool:
    try:
        with nullcontext() if split.reads_in_threads else seeded(0, row):
            image, target = split[row]
            picture = open_image(image)
            if isinstance(target, Target):
                target.content()
            return min(picture.size) > 0
    except DataError:
        return False


def _name(split: Split, name: str, row: int) -> str:
    image = split.images[row] if split.reads_in_threads else None
    return str(image) if isinstance(image, str | Path) else f"{name}, row {row}"
