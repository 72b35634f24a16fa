"""A patch without a method: chosen on held-out images alone, within limits, the same for a seed, and told."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import color_task, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.errors import CheckpointMismatchError, TrainingError, TrainingWarning
from modelpatch.patch.contents import Patch
from modelpatch.select import automatic
from modelpatch.select.automatic import LONG, PROBE, RECORD, Chooser, Limit, Tried, fit
from modelpatch.train.fitting import Fit

SETTINGS: dict[str, Any] = {"epochs": 1, "batch_size": 24}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


@pytest.fixture(scope="module")
def task() -> Task:
    return color_task(30)


@pytest.fixture(scope="module")
def chosen(backbone: Backbone, task: Task) -> Patch:
    return fit(backbone, task, **SETTINGS)


def test_all_that_was_tried_is_in_the_patch_with_the_reason(chosen: Patch) -> None:
    choice = chosen.created["choice"]
    tried = choice["tried"]
    assert {one["augment"] for one in tried[:4]} == {"none", "light", "standard", "strong"}
    assert {one["name"] for one in tried[:4]} == {"scale-bias"}
    assert tried[-1]["name"] == PROBE
    best = [one for one in tried if (one["name"], one["augment"]) == (choice["method"], choice["augment"])]
    assert best
    assert choice["why"].startswith(f"{choice['method']} under {choice['augment']} augmentation")
    assert chosen.created["settings"]["augment"] == choice["augment"]
    assert chosen.inspect().stored == {"float16": chosen.inspect().stored["float16"]}


@pytest.mark.slow
def test_a_choice_follows_the_seed(backbone: Backbone, task: Task, chosen: Patch) -> None:
    again = fit(backbone, task, "auto", **SETTINGS)
    assert again.created["choice"] == chosen.created["choice"]
    assert again.content_hash == chosen.content_hash


def test_no_test_image_is_read_before_the_choice_is_made(
    backbone: Backbone, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser = Chooser.of(backbone, task, Limit(), SETTINGS)
    monkeypatch.setattr(chooser, "task", replace(task, test=Split([Path("absent.png")], task.test.labels[:1])))
    choice = chooser.choose()
    assert choice.tried
    assert all(one.score is not None for one in choice.tried if one.name in ("scale-bias", PROBE))


@pytest.mark.slow
def test_limits_leave_out_what_breaks_them(backbone: Backbone, task: Task) -> None:
    chooser = Chooser.of(backbone, task, Limit(), SETTINGS)
    chooser.choose()
    sizes = {one.name: one.file_bytes for one in chooser.tried}
    most = (sizes[PROBE] + sizes["scale-bias"]) // 2 + RECORD
    patch = fit(backbone, task, max_bytes=most, **SETTINGS)
    choice = patch.created["choice"]
    assert choice["method"] == PROBE
    assert patch.inspect().file_bytes <= most
    assert all("more than the limit" in one["reason"] for one in choice["tried"] if one["name"] != PROBE)
    with pytest.raises(TrainingError, match="no patch that was tried keeps the limits"):
        fit(backbone, task, max_bytes=10, **SETTINGS)


def test_a_budget_is_a_number_of_trials_or_a_time(backbone: Backbone, task: Task) -> None:
    patch = fit(backbone, task, budget=2, **SETTINGS)
    assert len(patch.created["choice"]["tried"]) == 2
    assert Limit.read(None, None, "90s").seconds == 90
    assert Limit.read(None, None, "5min").seconds == 300
    assert Limit.read(None, None, "3 trials").trials == 3
    for wrong in ("soon", "0", "-1min", "1.5", True):
        with pytest.raises(TrainingError, match="expected trials or a time"):
            Limit.read(None, None, wrong)


def test_what_goes_with_a_method_is_refused(backbone: Backbone, task: Task) -> None:
    with pytest.raises(TrainingError, match="max_bytes limits what is chosen, but the method is given"):
        fit(backbone, task, "scale-bias", max_bytes=1000)
    with pytest.raises(TrainingError, match="goes with a method"):
        fit(backbone, task, optimizer=dict)
    with pytest.raises(TrainingError, match=r"max_latency = 'fast' is not valid"):
        fit(backbone, task, max_latency="fast")  # type: ignore[arg-type]


def test_where_nothing_can_be_held_out_the_first_method_is_trained_with_a_warning(backbone: Backbone) -> None:
    with pytest.warns(TrainingWarning, match="scale-bias is trained, since nothing can be held out"):
        patch = fit(backbone, color_task(3), **SETTINGS)
    assert patch.created["choice"]["tried"] == []


@pytest.mark.slow
def test_an_interrupted_choice_goes_on_and_its_file_is_read_again(
    backbone: Backbone, task: Task, chosen: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"out": tmp_path / "p.safetensors", "checkpoint": tmp_path / "run", **SETTINGS}
    score, counted = Chooser.score, list[float]()

    def stop(self: Chooser, run: Fit, share: float) -> float:
        counted.append(share)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return score(self, run, share)

    monkeypatch.setattr(Chooser, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(backbone, task, **files)
    patch = fit(backbone, task, **files)
    scored = [one for one in chosen.created["choice"]["tried"] if one["score"] is not None]
    assert len(counted) == len(scored) + 1  # the third twice
    assert patch.content_hash == chosen.content_hash
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert fit(backbone, task, reuse=True, **files).content_hash == chosen.content_hash
    with pytest.raises(CheckpointMismatchError):
        fit(backbone, task, reuse=True, **{**files, "seed": 1})


def test_the_probe_must_be_better_by_a_standard_error(backbone: Backbone, task: Task) -> None:
    chooser = Chooser.of(backbone, task, Limit(), SETTINGS)
    others = [Tried("scale-bias", "none", LONG, 0.8), Tried("scale-bias", "light", 0.2, 0.9)]
    assert len(chooser.data.validation or ()) == 6
    for score, first in ((0.85, "scale-bias"), (1.0, PROBE)):
        assert chooser.rank([*others, Tried(PROBE, "none", LONG, score)])[0].name == first


def test_a_transform_stands_in_place_of_augmentations(backbone: Backbone, task: Task) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chooser = Chooser.of(backbone, task, Limit(), {**SETTINGS, "transform": lambda image: image})
    assert chooser.augments == ("auto",)
    assert automatic.SHORT < LONG
