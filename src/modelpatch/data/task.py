"""Tasks with their images, from whatever source they come: `load_task` finds the file of `sources/` that reads it.

A seeded stratified test split is cut from the training images of a source that has none. Δ-Networks and PAINT both train
joint patches, of `join_tasks`, for tasks that are known together, with images of an unknown task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from modelpatch.data.evidence import tell_counts
from modelpatch.data.readable import UNREADABLE, keep_readable
from modelpatch.data.report import MOST_IMAGES, DataReport, make_report
from modelpatch.data.sources.base import Found, SourceOptions, check_class_count, read_source
from modelpatch.data.sources.datasets import describe, is_dataset, name_of, read_datasets
from modelpatch.data.sources.remarks import is_expected
from modelpatch.data.splits import Split, Transform, check_seed, drawn, join_splits, split_seed, stratified
from modelpatch.errors import DataError, DataWarning, warn_caller
from modelpatch.tasks.classification import Evaluation
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.text import first_problem

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Task:
    """A task and its splits. `validation` is None where the source has none; it is never cut from the test images.

    `passed_over` holds the names of files, rows and objects of the source that were not read, by the reason in plain words,
    and `notes` what was decided or changed while it was read. `layout` says as what the source was recognised.
    """

    task: TaskRecord
    train: Split
    test: Split
    validation: Split | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layout: str = ""

    def __new__(cls, *given: Any, **fields: Any) -> Any:
        """Support `Task(name=..., classes=...)`, which made a `TaskRecord` in the first edition."""
        if "name" in fields and not given:
            warn_caller(
                "Task(name=..., classes=...) is deprecated; use modelpatch.tasks.TaskRecord for a task without data.",
                DeprecationWarning,
            )
            return TaskRecord(**fields)
        return super().__new__(cls)

    @classmethod
    def from_datasets(
        cls,
        train: Any,
        test: Any = None,
        *,
        validation: Any = None,
        classes: Sequence[str] | int | None = None,
        name: str | None = None,
        kind: str | None = None,
        transform: Transform | None = None,
        workers: int | None = None,
        ignore: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> "Task":
        """A task from data sets of (image, label): torch `Dataset`s, streams, Hugging Face data sets or DataLoaders.

        Images are PIL images, arrays (H, W[, 3]), or tensors (C, H, W), uint8 or float in [0, 1], not normalised. Samples are
        tuples, or dicts with keys such as `image` and `label`. A label is a class index or a class name; a mask (H, W) makes a
        segmentation task, a dict of `boxes` and `labels` a detection task. `classes` are names, or their number, by default
        those of the data set, or found by reading all labels. Without `test`, a stratified share of the training images is
        held out, as `seed` says. Raises `DataError` for anything else.

        `transform` is applied to the images that are trained on, in place of the library's augmentation unless that is asked
        for by name. Random transforms, its own and those of the data set, follow (seed, epoch, row). `workers` is the number
        of processes that read images, `length` the number of images in an epoch of a stream that has no length of its own.
        """
        given = {"train": train, "test": test, "validation": validation}
        options = SourceOptions(kind, classes, ignore)
        found = read_datasets({key: one for key, one in given.items() if one is not None}, options, workers, length)
        task = _assemble(found, name or name_of(train), describe(train), seed)
        return task.with_transform(transform)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes."""
        return self.task.classes

    def with_transform(self, transform: Transform | None) -> Self:
        """The task with a transform of its training images, and of targets of dense tasks (see `from_datasets`)."""
        if transform is None:
            return self
        if not callable(transform):
            raise DataError(f"transform={transform!r} cannot be called. Expected one such as torchvision's v2.Compose.")
        facts = {**self.facts, "transform": getattr(transform, "__qualname__", type(transform).__name__)}
        return replace(self, train=self.train.with_transform(transform), facts=facts)

    def with_validation(self, fraction: float, seed: int) -> Self:
        """The task with a stratified share of its training images as validation split, unless it has one.

        Raises `DataError` for a share that leaves a class without training images, or nothing to validate on.
        """
        if self.validation is not None:
            return self
        if not 0 < fraction < 1:
            raise DataError(f"the share of images held out for validation is {fraction}; expected one between 0 and 1.")
        keep, held = _cut(self.train, fraction, seed)
        if not len(held):
            raise DataError(f"no class of {self.task.name} has an image to spare for validation. Add images, or none.")
        if self.train.targets is None and (lost := set(self.train.labels[held]) - set(self.train.labels[keep])):
            name, count = self.classes[min(lost)], int((self.train.labels == min(lost)).sum())
            raise DataError(
                f"a share of {fraction:g} for validation leaves the class {name!r} none of its {count} images to train on. "
                "Hold out a smaller share, or add images."
            )
        held_out = self.train.take(held).with_transform(None)
        return replace(self, train=self.train.take(keep), validation=held_out)

    def subsample(self, count: int, seed: int = 0) -> Self:
        """The task with `count` training images as `drawn` chooses them, or all. Raises `DataError` below 1."""
        if count < 1:
            raise DataError(f"a subsample of {count} images is no task; expected at least one.")
        if count >= len(self.train):
            return self
        return replace(self, train=self.train.take(drawn(self.train.labels, count, seed)))

    def report(
        self, images: int = MOST_IMAGES, *, near: bool = False, advance: Callable[[int], object] = lambda _: None
    ) -> DataReport:
        """The report of what was read: splits, classes, pictures, and what is unusual about them.

        At most `images` are opened, spread over each split; with 0 none is, and names, counts and files are looked at alone.
        With `near` pictures of two splits are compared by their look too. Streams are not read. `advance(count)` is called
        as images are opened. Raises `DataError` for numbers below 0.

            print(mp.load_task("flowers/").report())
        """
        report = make_report(self.task, self.splits, self.facts, images, near, advance, self.notes)
        return replace(report, layout=self.layout, passed_over=self.passed_over)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name: train, validation if there is one, and test."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    def __repr__(self) -> str:
        counts = [f"{'?' if s.length is None else s.length} {name}" for name, s in self.splits.items()]
        return f"Task({self.task.name!r}, {len(self.classes)} {kind_of(self.task.kind).nouns}, {', '.join(counts)})"


