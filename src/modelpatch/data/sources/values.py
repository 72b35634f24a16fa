"""The meaning of masks: their values or colours as classes, checked over all masks before anything is trained.

255 is ignored, but where masks hold nothing but 0 and 255: then it is the foreground, class 1.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.sources.base import Found, SourceOptions
from modelpatch.data.sources.headers import UPRIGHT, Orientation, Size, find_stored, read_header
from modelpatch.data.sources.legends import Legend
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.splits import Lazy, Split
from modelpatch.errors import DataError, warn_caller
from modelpatch.tasks.segmentation import IGNORED, LARGEST, UNKNOWN, PixelMask, Segmentation, read_values, source_name

BINARY = ("background", "foreground")
BRIGHTEST = (IGNORED, LARGEST)  # the foreground of binary masks, of 8 and 16 bits
UNUSED = "-"  # the name of a value that does not occur
EDGE, MIDDLE = 32, 128  # distance to 0 and 255 of what compression makes of these, and the value that tells them apart
HARD, FEW = 0.9, 8  # share of 0 and 255 in masks with soft edges, which hold more than a few values
LOSSY = ("JPEG", "MPO")
READERS = 4
PROBED = 32  # masks of a split that say if they hold a legend's colours
Pairs = tuple[Sequence[ImageSource], Sequence[ImageSource]]  # images and their masks


@dataclass(frozen=True)
class MaskFacts:
    """The values of a mask with their pixels, and what its file tells."""

    values: Mapping[int, int]
    header: Orientation
    lossy: bool


@dataclass(frozen=True)
class MaskCode:
    """Class names, and the table from a mask's values, or from its colours' rows, to class indices."""

    classes: Sequence[str]
    table: np.ndarray
    colors: np.ndarray | None = None


def make_segmentation(
    pairs: Mapping[str, Pairs],
    options: SourceOptions,
    names: Sequence[str] | None,
    source: str,
    remarks: Remarks | None = None,
    legend: Legend | None = None,
    usual: Sequence[str] | None = None,
) -> Found:
    """A task whose classes are `names`, but for the value to ignore, those of the legend, or the values of the masks.

    Every mask is read: its size is its image's, each of its values has a class, and each of the `names` has pixels. `usual`
    are the names of the layout, for masks that nothing else names.
    """
    remarks, ignored = remarks or Remarks(), _ignored(options)
    colors = _choose_colors(pairs, legend, remarks)
    facts = {split: _look_at(masks, colors) for split, (_, masks) in pairs.items()}
    if legend is None:
        lossy = (pairs[split][1][row] for split, own in facts.items() for row, one in enumerate(own) if one.lossy)
        code = _choose_code(facts, next(lossy, None), ignored, names, usual, source, remarks)
    else:
        code = _code_of_legend(legend, colors, names, ignored, source)
    turns = _check_sizes(pairs, facts, remarks)
    _check_classes(pairs, facts, code, source, complete=names is not None)
    splits = {}
    for split, (images, masks) in pairs.items():
        targets = Lazy(range(len(masks)), partial(_mask_at, masks, turns[split], code))
        splits[split] = Split(images, np.zeros(len(images), dtype=np.int64), targets)
    return Found(Segmentation.name, splits, code.classes, names_from_user=True, **remarks.facts)


def _mask_at(masks: Sequence[ImageSource], turns: Sequence[int], code: MaskCode, row: int) -> PixelMask:
    return PixelMask(masks[row], code.table, code.colors, turns[row])


def read_classes(options: SourceOptions, names: Sequence[str], source: str) -> tuple[list[str], np.ndarray]:
    """The class names of masks, and the table (256,) from their values, which are the places of names, to class indices."""
    code = _make_code(dict(enumerate(names)), {IGNORED} | _ignored(options), source)
    return list(code.classes), code.table


# looking ----------------------------------------------------------------------------------------------------


def _look_at(masks: Sequence[ImageSource], colors: np.ndarray | None) -> list[MaskFacts]:
    """The facts of every mask. Raises `DataError` for one that cannot be read as a mask."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda row: _facts_of(masks[row], colors), range(len(masks))))


def _facts_of(mask: ImageSource, colors: np.ndarray | None) -> MaskFacts:
    values = read_values(mask, colors)
    counts = np.bincount(values.ravel())
    present = np.flatnonzero(counts)
    header = read_header(mask) or Orientation((values.shape[1], values.shape[0]))
    return MaskFacts(
        dict(zip(present.tolist(), counts[present].tolist(), strict=True)), header, _format_of(mask) in LOSSY
    )


def _format_of(mask: ImageSource) -> str | None:
    if isinstance(mask, np.ndarray):
        return None
    if isinstance(mask, Image.Image):
        return mask.format
    with Image.open(io.BytesIO(mask) if isinstance(mask, bytes) else mask) as picture:
        return picture.format


