"""Folders of masks under any name, told by what lies in them.

Beside a folder of photos lies one with pictures of the same names and sizes, of a few values each: img/ and lbl/, x/ and y/.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modelpatch.backbone.listing import list_folder
from modelpatch.backbone.preprocessing import UNREADABLE, is_picture
from modelpatch.data.sources.split_names import split_of

MOST_FOLDERS = 16  # with pictures in them; more are classes
MOST_COLOURS = 32  # of a mask
SAMPLES = 3  # masks of a folder that are opened
LOSSY = frozenset({"JPEG", "MPO", "WEBP", "AVIF"})
EDGE, HARD = 24, 0.95  # of a lossy mask, so many of its pixels are so near to black or white
SHARED = 0.8  # of the masks, so many have the name of a photo


def find_mask_folders(path: Path, plain: Callable[[str], str]) -> dict[Path, Path]:
    """The folder of photos of each folder of masks below a folder; empty where no two folders look so.

    A pair lies in one folder, or its two folders lie at the same place below two folders: IMG/train and LBL/train. `plain`
    makes one name of the stems of a photo and its mask.
    """
    listings = [one for one in list_folder(path).below() if any(is_picture(file.name) for file in one.files)]
    if not 2 <= len(listings) <= MOST_FOLDERS:
        return {}
    pictures = {one.path: [file for file in one.files if is_picture(file.name)] for one in listings}
    found: dict[Path, Path] = {}
    for masks, own in pictures.items():
        twins = [other for other in pictures if other != masks and _are_beside(masks, other)]
        pairs = {other: list(_pairs(pictures[other], own, plain)) for other in twins}
        fitting = [
            other for other, both in pairs.items() if len(both) >= SHARED * len(own) and _are_masks(both[:SAMPLES])
        ]
        if len(fitting) == 1:
            found[masks] = fitting[0]
    return found if not set(found) & set(found.values()) else {}


def _are_beside(one: Path, other: Path) -> bool:
    """Return True for paths that differ in one folder's name, which tells of the same split."""
    pairs = [(a, b) for a, b in zip(one.parts, other.parts, strict=False) if a != b]
    return len(one.parts) == len(other.parts) and len(pairs) == 1 and split_of(pairs[0][0]) == split_of(pairs[0][1])


def _pairs(photos: Sequence[Path], masks: Sequence[Path], plain: Callable[[str], str]) -> Iterator[tuple[Path, Path]]:
    """The photo of each mask, with it, where it has one."""
    by_name = {plain(file.stem): file for file in photos}
    yield from ((photo, mask) for mask in masks if (photo := by_name.get(plain(mask.stem))))


def _are_masks(pairs: Sequence[tuple[Path, Path]]) -> bool:
    """Return True where every second picture is of a few values, every first one is not, and they are of one size."""
    looks = [(_look(photo), _look(mask)) for photo, mask in pairs]
    known = [(photo, mask) for photo, mask in looks if photo is not None and mask is not None]
    same = bool(known) and all(photo[0] == mask[0] and not photo[1] and mask[1] for photo, mask in known)
    return same and any(mask[2] for _, mask in known)


def has_few_colours(file: Path) -> bool:
    """Return True for a picture of as few colours as a mask has."""
    look = _look(file)
    return look is not None and look[1]


def _look(file: Path) -> tuple[tuple[int, int], bool, bool] | None:
    """A picture's size, if it has few colours, and if it has several; None for one that cannot be read."""
    try:
        with Image.open(file) as picture:
            lossy, size = picture.format in LOSSY, picture.size
            values = np.asarray(picture.convert("L") if lossy else picture)
    except (*UNREADABLE, OSError):
        return None
    if lossy:
        near = (values <= EDGE) | (values >= 255 - EDGE)
        return size, bool(near.mean() >= HARD), bool(values.min() <= EDGE < values.max())
    colours = np.unique(values.reshape(-1, values.shape[2]) if values.ndim == 3 else values.ravel(), axis=0)
    return size, len(colours) <= MOST_COLOURS, len(colours) > 1