def load_task(
    source: Any,
    *,
    name: str | None = None,
    seed: int = 0,
    hold_out: bool = True,
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    ignore: int | None = None,
    separator: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    skip_unreadable: bool = False,
    transform: Transform | None = None,
) -> Task:
    """A task from a folder, a manifest, `hf:NAME` or `bundled:digits`. `seed` makes the test split where there is none.

    A data set of torch or `datasets` is a source too, as is a mapping from `train`, `test` and `validation` to them; see
    `Task.from_datasets`, which has more options for them. With `hold_out=False` a source without a test split is tested on all
    its images: for data that is only measured. `kind` is found from the source where it is not given. For segmentation
    `classes` name the values of masks from 0 on, and `ignore` is one that stands for no class, beside 255. For several labels
    or numbers an image `classes` name columns of a table, and `separator` stands between labels in one cell; for class folders
    and labels `classes` are those to read, in this order. The columns of a table that hold images, labels and splits are found
    by their names and contents, or named by `image_column`, `label_column` and `split_column`. With `skip_unreadable` every
    image is decoded once, and those that cannot be are left out and counted in `passed_over`. `transform` is
    applied to the images that are trained on. Parts of the source that were not read and that a user may miss raise one
    `DataWarning`. Raises `DataError` for a source that cannot be read or holds no images, has one
    class, or has labels of classes that are not trained.
    """
    check_seed(seed)
    options = SourceOptions(kind, classes, ignore, separator, image_column, label_column, split_column)
    if is_dataset(source):
        splits = source if isinstance(source, Mapping) else {"train": source}
        text, stem = describe(splits.get("train")), name_of(splits.get("train"))
        found = read_datasets(splits, options, None, None)
    elif not isinstance(source, str | Path) or not str(source):
        raise DataError(
            f"unsupported data source {source!r}; expected a folder, a manifest, hf:NAME, bundled:digits, or a Dataset. See "
            "docs/data.md."
        )
    else:
        text = str(source)
        try:
            path = Path(source).expanduser()
            found, stem = read_source(path if path.exists() else source, options)
        except (OSError, RuntimeError) as error:  # no permission, a name too long, no such user's home
            raise DataError(f"{text[:200]} cannot be read: {str(error)[:200]}") from error
    if skip_unreadable:
        found = _without_unreadable(found, text)
    data = _assemble(found, name or stem, text, seed if hold_out else None)
    facts = {**data.facts, **options.facts, **({"skip_unreadable": True} if skip_unreadable else {})}
    missed = {reason: names for reason, names in data.passed_over.items() if not is_expected(reason)}
    if missed:
        warn_caller(f"{text[:200]}: not read: {'; '.join(tell_counts(missed))}.", DataWarning)
    return replace(data, facts=facts).with_transform(transform)


