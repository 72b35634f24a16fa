"""The evidence that checks of a task's data look at, and the findings they make of it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelpatch.data.looking import PictureFacts, Seen
from modelpatch.data.splits import Split
from modelpatch.tasks.kind import Kind, kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import count_of

SHOWN = 3  # examples in a text
MOST_EXAMPLES, MOST_ROWS = 100, 8
Row = tuple[str, int]  # a split and the number of an image in it
Level = Literal["warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A fact of the data that its user should know: a `warning` where it may spoil a run or its figures, else a `note`.

    `code` names the check for programs. `examples` are names of images or classes, and `rows` splits and rows of a few of the
    images.
    """

    level: Level
    code: str
    text: str
    examples: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


class Place:
    """Names of rows: the path below the folder that all images share, or the number in the split."""

    def __init__(self, splits: Mapping[str, Split]) -> None:
        self.paths = {
            name: [str(image) if isinstance(image, str | Path) else "" for image in split.images]
            for name, split in splits.items()
            if type(split) is Split and isinstance(split.images, list)
        }
        folders = {os.path.dirname(path) for own in self.paths.values() for path in own if path}
        self.root = os.path.commonpath(folders) if folders and len({os.path.isabs(one) for one in folders}) == 1 else ""

    def __call__(self, split: str, row: int) -> str:
        """The name of a row."""
        path = self.paths[split][row] if split in self.paths else ""
        return (os.path.relpath(path, self.root) if self.root else path) if path else f"{split} row {row}"


@dataclass(frozen=True)
class Evidence:
    """A task's splits, the rows of them that were looked at, and the names of rows."""

    record: TaskRecord
    splits: Mapping[str, Split]
    seen: Mapping[str, Sequence[Seen]]
    facts: Mapping[str, Any]
    place: Place

    @property
    def kind(self) -> Kind:
        """The kind of the task."""
        return kind_of(self.record.kind)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of classes; none for a kind whose outputs are no classes."""
        return self.record.classes if self.kind.counted else ()

    def names(self, classes: Iterable[int]) -> tuple[str, ...]:
        """The names of class indices."""
        return tuple(self.record.classes[number] for number in classes)

    def pictures(self, split: str) -> list[PictureFacts]:
        """The facts of a split's pictures that could be read."""
        return [one.picture for one in self.seen.get(split, ()) if one.picture is not None]

    @property
    def apart(self) -> dict[str, Split]:
        """The splits that have images of their own and are no streams."""
        found: dict[str, Split] = {}
        for name, split in self.splits.items():
            if not split.is_stream and not any(split is other for other in found.values()):
                found[name] = split
        return found

    def opened(self, split: str) -> bool:
        """Return True where every picture of a split was looked at."""
        images = self.splits[split]
        seen = sum(one.picture is not None or bool(one.problem) for one in self.seen.get(split, ()))
        return not images.is_stream and seen == len(images)

    def counts(self, split: str) -> tuple[Mapping[int, int] | None, Mapping[int, int] | None, int]:
        """The counts of each class, of the images it occurs in, and of the images that were counted; None where unknown."""
        images = self.splits[split]
        if self.listed(split):
            values, times = np.unique(images.labels, return_counts=True)
            found = dict(zip(values.tolist(), times.tolist(), strict=True))
            return found, found, len(images.labels)
        counted = [one.target.counts for one in self.seen.get(split, ()) if one.target is not None]
        known = [counts for counts in counted if counts is not None]
        if not known:
            return None, None, 0
        amounts: Counter[int] = Counter()
        for counts in known:
            amounts.update(counts)
        return amounts, Counter(number for counts in known for number in counts), len(known)

    def listed(self, split: str) -> bool:
        """Return True where the class of every image is known without reading images."""
        images = self.splits[split]
        return images.labels_known and self.kind.target is None

    def numbers(self, split: str) -> np.ndarray:
        """The numbers (N, K) of the targets that were looked at, NaN where one is unknown; (0, K) for other kinds."""
        found = [
            one.target.numbers for one in self.seen.get(split, ()) if one.target is not None and one.target.numbers
        ]
        return np.array(found, dtype=np.float64).reshape(len(found), len(self.record.classes))

    def tell(self, level: Level, code: str, text: str, groups: Sequence[Sequence[Row]], joint: str = " = ") -> Finding:
        """A finding about groups of rows, each one image or some that belong together; its text ends with the first ones."""
        names = [joint.join(self.place(*row) for row in group[:SHOWN]) for group in groups]
        rows = [row for group in groups[:MOST_ROWS] for row in group[:SHOWN]][:MOST_ROWS]
        return Finding(level, code, f"{text} {show(names)}", tuple(names[:MOST_EXAMPLES]), tuple(rows))


def show(examples: Sequence[str]) -> str:
    """The first few of some names in brackets."""
    more = f", and {len(examples) - SHOWN:,} more" if len(examples) > SHOWN else ""
    return f"({', '.join(examples[:SHOWN])}{more})" if examples else ""


def tell_counts(passed_over: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason with the number and the first names of what was passed over."""
    return [f"{len(names):,}, {reason} {show(names)}" for reason, names in passed_over.items()]


def tell_twins(evidence: Evidence, groups: Sequence[Sequence[Row]], thing: str) -> Iterator[Finding]:
    """Findings about rows that are one picture: in two splits, under two classes, and several times in one."""
    splits = list(evidence.apart)
    for number, split in enumerate(splits):
        for other in splits[:number]:
            shared = [own for own in groups if {split, other} <= {one for one, _ in own}]
            if shared:
                pairs = [[next(row for row in own if row[0] == one) for one in (other, split)] for own in shared]
                count = sum(one == split for own in shared for one, _ in own)
                text = (
                    f"{count_of(count, 'image')} of {split} {'is' if count == 1 else 'are'} in {other} too, the same {thing}: "
                    f"figures of {split} will be too good. Keep each in one split."
                )
                yield evidence.tell("warning", "twice", text, pairs)
    labels = {split: evidence.splits[split].labels for split in splits if evidence.listed(split)}
    torn = [own for own in groups if len({int(labels[split][row]) for split, row in own if split in labels}) > 1]
    if torn:
        text = f"{count_of(len(torn), 'image')} {'has' if len(torn) == 1 else 'have'} two classes, the same {thing} in each."
        yield evidence.tell("warning", "two-classes", text, torn)
    for split in splits:
        repeated = [own for group in groups if len(own := [row for row in group if row[0] == split]) > 1]
        if repeated:
            extra = sum(len(own) - 1 for own in repeated)
            verb = "repeats" if extra == 1 else "repeat"
            text = f"{count_of(extra, 'image')} of {split} {verb} another of it, the same {thing}."
            yield evidence.tell("note", "repeated", text, repeated)
