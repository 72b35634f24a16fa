"""Findings that need no picture: names of classes, their counts, and files that stand in two splits.

A check is a function of the evidence, registered by `@check`; it yields what it finds.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

import numpy as np

from modelpatch.backbone.preprocessing import ImageSource, image_bytes
from modelpatch.data.evidence import MOST_EXAMPLES, Evidence, Finding, show, tell_twins
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.tasks.kind import Kind
from modelpatch.text import count_of

Check = Callable[[Evidence], Iterator[Finding]]
CHECKS: list[Check] = []
SUSPICIOUS = {  # code: names, what is said of a class and of several that have one, and advice
    "split-as-class": (
        "train training trn trainset val valid validation validate dev devel test testing tst testset eval holdout",
        ("the name of a split", "names of splits"),
        "Are the folders of classes below? Expected SPLIT/CLASS/*.jpg.",
    ),
    "folder-as-class": (
        "image images img imgs picture pictures photo photos jpegimages label labels labeltxt mask masks annotation "
        "annotations annot bbox boxes data dataset datasets raw input inputs output outputs archive",
        ("the name of a folder of files", "names of folders of files"),
        "Expected folders of classes: CLASS/*.jpg.",
    ),
    "no-name": (
        "unknown unnamed unlabeled unlabelled undefined unassigned unclassified untitled nan na n/a null none nil ? - _ todo "
        "tbd tmp temp classname newfolder lost+found $recycle.bin thumbs macosx eadir ipynbcheckpoints",
        ("a name that stands for no class", "names that stand for no class"),
        "Give a name, or leave the images out.",
    ),
}
NUMBERED = {"train", "val", "test", "images", "unnamed", "untitled", "newfolder"}  # with a number they mean the same
RARE, UNEVEN, OTHER_MIX, DOMINANT = 5, 10, 0.2, 0.6
FEW_TESTED = 100
MOST_FILES, MOST_BYTES = 100_000, 2**31  # whose sizes are looked at, and that are read, to compare files
COPY = re.compile(
    r"(\.rf\.[0-9a-f]{8,}|[ _-](copy|aug|augmented|flip|hflip|vflip|flipped|mirror|rot|rotated)[ _-]?\d*)$", re.I
)


def check(function: Check) -> Check:
    """Register a check of names and counts."""
    CHECKS.append(function)
    return function


def find_in_names(evidence: Evidence) -> list[Finding]:
    """The findings of all checks that need no picture."""
    return [finding for one in CHECKS for finding in one(evidence)]


def fold_name(name: str) -> str:
    """A name without case, accents of another encoding, blanks and separators: names that fold alike are one class twice."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_.\-\u200b\ufeff]+", "", plain) or plain.strip()


@check
def suspicious_names(evidence: Evidence) -> Iterator[Finding]:
    """Classes that are called as a split, a folder of pictures or a missing name is."""
    for code, (words, (one, many), advice) in SUSPICIOUS.items():
        known = {fold_name(word) for word in words.split()}
        found = [
            name for name in evidence.class_names if fold_name(name) in known or _numbered(name) in known & NUMBERED
        ]
        if code == "no-name":
            found += [name for name in evidence.class_names if name not in found and _is_hidden(name)]
        if found:
            text = f"{_classes(found, evidence.kind)} {one if len(found) == 1 else many}. {advice}"
            yield Finding("warning", code, text, tuple(found[:MOST_EXAMPLES]))


