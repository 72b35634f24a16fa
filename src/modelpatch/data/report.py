"""The report of what was read: kind, splits, classes, pictures, and the findings that a careful colleague would name.

    names alone          counts, names of classes, equal files                     a fraction of a second
    with pictures        sizes, modes, unreadable ones, the same pixels twice      about a minute for 20,000 photos

A stream is not read: its report says what is known without it.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from modelpatch.data.evidence import Evidence, Finding, Place, tell_counts
from modelpatch.data.findings import find_in_names
from modelpatch.data.looking import Seen, look_through
from modelpatch.data.picture_findings import find_in_pictures
from modelpatch.data.splits import Lazy, Split
from modelpatch.errors import DataError
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import count_of

MOST_IMAGES = 20_000
MOST_NAMED = 1000  # unreadable pictures that a report names


@dataclass(frozen=True)
class Spread:
    """The least, the median and the largest of some numbers."""

    least: int
    median: int
    largest: int

    def __str__(self) -> str:
        return f"{self.least:,}" if self.least == self.largest else f"{self.least:,} to {self.largest:,}"


@dataclass(frozen=True)
class NumberSpread:
    """One output of a regression: the number of images where it is known, and its least, median and largest value."""

    known: int
    least: float
    median: float
    largest: float


@dataclass(frozen=True)
class SplitReport:
    """One split: its images (None for a stream of unknown length), and those that were opened.

    `classes` counts each class in the units of the kind (images, objects, pixels), and `images_of` the images it occurs in;
    both are None where targets were not read. `counted` is the number of images that were counted, and `empty` of those that
    have nothing to count. `numbers` are the outputs of a regression.
    """

    name: str
    images: int | None
    opened: int = 0
    counted: int = 0
    classes: Mapping[str, int] | None = None
    images_of: Mapping[str, int] | None = None
    empty: int = 0
    widths: Spread | None = None
    heights: Spread | None = None
    formats: Mapping[str, int] = field(default_factory=dict)
    modes: Mapping[str, int] = field(default_factory=dict)
    numbers: Mapping[str, NumberSpread] = field(default_factory=dict)


@dataclass(frozen=True)
class DataReport:
    """The contents of a task's data as `Task.report` finds them.

    `layout` says as what the source was recognised, `passed_over` names what of it was not read, by the reason. `unreadable`
    are images that cannot be opened, or whose targets cannot be read, with the reason. `seconds` is what opening took.
    """

    name: str
    source: str
    kind: str
    counted: str
    classes: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    findings: tuple[Finding, ...]
    layout: str = ""
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, Any] | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def images(self) -> int:
        """The number of images whose number is known."""
        return sum(split.images or 0 for split in self.splits)

    @property
    def opened(self) -> int:
        """The number of images that were opened."""
        return sum(split.opened for split in self.splits)

    @property
    def warnings(self) -> list[str]:
        """The texts of the findings that may spoil a run or its figures."""
        return [finding.text for finding in self.findings if finding.level == "warning"]

    @property
    def notes(self) -> list[str]:
        """The texts of the other findings."""
        return [finding.text for finding in self.findings if finding.level == "note"]

    @property
    def summary(self) -> str:
        """One line: kind, classes, splits, and the number of files and others that were passed over."""
        counts = [
            f"{'unknown number of' if one.images is None else f'{one.images:,}'} {one.name}" for one in self.splits
        ]
        held = f" (test held out of train, seed {self.held_out['seed']})" if self.held_out else ""
        kind = kind_of(self.kind)
        classes = count_of(len(self.classes), kind.noun, kind.nouns)
        left = sum(map(len, self.passed_over.values()))
        passed = f"; {left:,} passed over" if left else ""
        return f"{self.name}: {self.kind}, {classes}, {', '.join(counts)} images{held}{passed}"

    def tell_passed_over(self) -> list[str]:
        """A line for each reason with the number and the first names of what was passed over."""
        return tell_counts(self.passed_over)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"summary": self.summary, "images": self.images, "opened": self.opened, **asdict(self)}

    def __str__(self) -> str:
        lines = [self.summary]
        for split in self.splits:
            if split.widths is not None:
                shown = ", ".join(f"{count:,} {name}" for name, count in (*split.formats.items(), *split.modes.items()))
                lines.append(f"{split.name}: {split.widths} x {split.heights} px; {shown}")
        lines += [f"passed over: {line}" for line in self.tell_passed_over()]
        lines += [f"cannot be read: {place}: {why}" for place, why in list(self.unreadable.items())[:10]]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])


def make_report(
    record: TaskRecord,
    splits: Mapping[str, Split],
    facts: Mapping[str, Any],
    images: int = MOST_IMAGES,
    near: bool = False,
    advance: Callable[[int], object] = lambda _: None,
    notes: Sequence[str] = (),
) -> DataReport:
    """The report of a task's splits, for which at most so many images are opened; see `Task.report`."""
    if images < 0:
        raise DataError(f"a report cannot open {images} images. Expected 0 or more.")
    if near and not images:
        raise DataError("near duplicates are found by opening images. Leave near out, or open some.")
    kind, begin = kind_of(record.kind), time.perf_counter()
    seen = {
        name: list(look_through(splits[name], rows, kind, advance))
        for name, rows in choose_rows(splits, images).items()
    }
    seconds = time.perf_counter() - begin
    place = Place(splits)
    for name, split in splits.items():  # boxes that are at hand need no picture
        if (
            name not in seen
            and split.targets is not None
            and not isinstance(split.targets, Lazy)
            and not split.is_stream
        ):
            seen[name] = [Seen(row, target=kind.examine(target)) for row, target in enumerate(split.targets)]
    evidence = Evidence(record, splits, seen, facts, place)
    findings = [*(Finding("note", "source", note) for note in notes), *find_in_names(evidence)]
    findings += find_in_pictures(evidence, near)
    unreadable = {place(name, one.row): one.problem for name, own in seen.items() for one in own if one.problem}
    held = facts.get("test_split")
    return DataReport(
        record.name,
        str(facts.get("source", "")),
        record.kind,
        kind.counted,
        record.classes,
        tuple(_describe(name, evidence) for name in splits),
        tuple(sorted(findings, key=lambda one: one.level != "warning")),
        unreadable=dict(list(unreadable.items())[:MOST_NAMED]),
        held_out=held if isinstance(held, Mapping) else None,
        seconds=seconds,
    )