def join_tasks(tasks: Sequence[Task]) -> Task:
    """The images of several tasks as one task over all their classes, `TASK: CLASS` where two tasks share a name.

    It has validation images if all of them have. Raises `DataError` for no task, for one that is not of classification, for
    two of one name, and where only some have validation images.
    """
    if not tasks:
        raise DataError("there are no tasks to join. Expected at least one.")
    if len(tasks) == 1:
        return tasks[0]
    for task in tasks:
        check_classification(task, "A joint task")
    names = [task.task.name for task in tasks]
    if len(set(names)) < len(names):
        raise DataError(f"joined tasks need names of their own; these are {', '.join(names)}. Rename a folder.")
    lacking = [name for name, task in zip(names, tasks, strict=True) if task.validation is None]
    if 0 < len(lacking) < len(tasks):
        raise DataError(
            f"only some of the tasks have validation images; {', '.join(lacking)} has none. Use `with_validation` on it."
        )
    starts = np.cumsum([0, *(len(task.classes) for task in tasks[:-1])])

    def together(parts: Sequence[Split]) -> Split:
        labels = [part.labels + start for part, start in zip(parts, starts, strict=True)]
        return join_splits(parts, np.concatenate(labels))

    return Task(
        joint_task([task.task for task in tasks]),
        together([task.train for task in tasks]),
        together([task.test for task in tasks]),
        None if lacking else together([task.validation for task in tasks if task.validation is not None]),
        {"joined": {task.task.name: len(task.classes) for task in tasks}},
    )


def joint_task(tasks: Sequence[TaskRecord]) -> TaskRecord:
    """One task with the classes of several."""
    if len(tasks) == 1:
        return tasks[0]
    names = [name for task in tasks for name in task.classes]
    classes = [f"{task.name}: {name}" if names.count(name) > 1 else name for task in tasks for name in task.classes]
    return TaskRecord(name="+".join(task.name for task in tasks)[:256], classes=tuple(classes))


def accuracy_by_task(evaluation: Evaluation, data: Task) -> dict[str, float]:
    """Top-1 in [0, 1] on the images of every joined task, which all compete for all classes; empty for a single task."""
    confusion, accuracies, start = np.asarray(evaluation.confusion), {}, 0
    for name, count in data.facts.get("joined", {}).items():
        rows = slice(start, start + count)
        accuracies[name] = float(np.trace(confusion[rows, rows]) / confusion[rows].sum())
        start += count
    return accuracies