def _numbered(name: str) -> str:
    """A folded name without a number at its end, as of `train2017` and `Unnamed: 0`."""
    return re.sub(r"[:(]?\d+\)?$", "", fold_name(name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__", "@", "~", "$")) or not re.search(r"\w", name)


@check
def names_that_differ_little(evidence: Evidence) -> Iterator[Finding]:
    """Names that differ by case, blanks or separators, and plurals beside singulars."""
    folded = defaultdict(list)
    for name in evidence.class_names:
        folded[fold_name(name)].append(name)
    for names in (names for names in folded.values() if len(names) > 1):
        listed = ", ".join(map(repr, names))
        yield Finding(
            "warning",
            "alike-names",
            f"the classes {listed} differ by case, blanks or separators alone. Give them one name if they are one class.",
            tuple(names),
        )
    plurals = [(one, folded[f"{one}s"][0]) for one in folded if len(one) > 3 and f"{one}s" in folded]
    for one, many in plurals:
        first = folded[one][0]
        yield Finding("note", "plural", f"{first!r} and {many!r} are two classes; are they meant to be?", (first, many))


@check
def names_of_numbers(evidence: Evidence) -> Iterator[Finding]:
    """Classes without words, and numbers among words."""
    classes = evidence.class_names
    numbers = [name for name in classes if re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", name)]
    if numbers and len(numbers) == len(classes):
        gaps = _gaps(numbers)
        missing = f"; {', '.join(gaps[:5])} between them {'are' if len(gaps) > 1 else 'is'} missing" if gaps else ""
        text = f"the classes are called by numbers ({numbers[0]} to {numbers[-1]}{missing}), and answers will be too."
        yield Finding("note", "number-names", text, tuple(numbers[:5]))
    elif classes and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        text = f"the classes are called by numbers of WordNet ({classes[0]} and others), and answers will be too."
        yield Finding("note", "number-names", text, tuple(classes[:5]))
    elif numbers:
        some = show(numbers)
        yield Finding(
            "warning", "number-names", f"some classes are called by numbers, others by words {some}.", tuple(numbers)
        )


def _gaps(numbers: Sequence[str]) -> list[str]:
    """The whole numbers that are missing between the first and the last."""
    whole = {int(name) for name in numbers if name.strip().isdecimal()}
    if len(whole) < len(numbers) or max(whole) - min(whole) > 10 * len(whole):
        return []
    return [str(number) for number in range(min(whole), max(whole)) if number not in whole]


@check
def identifiers(evidence: Evidence) -> Iterator[Finding]:
    """A class for nearly every image: a column of names or numbers of images that was taken for labels."""
    counts, _, _ = evidence.counts("train")
    if counts is None or evidence.kind.dense or len(evidence.record.classes) < 20:
        return
    single = [number for number, count in counts.items() if count == 1]
    if len(single) > len(evidence.record.classes) / 2:
        text = (
            f"{len(single):,} of {len(evidence.record.classes):,} classes have one training image. If the labels name or "
            "number images, choose another column."
        )
        yield Finding("warning", "identifiers", text, evidence.names(single[:5]))


@check
def classes_of_one_split(evidence: Evidence) -> Iterator[Finding]:
    """Classes that are trained on and not measured, or the other way round. Samples of dense tasks say nothing about it."""
    present = {}
    for split, images in evidence.splits.items():
        counts, _, counted = evidence.counts(split)
        if counts is not None and counted == images.length:
            present[split] = {number for number, count in counts.items() if count}
    thing = _counted(evidence)
    for split, own in present.items():
        if split == "train":
            absent = [number for number in range(len(evidence.record.classes)) if number not in own]
            if absent:
                names = evidence.names(absent)
                text = f"{_classes(names, evidence.kind)} no {thing} in the training images, and will not be learned."
                yield Finding("warning", "not-trained", text, names)
        elif "train" in present:
            names = evidence.names(sorted(present["train"] - own))
            if names:
                advice = (
                    "it is trained, and not measured there"
                    if len(names) == 1
                    else "they are trained, and not measured there"
                )
                text = f"{_classes(names, evidence.kind)} no {thing} in the {split} images: {advice}."
                yield Finding("warning", "one-split-only", text, names)
            if unknown := evidence.names(sorted(own - present["train"])):
                text = f"{_classes(unknown, evidence.kind)} {thing} in the {split} images alone."
                yield Finding("warning", "one-split-only", text, unknown)


def _classes(names: Sequence[str], kind: Kind) -> str:
    """The subject of a sentence about classes: `the class 'x' has`, `3 classes ('x', 'y', 'z') have`."""
    if len(names) == 1:
        return f"the {kind.noun} {names[0]!r} has"
    return f"{len(names)} {kind.nouns} {show([repr(name) for name in names])} have"


def _counted(evidence: Evidence) -> str:
    """The things that classes are counted in: images where each has a class once at most."""
    counts, images_of, _ = evidence.counts("train")
    return "images" if counts == images_of else evidence.kind.counted


@check
def few_images(evidence: Evidence) -> Iterator[Finding]:
    """Classes with few training images, and test splits that are too small for a figure."""
    _, images_of, _ = evidence.counts("train")
    if images_of is not None:
        rare = [number for number, count in images_of.items() if count < RARE]
        if rare:
            names = evidence.names(rare)
            yield Finding("note", "rare", f"{_classes(names, evidence.kind)} fewer than {RARE} training images.", names)
    size = evidence.splits["test"].length if "test" in evidence.splits else None
    if size is not None and size < FEW_TESTED and evidence.splits["test"] is not evidence.splits.get("train"):
        coarse = f"one is {100 / size:.3g} points of accuracy" if evidence.kind.classifies else "its figures are coarse"
        text = f"the test split has {count_of(size, 'image')}: {coarse}."
        yield Finding("note", "small-test", text)


@check
def uneven_classes(evidence: Evidence) -> Iterator[Finding]:
    """Classes with many times the images of others, a class that most images have, and splits of another mix."""
    counts = {split: evidence.counts(split)[0] for split in evidence.splits}
    own = {number: count for number, count in (counts.get("train") or {}).items() if count}
    if len(own) > 1 and max(own.values()) >= UNEVEN * min(own.values()):
        most, least = max(own, key=own.__getitem__), min(own, key=own.__getitem__)
        first, last = evidence.names([most, least])
        advice = " class_weights=balanced weighs them alike." if evidence.kind.weighs_classes else ""
        ratio = own[most] / own[least]
        text = (
            f"the {evidence.kind.nouns} are uneven: {first!r} has {ratio:.3g} times the {_counted(evidence)} of {last!r} "
            f"({own[most]:,} and {own[least]:,}).{advice}"
        )
        yield Finding("warning", "uneven", text, (first, last))
    if len(own) == 1 and evidence.kind.counted == "pixels" and len(evidence.names(own)) == 1:
        (name,) = evidence.names(own)
        text = f"all pixels of the training masks that are not ignored are {name!r}: there is nothing to tell apart."
        yield Finding("warning", "one-class", text, (name,))
    if evidence.kind.dense:
        return
    shares = {split: _shares(found, len(evidence.record.classes)) for split, found in counts.items() if found}
    if evidence.kind.classifies and "test" in shares and shares["test"].max() >= DOMINANT:
        name = evidence.record.classes[int(shares["test"].argmax())]
        text = f"{shares['test'].max():.0%} of the test images are {name!r}: an answer that never changes is right as often."
        yield Finding("note", "dominant", text, (name,))
    for split in shares.keys() - {"train"} if "train" in shares else ():
        size = evidence.splits[split].length or 0
        apart = float(np.abs(shares[split] - shares["train"]).sum() / 2)
        if apart > OTHER_MIX and size >= FEW_TESTED:
            text = (
                f"the {evidence.kind.nouns} have other shares in {split} than in train: {apart:.0%} of its "
                f"{evidence.kind.counted} would have to move."
            )
            yield Finding("note", "other-mix", text)


def _shares(counts: Mapping[int, int], classes: int) -> np.ndarray:
    found = np.array([counts.get(number, 0) for number in range(classes)], dtype=np.float64)
    return found / max(found.sum(), 1)


@check
def numbers_out_of_range(evidence: Evidence) -> Iterator[Finding]:
    """Numbers to predict that are beyond those that are trained on."""
    train = evidence.numbers("train")
    for split in list(evidence.apart)[1:]:
        own = evidence.numbers(split)
        for name, known, asked in zip(evidence.record.classes, train.T, own.T, strict=True):
            if not np.isfinite(known).any():
                continue
            least, largest = np.nanmin(known), np.nanmax(known)
            if beyond := int(((asked < least) | (asked > largest)).sum()):
                verb = "has" if beyond == 1 else "have"
                text = (
                    f"{count_of(beyond, 'image')} of {split} {verb} a {name!r} beyond those of train ({least:g} to "
                    f"{largest:g}): such numbers are not learned."
                )
                yield Finding("note", "out-of-range", text, (name,))


@check
def no_test_split(evidence: Evidence) -> Iterator[Finding]:
    """Test images that were cut from the training images, or that are these."""
    if evidence.splits.get("test") is evidence.splits.get("train"):
        yield Finding("note", "no-test", "there is no test split: the training images stand for it.")
    elif isinstance(evidence.facts.get("test_split"), Mapping):
        text = (
            "there is no test split, so that some images of each class are held out of the training images: where several "
            "show one scene, person or film, make the split by hand."
        )
        yield Finding("note", "held-out", text)


@check
def copies_by_name(evidence: Evidence) -> Iterator[Finding]:
    """Augmented copies of one original in two splits, as their file names tell."""
    origins: dict[str, dict[str, str]] = {}
    marked = set()
    for split, paths in evidence.place.paths.items():
        for path in filter(None, paths):
            stem = PurePath(path).stem
            origin = COPY.sub("", stem)
            origins.setdefault(origin, {})[split] = stem
            marked |= {origin} if origin != stem else set()
    found = [own for origin, own in origins.items() if origin in marked and len(own) > 1]
    if found:
        examples = [" and ".join(f"{split}/{stem}" for split, stem in own.items()) for own in found]
        text = (
            f"{count_of(len(found), 'original')} {'has' if len(found) == 1 else 'have'} copies in two splits, by the names of "
            "files: figures will be too good. Split the originals, and copy the training images alone."
        )
        yield Finding("warning", "copies", f"{text} {show(examples)}", tuple(examples[:MOST_EXAMPLES]))


@check
def equal_files(evidence: Evidence) -> Iterator[Finding]:
    """The same file in two splits, where not all pictures are compared by their pixels. Files of equal sizes are read."""
    if all(evidence.opened(split) for split in evidence.splits):
        return
    if sum(map(len, evidence.apart.values())) > MOST_FILES:
        yield Finding(
            "note", "not-compared", f"files are not compared byte by byte: there are more than {MOST_FILES:,}."
        )
        return
    sizes: dict[int, list[tuple[str, int, ImageSource]]] = defaultdict(list)
    for split, images in evidence.apart.items():
        if type(images) is Split and isinstance(images.images, list):
            for row, image in enumerate(images.images):
                sizes[_size(image)].append((split, row, image))
    groups = defaultdict(list)
    left = MOST_BYTES
    for size, own in sizes.items():
        if size and len({split for split, *_ in own}) > 1:
            left -= size * len(own)
            if left < 0:
                text = (
                    f"only {MOST_BYTES / 1e9:.1f} GB of files were compared. `modelpatch data` compares all pictures."
                )
                yield Finding("note", "not-compared", text)
                break
            for split, row, image in own:
                with suppress(DataError):  # a file that cannot be read is told where it is opened
                    groups[hashlib.blake2b(image_bytes(image)).digest()].append((split, row))
    twins = [own for own in groups.values() if len({split for split, _ in own}) > 1]
    yield from tell_twins(evidence, twins, "file")


def _size(image: ImageSource) -> int:
    """The bytes of a file, or of pixels in memory; 0 for a file that is not there."""
    if isinstance(image, str | Path):
        try:
            return Path(image).stat().st_size
        except OSError:
            return 0
    return len(image) if isinstance(image, bytes) else np.asarray(image).nbytes
