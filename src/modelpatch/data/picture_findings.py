"""Findings of pictures that were opened: unreadable ones, the same pixels twice, odd sizes, modes and targets.

Shares are of the pictures that were opened. A check is registered by `@check_pictures`; it yields what it finds.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from modelpatch.data.evidence import Evidence, Finding, Level, Row, tell_twins
from modelpatch.data.looking import PictureFacts, find_alike
from modelpatch.text import count_of

Check = Callable[[Evidence], Iterator[Finding]]
Trait = Callable[[PictureFacts], bool]
CHECKS: list[Check] = []
SMALL_SET, SMALL, MUCH_SMALLER, LONG, OTHER_SIZE = 64, 32, 4, 2.0, 2.0
DARK = 17  # of 255: 12-bit values in 16 bits reach 16
FEWEST = 10  # pictures of each class before their sizes are compared
ODD: tuple[tuple[Level, str, Trait, str], ...] = (
    ("warning", "blank", lambda one: one.blank, "of one colour all over"),
    ("note", "turned", lambda one: one.header.turned, "stored turned (EXIF) and read upright"),
    ("note", "alpha", lambda one: one.header.alpha, "stored with transparency and laid on white"),
    ("note", "deep", lambda one: one.header.deep, "stored in more than 8 bits a channel and scaled to 8"),
    (
        "note",
        "cmyk",
        lambda one: one.header.mode in ("CMYK", "YCCK"),
        "stored in CMYK and converted without a colour profile",
    ),
    ("note", "moving", lambda one: one.header.moving, "made of several frames, of which the first is read"),
)


def check_pictures(function: Check) -> Check:
    """Register a check of pictures that were opened."""
    CHECKS.append(function)
    return function


def find_in_pictures(evidence: Evidence, near: bool) -> list[Finding]:
    """The findings of all checks of pictures; with `near` also pictures that look alike."""
    if not any(evidence.seen.values()):
        return []
    found = [finding for one in CHECKS for finding in one(evidence)]
    return [*found, *(look_alikes(evidence) if near else ())]


@check_pictures
def unreadable(evidence: Evidence) -> Iterator[Finding]:
    """Pictures and targets that cannot be read."""
    places = [[(split, one.row)] for split, own in evidence.seen.items() for one in own if one.problem]
    if places:
        text = f"{count_of(len(places), 'image')} cannot be read, or their targets cannot: a fit will stop there."
        yield evidence.tell("warning", "unreadable", text, places)


@check_pictures
def same_pixels(evidence: Evidence) -> Iterator[Finding]:
    """The same picture twice."""
    groups = defaultdict(list)
    for split in evidence.apart:
        for one in evidence.seen.get(split, ()):
            if one.picture is not None and not one.picture.blank:
                groups[one.picture.pixels].append((split, one.row))
    yield from tell_twins(evidence, [own for own in groups.values() if len(own) > 1], "pixels")


@check_pictures
def odd_pictures(evidence: Evidence) -> Iterator[Finding]:
    """Pictures that are stored in a way that is easily missed."""
    for level, code, trait, words in ODD:
        yield from _tell(evidence, level, code, _rows(evidence, trait), words)


@check_pictures
def dark_pictures(evidence: Evidence) -> Iterator[Finding]:
    """Pictures that are all but black, as 12-bit values in 16 bits or masks are."""
    rows = _rows(evidence, lambda one: one.brightest < DARK and not one.blank)
    words = f"all but black, values below {DARK} of 255"
    yield from _tell(evidence, "warning", "dark", rows, words, ": are 12 bits stored in 16, or are they masks?")


@check_pictures
def mixed_colors(evidence: Evidence) -> Iterator[Finding]:
    """Grey pictures among coloured ones, or the other way round."""
    grey = _rows(evidence, lambda one: one.grey and not one.blank)
    total = sum(len(evidence.pictures(split)) for split in evidence.apart)
    if 0 < len(grey) < total:
        rare = grey if len(grey) <= total / 2 else _rows(evidence, lambda one: not one.grey)
        words = "grey among coloured ones" if rare is grey else "coloured among grey ones"
        yield from _tell(evidence, "note", "grey", rare, words)


@check_pictures
def small_pictures(evidence: Evidence) -> Iterator[Finding]:
    """Sets of small pictures, and pictures that are much smaller than the others."""
    sides = [min(one.width, one.height) for split in evidence.apart for one in evidence.pictures(split)]
    if not sides:
        return
    middle = float(np.median(sides))
    if middle < SMALL_SET:
        text = f"the pictures are small ({middle:g} px): a network enlarges them to the size it is given. See --image-size."
        yield Finding("note", "small-set", text)
    bound = max(min(SMALL, middle / 2), middle / MUCH_SMALLER)
    rows = _rows(evidence, lambda one: min(one.width, one.height) < bound)
    yield from _tell(evidence, "note", "small", rows, f"smaller than {bound:.0f} px (the median is {middle:.0f})")


@check_pictures
def long_pictures(evidence: Evidence) -> Iterator[Finding]:
    """Pictures of which a centre crop shows less than half."""
    if evidence.kind.framing is not None:
        return
    rows = _rows(evidence, lambda one: max(one.width, one.height) >= LONG * min(one.width, one.height))
    advice = ": the centre that most networks see is less than half of it. framing=stretch shows it whole."
    yield from _tell(evidence, "note", "long", rows, f"at least {LONG:g} times as long as wide", advice)


@check_pictures
def telling_traits(evidence: Evidence) -> Iterator[Finding]:
    """Formats, sizes or colours that tell the class: a network may learn these instead of what is shown."""
    split = evidence.splits.get("train")
    if split is None or not evidence.listed("train"):
        return
    traits: dict[str, Callable[[PictureFacts], object]] = {
        "file format": lambda one: one.header.format,
        "size": lambda one: (one.width, one.height),
        "colour (grey or not)": lambda one: one.grey,
    }
    for name, trait in traits.items():
        own: dict[int, Counter[object]] = defaultdict(Counter)
        for one in evidence.seen.get("train", ()):
            if one.picture is not None:
                own[int(split.labels[one.row])][trait(one.picture)] += 1
        values = [next(iter(counts)) for counts in own.values() if len(counts) == 1 and counts.total() >= FEWEST]
        if len(own) > 1 and len(values) == len(own) and len(set(values)) > 1:
            text = (
                f"the {name} of the pictures tells {'the class' if len(set(values)) == len(own) else 'classes apart'}: "
            )
            yield Finding("warning", "telling", text + "a network may learn that instead of what is shown.")


@check_pictures
def splits_that_differ(evidence: Evidence) -> Iterator[Finding]:
    """Test pictures of another size, format or colour than those that are trained on."""
    train = evidence.pictures("train")
    for split in list(evidence.apart)[1:]:
        own = evidence.pictures(split)
        if min(len(own), len(train)) < FEWEST or "train" not in evidence.apart:
            continue
        sizes = [float(np.median([min(one.width, one.height) for one in some])) for some in (train, own)]
        grey = [float(np.mean([one.grey for one in some])) for some in (train, own)]
        if max(sizes) >= OTHER_SIZE * min(sizes):
            medians = f"medians of {sizes[1]:.0f} and {sizes[0]:.0f} px"
            text = f"the pictures of {split} have another size than those of train: {medians}."
            yield Finding("warning", "splits-differ", text)
        if abs(grey[0] - grey[1]) > 0.5:
            text = f"{grey[1]:.0%} of the pictures of {split} are grey, and {grey[0]:.0%} of train."
            yield Finding("warning", "splits-differ", text)
        if not {one.header.format for one in own} & {one.header.format for one in train}:
            text = f"the pictures of {split} are {_formats(own)} files, those of train {_formats(train)}."
            yield Finding("note", "splits-differ", text)


@check_pictures
def odd_targets(evidence: Evidence) -> Iterator[Finding]:
    """Masks and boxes that do not fit their pictures, and pictures without any."""
    problems: dict[str, list[list[Row]]] = defaultdict(list)
    empty: Counter[str] = Counter()
    for split in evidence.apart:
        for one in evidence.seen.get(split, ()):
            for problem in () if one.target is None else one.target.problems:
                problems[problem].append([(split, one.row)])
            empty[split] += one.target is not None and one.target.empty
    for problem, places in problems.items():
        yield evidence.tell("warning", "odd-targets", f"{count_of(len(places), 'image')} with {problem}.", places)
    for split, count in empty.items():
        if count:
            images = count_of(len(evidence.seen[split]), "image")
            text = f"{count:,} of {images} of {split} {'has' if count == 1 else 'have'} no {evidence.kind.counted}."
            yield Finding("note", "empty", text)


def look_alikes(evidence: Evidence) -> Iterator[Finding]:
    """Pictures of two splits that look alike without being equal."""
    seen = {
        split: [(one.row, one.picture) for one in evidence.seen.get(split, ()) if one.picture and not one.picture.blank]
        for split in evidence.apart
    }
    for number, split in enumerate(seen):
        for other in list(seen)[:number]:
            ours, theirs = seen[other], seen[split]
            pairs = find_alike([picture for _, picture in ours], [picture for _, picture in theirs])
            if pairs:
                verb = "looks" if len(pairs) == 1 else "look"
                text = (
                    f"{count_of(len(pairs), 'image')} of {split} {verb} like one of {other}: crops, copies or frames of one "
                    "scene would make figures too good. Look at them."
                )
                rows = [[(other, ours[first][0]), (split, theirs[second][0])] for first, second in pairs]
                yield evidence.tell("warning", "near", text, rows, " ~ ")


def _rows(evidence: Evidence, trait: Trait) -> list[list[Row]]:
    """The pictures that have a trait, each a group of one."""
    return [
        [(split, one.row)]
        for split in evidence.apart
        for one in evidence.seen.get(split, ())
        if one.picture is not None and trait(one.picture)
    ]


def _tell(
    evidence: Evidence, level: Level, code: str, rows: Sequence[Sequence[Row]], words: str, end: str = "."
) -> Iterator[Finding]:
    """A finding about pictures that are so, if any is."""
    if rows:
        text = f"{_of_all(evidence, rows)} {'is' if len(rows) == 1 else 'are'} {words}{end}"
        yield evidence.tell(level, code, text, rows)


def _of_all(evidence: Evidence, rows: Sequence[object]) -> str:
    total = sum(len(evidence.pictures(split)) for split in evidence.apart)
    return f"{len(rows):,} of {count_of(total, 'picture')}" if len(rows) < total else f"all {total:,} pictures"


def _formats(pictures: Sequence[PictureFacts]) -> str:
    return " and ".join(sorted({one.header.format for one in pictures}))