def choose_rows(splits: Mapping[str, Split], most: int) -> dict[str, list[int]]:
    """The rows of each split to open, at most so many in all: small splits whole, rows of larger ones evenly spread."""
    rows, left = {}, most
    sizes = {name: len(split) for name, split in splits.items() if not split.is_stream}
    for place, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        count = min(size, left // (len(sizes) - place))
        left -= count
        if count:
            rows[name] = np.unique(np.linspace(0, size - 1, count).round().astype(int)).tolist()
    return {name: rows[name] for name in splits if name in rows}


def _describe(name: str, evidence: Evidence) -> SplitReport:
    split, seen = evidence.splits[name], evidence.seen.get(name, [])
    pictures = evidence.pictures(name)
    counts, images_of, counted = evidence.counts(name)
    named = dict(enumerate(evidence.record.classes))

    def by_name(found: Mapping[int, int] | None) -> dict[str, int] | None:
        return None if found is None else {named[number]: int(found.get(number, 0)) for number in named}

    return SplitReport(
        name,
        split.length,
        sum(one.picture is not None or bool(one.problem) for one in seen),
        counted,
        by_name(counts),
        by_name(images_of),
        sum(one.target is not None and one.target.empty for one in seen),
        _spread([one.width for one in pictures]),
        _spread([one.height for one in pictures]),
        _most_common(one.header.format for one in pictures),
        _most_common(one.header.mode for one in pictures),
        _spread_numbers(evidence.numbers(name), evidence.record.classes),
    )


def _spread(values: Sequence[int]) -> Spread | None:
    return Spread(min(values), int(np.median(values)), max(values)) if values else None


def _spread_numbers(numbers: np.ndarray, names: Sequence[str]) -> dict[str, NumberSpread]:
    columns = ((name, column[~np.isnan(column)]) for name, column in zip(names, numbers.T, strict=True))
    return {
        name: NumberSpread(len(known), float(known.min()), float(np.median(known)), float(known.max()))
        for name, known in columns
        if len(known)
    }


def _most_common(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())