def check_classification(data: Task, purpose: str) -> None:
    """Raise `DataError` for a task of another kind, for a purpose that needs classes of whole images."""
    if not kind_of(data.task.kind).classifies:
        raise DataError(
            f"{data.task.name} is a {data.task.kind} task; {purpose} takes classification tasks. Use fit, compare, eval and "
            "predict."
        )


def check_same_split(facts: Mapping[str, Any], data: Task) -> None:
    """Raise `DataError` where the facts of a patch tell of another split of this source: it was trained on test images."""
    fitted, now = split_seed(facts), split_seed(data.facts)
    if facts.get("source") == data.facts.get("source") and None not in (fitted, now) and fitted != now:
        raise DataError(
            f"{data.task.name} was split with seed {now}, but the patch was fitted on the split of seed {fitted}: images it "
            f"was trained on would be tested. Load the data with seed {fitted}."
        )


def _cut(train: Split, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (rest, share) of a stratified share, or a random one where strata of targets are too small."""
    keep, held = stratified(train.labels, fraction, seed)
    alone = train.targets is not None and not len(held)
    return stratified(np.zeros(len(train), dtype=np.int64), fraction, seed) if alone else (keep, held)


def _without_unreadable(found: Found, source: str) -> Found:
    """The contents of a source without the images that cannot be decoded, which are counted."""
    kept = {name: keep_readable(split, name) for name, split in found.splits.items()}
    place = Path(source).expanduser()
    root = place.parent if place.suffix and place.is_file() else place
    paths = [Path(name) for _, names in kept.values() for name in names]
    lost = [(path.relative_to(root) if path.is_relative_to(root) else path).as_posix() for path in paths]
    passed_over = {**found.passed_over, **({UNREADABLE: lost} if lost else {})}
    return replace(found, splits={name: split for name, (split, _) in kept.items()}, passed_over=passed_over)


def _assemble(found: Found, name: str, source: str, seed: int | None) -> Task:
    """The task of what a source holds, checked, with a test split cut from the training images where there is none."""
    splits, classes = dict(found.splits), found.classes
    check_class_count(found, source)
    if "train" not in splits or splits["train"].length == 0:
        raise DataError(f"{source} has no training images; it has the splits: {', '.join(splits) or 'none'}.")
    facts: dict[str, Any] = {"source": source.rstrip("/").rsplit("/", 1)[-1]}
    train = splits["train"]
    if "test" not in splits and seed is not None:
        if train.is_stream:
            raise DataError(
                f"{source} is a stream, from which no test images can be cut. Give some: test=... of from_datasets."
            )
        keep, held = _cut(train, TEST_FRACTION, seed)
        if not len(held):
            raise DataError(f"{source} has one image a class, and no test split. Add images.")
        train, splits["test"] = train.take(keep), train.take(held)
        facts["test_split"] = {"fraction": TEST_FRACTION, "seed": int(seed)}
    splits.setdefault("test", train)
    known: dict[str, set[int]] = {}
    for split, images in splits.items():
        if images.length == 0:
            raise DataError(f"{source}: its split {split!r} holds no images. Fill it or remove it.")
        if images.labels_known and kind_of(found.kind).target is None:
            known[split] = set(np.unique(images.labels).tolist())
            if min(known[split]) < 0 or max(known[split]) >= len(classes):
                raise DataError(
                    f"{source}: its split {split!r} has images without a label. Leave it out, or label them."
                )
    if known and train.labels_known and (unseen := known.get("test", set()) - set(train.labels.tolist())):
        raise DataError(f"{source}: the class {classes[min(unseen)]!r} is tested but has no training image.")
    try:
        task = TaskRecord(name=name, kind=found.kind, classes=tuple(classes))
    except ValidationError as error:
        raise DataError(f"{source}: its name or class names cannot be used: {first_problem(error)}.") from error
    passed_over = {reason: tuple(names) for reason, names in found.passed_over.items() if names}
    return Task(
        task, train, splits["test"], splits.get("validation"), facts, passed_over, tuple(found.notes), found.layout
    )
