"""Names of classes as they are written: blanks at their ends, Unicode's two ways to write one letter, upper and lower case."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.samples import order_name
from modelpatch.data.sources.base import Found
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification

MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "null"}  # cells without a label, in lower case
UNLABELLED = "row without a label"  # as it is counted
SHORTEST_MERGED = 3  # letters: `a` and `A` are two classes of written letters
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
Members = Mapping[str, Sequence[tuple[ImageSource, str]]]  # images with the names of their classes, by split


def clean_name(name: str) -> str:
    """The name without blanks and invisible characters at its ends, in Unicode's composed form."""
    return unicodedata.normalize("NFC", name).strip().strip(INVISIBLE).strip()


def name_at(names: Sequence[str], number: int, source: str) -> str:
    """The name of a class by its number. Raises `DataError` for a number, such as -1, that is none of theirs."""
    if not 0 <= number < len(names):
        raise DataError(
            f"{source}: the label {number} is none of 0 to {len(names) - 1}, the numbers of {len(names)} classes."
        )
    return str(names[number])


def is_missing(value: object) -> bool:
    """Return True for a cell that names no class: empty, NaN, or one of the words that tables have for it."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return isinstance(value, str) and clean_name(value).lower() in MISSING


def unify_names(counts: Mapping[str, int], remarks: Remarks, kept: Sequence[str] = ()) -> dict[str, str]:
    """The class of every name as written: names that differ in case alone are one class, called as most images are.

    Names of fewer than three letters, and those of `kept`, stay apart. What is merged is noted.
    """
    cleaned: Counter[str] = Counter()
    for name, count in counts.items():
        cleaned[clean_name(name)] += count
    alike: dict[str, list[str]] = defaultdict(list)
    for name in cleaned:
        alike[name.casefold() if len(name) >= SHORTEST_MERGED and name not in kept else name].append(name)
    chosen: dict[str, str] = {}
    for names in alike.values():
        best = max(names, key=lambda name: (name in kept, cleaned[name], name))
        chosen |= dict.fromkeys(names, best)
        if len(names) > 1:
            written = ", ".join(repr(name) for name in sorted(names))
            remarks.note(
                f"the labels {written} are read as one class, {best!r}; --classes with each of them keeps them apart"
            )
    blanks = [name for name in counts if name != clean_name(name) and clean_name(name) in counts]
    remarks.note("labels are read without the blanks at their ends", [repr(name) for name in blanks])
    return {name: chosen[clean_name(name)] for name in counts}


def check_names(members: Members, names: Sequence[str] | None, source: str) -> tuple[str, ...] | None:
    """The class names that the user gives, cleaned. Raises `DataError` for a label that is none of them."""
    if names is None:
        return None
    cleaned = tuple(map(clean_name, names))
    present = {clean_name(label) for pairs in members.values() for _, label in pairs}
    if foreign := sorted(present - set(cleaned)):
        raise DataError(f"{source} has the label {foreign[0]!r}, which is none of the classes that were given.")
    return cleaned


def make_classification(members: Members, remarks: Remarks | None = None, names: Sequence[str] | None = None) -> Found:
    """The task of images with the names of their classes, which are those of `names`, else all of them in order."""
    remarks = remarks or Remarks()
    counts = Counter(label for pairs in members.values() for _, label in pairs)
    classes = unify_names(counts, remarks, names or ())
    ordered = list(names or sorted(set(classes.values()), key=order_name))
    index = {name: number for number, name in enumerate(ordered)}
    splits = {
        split: Split(
            [image for image, _ in pairs], np.array([index[classes[name]] for _, name in pairs], dtype=np.int64)
        )
        for split, pairs in members.items()
    }
    return Found(Classification.name, splits, ordered, names_from_user=names is not None, **remarks.facts)
