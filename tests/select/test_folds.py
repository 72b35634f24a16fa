"""Folds are disjoint, stratified, seeded, and never of test images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conftest import color_task
from modelpatch.data.splits import Split
from modelpatch.errors import DataError
from modelpatch.select.trials import HELD_OUT, Folds, stratified_folds


@pytest.mark.parametrize("count", [2, 3, 5])
def test_folds_part_the_rows_and_share_every_class(count: int) -> None:
    labels = np.array([0] * 20 + [1] * 11 + [2] * 7)
    folds = stratified_folds(labels, count, seed=3)
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(labels)))
    for label in range(3):
        sizes = [int((labels[rows] == label).sum()) for rows in folds]
        assert max(sizes) - min(sizes) <= 1


def test_the_same_seed_gives_the_same_folds_and_another_one_others() -> None:
    labels = np.arange(60) % 3
    first, again, other = (stratified_folds(labels, 5, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_no_fold_trains_on_what_it_scores() -> None:
    folds = Folds.of(color_task(30), 3, 0)
    for train, held in folds.rows:
        assert not set(train) & set(held)
        assert len(train) + len(held) == 30


def test_one_split_holds_out_a_share_of_the_training_images() -> None:
    folds = Folds.of(color_task(30), 1, 0)
    assert len(folds.rows) == 1
    assert len(folds.rows[0][1]) == HELD_OUT * 30


def test_one_split_is_the_source_s_own_where_it_has_one() -> None:
    data = color_task(12)
    own = replace(data, validation=Split(list(data.test.images[:6]), data.test.labels[:6]))
    fold = Folds.of(own, 1, 0).data(own, 0)
    assert fold.train.images == own.train.images
    assert fold.test.images == own.validation.images  # type: ignore[union-attr]


def test_the_test_split_is_not_among_the_images() -> None:
    data = color_task(12)
    for count in (1, 3):
        held = {id(image) for image in Folds.of(data, count, 0).images.images}
        assert not held & {id(image) for image in data.test.images}


def test_a_class_of_one_image_is_trained_on_in_every_fold() -> None:
    data = color_task(12)
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    data = replace(data, train=Split(data.train.images, labels))
    for train, held in Folds.of(data, 3, 0).rows:
        assert 11 in train
        assert 11 not in held
        assert set(labels[held]) == {0, 1}


def test_what_cannot_be_scored_is_refused() -> None:
    data = color_task(12)
    own = replace(data, train=Split(data.train.images[:2], np.array([0, 1])), validation=data.test)
    with pytest.raises(DataError, match="class 'blue' has images to score"):
        Folds.of(own, 1, 0)
    with pytest.raises(DataError, match="no images to score"):
        Folds.of(replace(own, validation=None), 3, 0)
    with pytest.raises(DataError, match="at least 1"):
        Folds.of(data, 0, 0)
