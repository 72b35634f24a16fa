"""Methods side by side."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from torch import nn

from conftest import small_preprocessing
from modelpatch.backbone import Backbone, load_backbone
from modelpatch.methods import COMPARED, LinearProbe, ScaleBias
from modelpatch.patch import Task
from modelpatch.train import Split, TaskData, compare, evaluate, harmonic_mean


@pytest.fixture
def base() -> TaskData:
    """Test images for the five outputs of the tiny backbone's own head."""
    images = list(np.random.default_rng(0).integers(0, 255, (10, 16, 16, 3), dtype=np.uint8))
    split = Split(images, np.arange(10) % 5)
    return TaskData(Task(name="base", classes=tuple("abcde")), split, split)


@pytest.mark.filterwarnings("ignore:piggyback")
def test_every_method_has_its_row_and_its_patch(tiny: Backbone, colors: TaskData) -> None:
    result = compare(tiny, colors, epochs=1)
    assert [row.method for row in result.rows] == list(COMPARED) == list(result.patches) == list(result.runs)
    assert (result.task, result.backbone, result.skipped) == ("colors", tiny.spec, {})
    for row in result.rows:
        patch = result.patches[row.method]
        assert row.top1 == evaluate(tiny, patch, colors).top1
        assert row.file_bytes == patch.inspect().file_bytes
        assert row.seconds > 0
        assert row.base_before is row.base_after is row.harmonic_mean is None
    assert json.loads(json.dumps(result.as_dict()))["rows"][0]["method"] == "linear-probe"


def test_the_base_is_measured_before_and_after(tiny: Backbone, colors: TaskData, base: TaskData) -> None:
    (row,) = compare(tiny, colors, ["full-finetune"], base=base, epochs=1).rows
    assert row.base_before == row.base_after
    assert row.base_after is not None
    assert row.harmonic_mean == harmonic_mean(row.top1, row.base_after)


def test_trained_numbers_are_the_methods_and_the_heads(tiny: Backbone, colors: TaskData) -> None:
    methods = [LinearProbe(), ScaleBias(), ScaleBias(head="random")]
    head = 3 * tiny.chain.feature_dim + 3
    affine = ScaleBias().count_parameters(tiny)
    result = compare(tiny, colors, methods, epochs=1)
    assert [row.trainable_parameters for row in result.rows] == [head, affine + head, affine]


def test_a_method_that_cannot_patch_the_backbone_is_left_out_with_the_reason(colors: TaskData) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 5))
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    result = compare(backbone, colors, ["scale-bias", "linear-probe"], epochs=1)
    assert [row.method for row in result.rows] == ["linear-probe"]
    assert "no convolution to scale" in result.skipped["scale-bias"]


def test_seeds_give_a_mean_and_its_standard_error(tiny: Backbone, colors: TaskData) -> None:
    result = compare(tiny, colors, ["linear-probe", "linear-probe(lr=0.1)"], seeds=3, seed=4, epochs=1)
    for row in result.rows:
        runs = result.runs[row.method]
        assert [run.seed for run in runs] == [4, 5, 6]
        top1 = [run.top1 for run in runs]
        assert row.top1 == pytest.approx(np.mean(top1))
        assert row.top1_error == pytest.approx(np.std(top1, ddof=1) / np.sqrt(3))
    single = compare(tiny, colors, ["linear-probe"], seed=4, epochs=1)
    assert single.rows[0].top1_error is None
    assert single.rows[0].top1 == result.runs["linear-probe"][0].top1


def test_the_same_method_twice_has_two_rows(tiny: Backbone, colors: TaskData) -> None:
    result = compare(tiny, colors, [LinearProbe(), LinearProbe()], epochs=1)
    assert [row.method for row in result.rows] == ["linear-probe", "linear-probe (2)"]


def test_a_method_whose_library_is_missing_is_left_out_with_the_reason(
    tiny: Backbone, colors: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = compare(tiny, colors, ["lora", "linear-probe"], epochs=1)
    assert [row.method for row in result.rows] == ["linear-probe"]
    assert "modelpatch[lora]" in result.skipped["lora"]
