"""Splits of classes and pictures that are made here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conftest import color_task
from modelpatch.data.task import Split, Task
from modelpatch.errors import DataError
from modelpatch.tasks.record import TaskRecord
from modelpatch_studies.made_tasks import (
    COLORS,
    SHAPES,
    _drawn,
    counting_task,
    multiple_choice,
    split_classes,
    write_words,
)

pytestmark = pytest.mark.slow


def many_classes(count: int) -> Task:
    labels = np.arange(3 * count) % count
    images = [np.full((4, 4, 3), label, np.uint8) for label in labels]
    task = TaskRecord(name="many", classes=tuple(f"class {number}" for number in range(count)))
    return Task(task, Split(images, labels), Split(images[:count], labels[:count]))


def test_halves_share_no_class_and_lose_no_image() -> None:
    data = many_classes(7)
    first, second = split_classes(data, seed=2)
    assert sorted(first.classes + second.classes) == sorted(data.classes)
    assert abs(len(first.classes) - len(second.classes)) == 1
    assert len(first.train) + len(second.train) == len(data.train)
    for half in (first, second):
        for image, label in zip(half.train.images, half.train.labels, strict=True):
            assert half.classes[label] == f"class {image[0, 0, 0]}"  # type: ignore[call-overload, index]
    assert split_classes(data, seed=2)[0].classes == first.classes
    assert any(split_classes(data, seed=seed)[0].classes != first.classes for seed in range(5))
    with pytest.raises(DataError, match="at least four"):
        split_classes(many_classes(3))


def test_words_are_of_another_class_and_change_the_picture_only() -> None:
    data = color_task(pixels=64)
    attacked = write_words(data, {"red": "RED"}, seed=1)
    assert attacked.classes == data.classes
    assert (attacked.test.labels == data.test.labels).all()
    for before, after in zip(data.test.images, attacked.test.images, strict=True):
        assert before.shape == after.shape  # type: ignore[union-attr]
        changed = (np.asarray(before) != np.asarray(after)).any(2).mean()
        assert 0 < changed < 0.6
    again = write_words(data, {"red": "RED"}, seed=1)
    assert all((a == b).all() for a, b in zip(attacked.test.images, again.test.images, strict=True))


@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_as_many_objects_are_drawn_as_the_class_says_and_none_overlap(count: int) -> None:
    image, placed = _drawn(np.random.default_rng(count), count)
    assert len(placed) == count
    for number, (x, y, r) in enumerate(placed):
        assert tuple(int(v) for v in image[round(y), round(x)]) in COLORS.values()
        assert all((x - a) ** 2 + (y - b) ** 2 > (r + s) ** 2 for a, b, s in placed[:number])


def test_counting_is_a_task_of_counts() -> None:
    data = counting_task([1, 3, 10], images=4)
    assert data.classes == ("one object", "three objects", "ten objects")
    assert (len(data.train), len(data.test)) == (12, 6)
    with pytest.raises(DataError, match="from 0 to 10"):
        counting_task([3, 11])


def test_multiple_choice_has_whole_prompts_as_classes() -> None:
    data = multiple_choice(images=2)
    assert len(data.classes) == len(COLORS) * len(SHAPES)
    assert "Question: what is it? Answer: a red circle" in data.classes
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        color = next(name for name in COLORS if f" {name} " in data.classes[label])
        pixels = np.asarray(image).reshape(-1, 3)
        assert (pixels == COLORS[color]).all(1).sum() > 100
    assert replace(data).task.name == "multiple choice"
