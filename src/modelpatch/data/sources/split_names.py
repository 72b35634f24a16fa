"""The split that the name of a folder, file or cell tells of: `Training`, `val2017`, `seg_train`, `PublicTest`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from modelpatch.errors import DataError

WORDS = {
    "train": "train training trn trainval trainvalid trainvalidation",
    "validation": "val valid validation validate validating dev devel development eval evaluation",
    "test": "test tests testing tst holdout heldout",
}
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words.split()}
COLLECTIONS = ("set", "sets", "data", "dataset", "split", "folder", "dir")
FILLERS = str.split(
    "set sets data dataset split folder dir images image imgs img pictures pics photos jpg jpegs png labels label annotations "
    "list meta metadata info my new the final full all raw cropped crops resized small samples part of df csv gt csvs x"
)


def split_of(name: str) -> str | None:
    """The split, `train`, `validation` or `test`, that one of the words of a name tells of; None for no or for two splits.

    `train_val` is trained on.
    """
    found = {split for word in _words(name) if (split := _split_of_word(word))}
    return "train" if found == {"train", "validation"} else found.pop() if len(found) == 1 else None


def holds_validation(name: str) -> bool:
    """Return True for a name of training and validation images in one: `trainval`, `train_val`."""
    words = _words(name)
    both = {split for word in words if (split := _split_of_word(word))} == {"train", "validation"}
    return both or any(word.startswith("trainval") for word in words)


def without_overlaps(names: Sequence[str]) -> list[str]:
    """Names of splits without `trainval` beside `train`, or without `val` beside `trainval` alone."""
    both = [name for name in names if holds_validation(name)]
    if any(split_of(name) == "train" for name in names if name not in both):
        return [name for name in names if name not in both]
    return [name for name in names if not both or split_of(name) != "validation"]


def plain_split_of(name: str, fillers: Iterable[str] = FILLERS) -> str | None:
    """The split of a name that says nothing else: `my-test`, `Training Set`, but neither `test_tube` nor `seg_train`."""
    others = [word for word in _words(name) if not _split_of_word(word)]
    return split_of(name) if set(others) <= set(fillers) else None


def named_splits(paths: Sequence[Path]) -> dict[str, Path]:
    """The files or folders that have the names of splits. Raises `DataError` for two of one split (`val`, `validation`)."""
    splits: dict[str, Path] = {}
    kept = without_overlaps([path.stem for path in paths])
    for path in (path for path in paths if path.stem in kept):
        split = plain_split_of(path.name if path.is_dir() else path.stem, COLLECTIONS)
        if split is not None:
            other = splits.setdefault(split, path)
            if other is not path:
                raise DataError(f"{other} and {path} are both the {split} split. Keep one of them.")
    return splits


def split_folders(path: Path) -> dict[str, Path]:
    """The folders of a folder's splits; without any, it is the training split."""
    return named_splits([folder for folder in sorted(path.iterdir()) if folder.is_dir()]) or {"train": path}


def _words(name: str) -> list[str]:
    """The words of a name in lower case, without numbers: `PublicTest_2` is public, test."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+", name)]


def _split_of_word(word: str) -> str | None:
    """The split of a word, alone or grown together with another one: `trainset`, `testdata`."""
    if word in SPLIT_OF_WORD:
        return SPLIT_OF_WORD[word]
    ends = [word.removesuffix(end) for end in (*COLLECTIONS, "images", "imgs", "labels") if word.endswith(end)]
    return next((SPLIT_OF_WORD[end] for end in ends if end in SPLIT_OF_WORD), None)
