"""Images with masks: `SPLIT/images/*` with `SPLIT/labels/*.png` (or `masks/`) of the same stem, or the same without splits.

Names of classes are listed in `classes.txt` or `labels.txt`, one a line, or are given. The value 255 is never a class.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource, find_images
from modelpatch.data.sources.base import DataSource, Found, SourceOptions, register_source, split_folders
from modelpatch.data.splits import Lazy, Split
from modelpatch.errors import DataError, warn_caller
from modelpatch.tasks.segmentation import IGNORED, UNKNOWN, PixelMask, Segmentation, read_values

MASK_FOLDERS = ("labels", "masks")
Pairs = tuple[Sequence[ImageSource], Sequence[ImageSource]]  # images and their masks


@register_source("masks")
class MaskFolders(DataSource):
    """A folder of images beside a folder of masks, for each split or alone."""

    kind = Segmentation.name

    def accepts(self, source: Any) -> bool:
        roots = split_folders(Path(source)) if Path(source).is_dir() else {}
        return bool(roots) and all((root / "images").is_dir() and _mask_folder(root) for root in roots.values())

    def read(self, source: Any, options: SourceOptions) -> Found:
        path = Path(source)
        pairs = {split: _pair_up(root / "images", _mask_folder(root)) for split, root in split_folders(path).items()}
        return make_segmentation(pairs, options, options.class_names(path), str(path))


def _mask_folder(root: Path) -> Path | None:
    return next((root / name for name in MASK_FOLDERS if (root / name).is_dir() and find_images(root / name)), None)


def _pair_up(images: Path, masks: Path | None) -> Pairs:
    assert masks is not None
    by_stem = {file.relative_to(masks).with_suffix(""): file for file in find_images(masks)}
    files = find_images(images)
    stems = [file.relative_to(images).with_suffix("") for file in files]
    if missing := [stem for stem in stems if stem not in by_stem]:
        raise DataError(
            f"{masks} has no mask for {len(missing)} of {len(files)} images of {images}, first {missing[0]}. Expected one of "
            "the same stem for each."
        )
    return files, [by_stem[stem] for stem in stems]


def make_segmentation(
    pairs: Mapping[str, Pairs], options: SourceOptions, names: Sequence[str] | None, source: str
) -> Found:
    """A task whose classes are `names`, but for the value to ignore; without names, the values in the training masks."""
    for mask in (mask for _, masks in pairs.values() if isinstance(masks, list) for mask in masks):
        if isinstance(mask, Path) and not mask.is_file():
            raise DataError(f"{source}: there is no mask {mask}.")
    classes, table = read_classes(pairs.get("train", ((), ()))[1], options, names, source)
    splits = {
        split: Split(images, np.zeros(len(images), dtype=np.int64), Lazy(masks, partial(PixelMask, table=table)))
        for split, (images, masks) in pairs.items()
    }
    return Found(Segmentation.name, splits, classes, names_from_user=True)


def read_classes(
    masks: Sequence[ImageSource], options: SourceOptions, names: Sequence[str] | None, source: str
) -> tuple[list[str], np.ndarray]:
    """The class names of masks, and the table (256,) from their values to class indices."""
    ignored = {IGNORED, *([] if options.ignore is None else [options.ignore])}
    if names is None:
        values = sorted({int(value) for mask in masks for value in np.unique(read_values(mask))} - ignored)
        classes = {value: str(value) for value in values}
        shown = ", ".join(classes.values())
        warn_caller(
            f"{source} names no classes, so that each value of its masks is one: {shown}. Name them with --classes "
            "(classes=[...]); a value that means nothing is left out with --ignore (ignore=N)."
        )
    else:
        classes = {value: name for value, name in enumerate(names) if value not in ignored}
    if not classes or len(names or ()) > IGNORED:
        raise DataError(f"{source} has {len(names or ())} classes; expected 1 to {IGNORED}.")
    table = np.full(256, UNKNOWN, dtype=np.int16)
    table[list(ignored)] = IGNORED
    table[list(classes)] = np.arange(len(classes))
    return list(classes.values()), table