def _choose_colors(pairs: Mapping[str, Pairs], legend: Legend | None, remarks: Remarks) -> np.ndarray | None:
    """The legend's colours, of channels or of a palette; None where masks hold the legend's rows, or there is none."""
    if legend is None or legend.colors is None:
        return None
    some = [own[row] for _, own in pairs.values() for row in range(min(len(own), PROBED))]
    if all(_reads(mask, legend.colors) for mask in some) or not all(
        _reads(mask, None, len(legend.names)) for mask in some
    ):
        return legend.colors
    remarks.note(f"masks hold the rows of {legend.file.name}, from 0 on, and not its colours")
    return None


def _reads(mask: ImageSource, colors: np.ndarray | None, least: int = LARGEST) -> bool:
    """Return True for a mask of these colours, or of values below the least."""
    try:
        return int(read_values(mask, colors).max()) < least
    except DataError:
        return False


# classes ----------------------------------------------------------------------------------------------------


def _choose_code(
    facts: Mapping[str, Sequence[MaskFacts]],
    lossy: ImageSource | None,
    ignored: set[int],
    names: Sequence[str] | None,
    usual: Sequence[str] | None,
    source: str,
    remarks: Remarks,
) -> MaskCode:
    """The classes of values: two of black and white ones, those of the names in order, or each value itself."""
    values = Counter[int]()
    for own in facts.values():
        for one in own:
            values.update(one.values)
    present = sorted(values.keys() - ignored)
    if not present:
        raise DataError(f"{source}: its masks hold nothing but the value to ignore.")
    two = names or BINARY
    if not ignored and (note := _find_soft(values, lossy, names, source)):
        remarks.note(note)
        return MaskCode(list(two), np.where(np.arange(256) < MIDDLE, 0, 1).astype(np.int16))
    brightest = next((value for value in BRIGHTEST if present in ([0, value], [value])), None)
    if brightest is not None and len(two) == 2:
        remarks.note(f"masks hold 0 and {brightest} alone: {brightest} is {two[1]!r}, and nothing is ignored")
        return _make_code(dict(zip((0, brightest), two, strict=True)), ignored, source)
    if names is None and usual and max(set(present) - {IGNORED}, default=0) < len(usual):
        remarks.note("classes are named as those of Pascal VOC; --classes or classes.txt names others")
        names = usual
    if names is None:
        return _name_values(present, ignored, source)
    if len(present) == len(names) and max(set(present) - {IGNORED}, default=0) >= len(names):
        order = ", ".join(f"{value} {name}" for value, name in zip(present, names, strict=True))
        remarks.note(f"masks hold as many values as there are names, which are theirs in order: {order[:300]}")
        return _make_code(dict(zip(present, names, strict=True)), ignored, source)
    return _make_code(dict(enumerate(names)), {IGNORED, *ignored}, source)


def _code_of_legend(
    legend: Legend, colors: np.ndarray | None, names: Sequence[str] | None, ignored: set[int], source: str
) -> MaskCode:
    """The classes of a legend, by their colours or values; `names` take the place of its own."""
    if names is not None and len(names) != len(legend.names):
        raise DataError(
            f"{legend.file} names {len(legend.names)} classes, and {len(names)} are given. Expected as many."
        )
    given = range(len(legend.names)) if legend.values is None else legend.values
    rows = dict(zip(given, names or legend.names, strict=True))
    return _make_code(rows, ignored if colors is not None else {*ignored, IGNORED} - rows.keys(), source, colors)


def _name_values(present: Sequence[int], ignored: set[int], source: str) -> MaskCode:
    """Each value as a class. Raises `DataError` where nothing says if 255 is one."""
    values = [value for value in present if value != IGNORED]
    if IGNORED in present and IGNORED not in ignored and len(values) > 1 and max(values) >= 2 * len(values):
        shown = ", ".join(map(str, present[:10]))
        raise DataError(
            f"{source}: its masks hold {shown}, and nothing says if 255 is a class. Name all of them in this order with "
            f"--classes (classes=[...]), or leave 255 out with --ignore 255 (ignore=255)."
        )
    shown = ", ".join(map(str, values[:20]))
    warn_caller(
        f"{source} names no classes, so that each value of its masks is one: {shown}. Name them with --classes "
        "(classes=[...]); a value that means nothing is left out with --ignore (ignore=N)."
    )
    return _make_code({value: str(value) for value in values}, {IGNORED, *ignored}, source)


def _make_code(rows: Mapping[int, str], ignored: set[int], source: str, colors: np.ndarray | None = None) -> MaskCode:
    """The code of values with a name each, without those that are ignored or not used."""
    kept = {value: name for value, name in sorted(rows.items()) if value not in ignored and name != UNUSED}
    if not kept or len(rows) > IGNORED:
        raise DataError(f"{source} has {len(rows if kept else kept)} classes; expected 1 to {IGNORED}.")
    table = np.full(256 if max(kept) < 256 else 2**16, UNKNOWN, dtype=np.int16)
    table[list(ignored)] = IGNORED
    table[list(kept)] = np.arange(len(kept))
    return MaskCode(list(kept.values()), table, colors)


def _ignored(options: SourceOptions) -> set[int]:
    return set() if options.ignore is None else {options.ignore}


