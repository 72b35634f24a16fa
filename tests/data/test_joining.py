"""Several tasks as one over all their classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Run, color_task, make_tiny, write_folder
from modelpatch.data.task import Task, accuracy_by_task, join_tasks
from modelpatch.errors import DataError
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import evaluate
from modelpatch.train.fitting import fit


def named(name: str, classes: tuple[str, ...], seed: int) -> Task:
    return replace(color_task(24, seed=seed), task=TaskRecord(name=name, classes=classes))


FIRST, SECOND = named("first", ("a", "b", "c"), 0), named("second", ("c", "d", "e"), 1)


def test_every_task_has_its_own_labels_and_names() -> None:
    joined = join_tasks([FIRST, SECOND])
    assert joined.task.name == "first+second"
    assert joined.classes == ("a", "b", "first: c", "second: c", "d", "e")
    assert joined.train.labels.tolist() == [*FIRST.train.labels, *(SECOND.train.labels + 3)]
    assert joined.test.labels.tolist() == [*FIRST.test.labels, *(SECOND.test.labels + 3)]
    assert list(joined.train.images) == [*FIRST.train.images, *SECOND.train.images]
    assert joined.validation is None
    assert join_tasks([FIRST]) is FIRST


def test_validation_images_are_joined_where_all_have_them() -> None:
    held = [one.with_validation(0.25, 0) for one in (FIRST, SECOND)]
    joined = join_tasks(held)
    assert joined.validation is not None
    assert len(joined.validation) == sum(len(one.validation or ()) for one in held)
    with pytest.raises(DataError, match="only some of the tasks have validation images; second has none"):
        join_tasks([held[0], SECOND])
    with pytest.raises(DataError, match="no tasks"):
        join_tasks([])
    with pytest.raises(DataError, match="need names of their own; these are first, first"):
        join_tasks([FIRST, FIRST])


@pytest.mark.parametrize("method", ["delta(modules=1)", "scale-bias"])
def test_one_patch_answers_for_all_tasks(method: str) -> None:
    tiny, joined = make_tiny(), join_tasks([FIRST, SECOND])
    patch = fit(tiny, joined, method, epochs=2, batch_size=8)
    assert patch.head.outputs == 6
    whole = evaluate(tiny, patch, joined)
    by_task = accuracy_by_task(whole, joined)
    weights = [len(FIRST.test), len(SECOND.test)]
    assert list(by_task) == ["first", "second"]
    assert np.average(list(by_task.values()), weights=weights) == pytest.approx(whole.top1)
    assert accuracy_by_task(whole, FIRST) == {}


def test_several_data_sets_of_fit_are_one_task(run: Run, tmp_path: Path) -> None:
    data: list[Any] = [
        write_folder(tmp_path / "colors"),
        write_folder(tmp_path / "shades", ("dark", "light", "medium")),
    ]
    path = tmp_path / "both.safetensors"
    run("fit", *data, "-m", "linear-probe", "-o", path, "--epochs", 1, "--image-size", 32)
    shown = run("eval", *data, "-p", path, "--json", "-")
    assert set(json.loads(shown.out)["by_task"]) == {"colors", "shades"}
    assert "top-1 of shades" in run("eval", *data, "-p", path).out
