"""Which images a candidate is trained on and which ones it is scored on: fixed, seeded, stratified, never the test split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelpatch.data.dataset_splits import join_splits
from modelpatch.data.splits import Split, drawn
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DataError

HELD_OUT = 0.2  # of the training images, where one split is scored on and the source brings none


@dataclass(frozen=True)
class Folds:
    """`images` to train and score on, and for every fold the rows (train, held out), int64."""

    images: Split
    rows: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, data: Task, count: int, seed: int) -> Folds:
        """`count` folds of the training images; with one, the source's validation split or a fifth of the images.

        Raises `DataError` where nothing is left to score on, or a class is scored that has no image to train on.
        """
        check_classification(data, "choosing what to patch")
        if count < 1:
            raise DataError(f"the number of folds is {count}; expected at least 1.")
        if count > 1:
            held = stratified_folds(data.train.labels, count, seed)
            every = np.arange(len(data.train))
            folds = cls(data.train, tuple((np.setdiff1d(every, rows), rows) for rows in held))
        elif data.validation is not None:
            images = join_splits([data.train, data.validation])
            folds = cls(images, ((np.arange(len(data.train)), np.arange(len(data.train), len(images))),))
        else:
            folds = cls(data.train, (_one_fold(data.train.labels, seed),))
        folds._check(data)
        return folds

    def data(self, data: Task, fold: int) -> Task:
        """The task of one fold: what is held out stands where the test images do."""
        train, held = self.rows[fold]
        return Task(data.task, self.images.take(train), self.images.take(held), facts=dict(data.facts))

    def _check(self, data: Task) -> None:
        for train, held in self.rows:
            if not len(held):
                raise DataError(f"{data.task.name} has no images to score candidates on. Use fewer folds.")
            if lost := set(self.images.labels[held]) - set(self.images.labels[train]):
                name = data.classes[min(lost)]
                raise DataError(
                    f"the class {name!r} has images to score candidates on, but none to train them on. Add some."
                )


def _one_fold(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, exactly four of five images, and the others, held out. A class of one image is trained on."""
    trained = drawn(labels, len(labels) - round(HELD_OUT * len(labels)), seed)
    return trained, np.setdiff1d(np.arange(len(labels)), trained)


def stratified_folds(labels: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Disjoint row indices; every fold holds an equal share of every class, give or take one.

    Together they are all rows but those of classes with a single image, which is always trained on.
    """
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    dealt = [generator.permutation(rows) for rows in classes if len(rows) > 1]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *dealt])
    return [np.sort(rows[number::count]) for number in range(count)]