def _find_soft(values: Mapping[int, int], lossy: ImageSource | None, names: Sequence[str] | None, source: str) -> str:
    """A note where masks are black and white with soft edges, and are cut at the middle; empty where they are not.

    `lossy` is a mask of a format that changes values. Raises `DataError` for values that it has blurred beyond that, and for
    soft edges of masks that nothing says to be binary.
    """
    total, extremes = sum(values.values()), values.get(0, 0) + values.get(IGNORED, 0)
    near = sum(pixels for value, pixels in values.items() if value <= EDGE or IGNORED - EDGE <= value <= IGNORED)
    both = min(values) <= EDGE and any(IGNORED - EDGE <= value <= IGNORED for value in values)
    binary, cut = len(names or BINARY) == 2, f"masks are black and white with soft edges, and are cut at {MIDDLE}"
    if lossy is not None and extremes < total:
        if not (both and binary and near >= HARD * total):
            raise DataError(
                f"{source_name(lossy)} is a JPEG, whose compression changes the values of a mask. Save masks as PNG."
            )
        return cut
    soft = {0, IGNORED} <= values.keys() and len(values) > FEW and HARD * total <= extremes < total
    if soft and names is None:
        raise DataError(
            f"{source}: its masks hold {len(values)} values, most of them 0 and 255: black and white with soft edges? "
            "Give two names with --classes (classes=[...]), and they are cut at the middle."
        )
    return cut if soft and binary else ""


# checks -----------------------------------------------------------------------------------------------------


def _check_sizes(
    pairs: Mapping[str, Pairs], facts: Mapping[str, Sequence[MaskFacts]], remarks: Remarks
) -> dict[str, list[int]]:
    """The orientation by which each mask is turned with its image. Raises `DataError` for a mask of another size."""
    places = [(split, row) for split, (images, _) in pairs.items() for row in range(len(images))]
    known = [read_header(pairs[split][0][row]) for split, row in places]
    masks = [facts[split][row].header for split, row in places]
    headers = [header or mask for header, mask in zip(known, masks, strict=True)]
    recorded: list[Size | None] = [None if mask.orientation != UPRIGHT else mask.size for mask in masks]
    stored, undecided = find_stored(headers, recorded)
    turns: dict[str, list[int]] = {split: [] for split in pairs}
    turned, unknown, open_rows = [], [], set(undecided)
    for number, ((split, row), header, mask) in enumerate(zip(places, headers, masks, strict=True)):
        name = source_name(pairs[split][1][row])
        turn = mask.orientation if mask.orientation != UPRIGHT else header.orientation if stored[number] else UPRIGHT
        size = mask.size if mask.orientation != UPRIGHT or turn < 5 else mask.size[::-1]
        if size != header.size:
            raise DataError(
                f"{name} is {size[0]} x {size[1]} pixels, its image {header.size[0]} x {header.size[1]}. Expected one class "
                "for every pixel."
            )
        turns[split].append(turn)
        if number in open_rows and mask.orientation == UPRIGHT:
            unknown.append(name)
        elif turn != UPRIGHT:
            turned.append(name)
    remarks.note("masks are turned with their images by EXIF", turned)
    remarks.note("images are turned by EXIF, and nothing says if their masks are", unknown)
    return turns


def _check_classes(
    pairs: Mapping[str, Pairs], facts: Mapping[str, Sequence[MaskFacts]], code: MaskCode, source: str, *, complete: bool
) -> None:
    """Warn of classes without pixels in a split.

    Raises `DataError` for a value without a class and, with `complete`, for a class without pixels in all splits.
    """
    counts = {split: np.zeros(len(code.classes), dtype=np.int64) for split in facts}
    for split, own in facts.items():
        for row, one in enumerate(own):
            for value, pixels in one.values.items():
                index = int(code.table[value]) if value < len(code.table) else UNKNOWN
                if index == UNKNOWN:
                    raise DataError(
                        f"{source_name(pairs[split][1][row])} holds the value {value}, which stands for no class. Name a "
                        f"class for it (--classes, classes=[...]) or ignore it (--ignore {value}, ignore={value})."
                    )
                if index != IGNORED:
                    counts[split][index] += pixels
    whole = sum(counts.values(), np.zeros(len(code.classes), dtype=np.int64))
    never = [name for name, pixels in zip(code.classes, whole, strict=True) if not pixels]
    if never and complete:
        values = sorted({value for own in facts.values() for one in own for value in one.values})
        raise DataError(
            f"{source}: the class {never[0]!r} has no pixel in any mask; masks hold the values "
            f"{', '.join(map(str, values[:20]))}. Name classes by value from 0 on, and {UNUSED!r} for a value without pixels."
        )
    for split, own_counts in counts.items():
        missing = [
            name for name, pixels in zip(code.classes, own_counts, strict=True) if not pixels and name not in never
        ]
        if missing:
            warn_caller(f"{source}: no pixel of the split {split!r} has the class {', '.join(missing[:5])}.")
