"""Methods side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from conftest import small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.errors import CheckpointMismatchError, MethodError, TrainingError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.registry import COMPARED
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.recipes import compare
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import evaluate
from modelpatch.train.evaluation import harmonic_mean
from modelpatch.train.fitting import Fit, PatchTrainer

pytestmark = pytest.mark.slow


@pytest.fixture
def base() -> Task:
    """Test images for the five outputs of the tiny backbone's own head."""
    images = list(np.random.default_rng(0).integers(0, 255, (10, 16, 16, 3), dtype=np.uint8))
    split = Split(images, np.arange(10) % 5)
    return Task(TaskRecord(name="base", classes=tuple("abcde")), split, split)


@pytest.mark.filterwarnings("ignore:piggyback")
def test_every_method_has_its_row_and_its_patch(tiny: Backbone, colors: Task) -> None:
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


def test_the_base_is_measured_before_and_after(tiny: Backbone, colors: Task, base: Task) -> None:
    (row,) = compare(tiny, colors, ["full-finetune"], base=base, epochs=1).rows
    assert row.base_before == row.base_after
    assert row.base_after is not None
    assert row.harmonic_mean == harmonic_mean(row.top1, row.base_after)


def test_trained_numbers_are_the_methods_and_the_heads(tiny: Backbone, colors: Task) -> None:
    methods = [LinearProbe(), ScaleBias(), ScaleBias(head="random")]
    head = 3 * tiny.chain.feature_dim + 3
    affine = ScaleBias().count_parameters(tiny)
    result = compare(tiny, colors, methods, epochs=1)
    assert [row.trainable_parameters for row in result.rows] == [head, affine + head, affine]


def test_a_method_that_cannot_patch_the_backbone_is_left_out_with_the_reason(colors: Task) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 5))
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    result = compare(backbone, colors, ["scale-bias", "linear-probe"], epochs=1)
    assert [row.method for row in result.rows] == ["linear-probe"]
    assert "no convolution to scale" in result.skipped["scale-bias"]


def test_seeds_give_a_mean_and_its_standard_error(tiny: Backbone, colors: Task) -> None:
    result = compare(tiny, colors, ["linear-probe", "linear-probe(head_lr=0.1)"], seeds=3, seed=4, epochs=1)
    for row in result.rows:
        runs = result.runs[row.method]
        assert [run.seed for run in runs] == [4, 5, 6]
        top1 = [run.top1 for run in runs]
        assert row.top1 == pytest.approx(np.mean(top1))
        assert row.top1_error == pytest.approx(np.std(top1, ddof=1) / np.sqrt(3))
    single = compare(tiny, colors, ["linear-probe"], seed=4, epochs=1)
    assert single.rows[0].top1_error is None
    assert single.rows[0].top1 == result.runs["linear-probe"][0].top1


def test_the_same_method_twice_has_two_rows(tiny: Backbone, colors: Task) -> None:
    result = compare(tiny, colors, [LinearProbe(), LinearProbe()], epochs=1)
    assert [row.method for row in result.rows] == ["linear-probe", "linear-probe (2)"]


def test_a_method_whose_library_is_missing_is_left_out_with_the_reason(
    tiny: Backbone, colors: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = compare(tiny, colors, ["lora", "linear-probe"], epochs=1)
    assert [row.method for row in result.rows] == ["linear-probe"]
    assert "modelpatch[lora]" in result.skipped["lora"]


# interrupted, and failing ------------------------------------------------------------------------------------


def test_a_comparison_goes_on_where_it_was_interrupted(
    tiny: Backbone, colors: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, settings = ["linear-probe(head_lr=0.1)", "subset(lr=0.01)"], {"seeds": 2, "epochs": 1}
    fitted: list[str] = []
    train = PatchTrainer.train

    def count(self: PatchTrainer) -> Any:
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(self.method.name)
        return train(self)

    with monkeypatch.context() as patched:
        patched.setattr(PatchTrainer, "train", count)
        with pytest.raises(KeyboardInterrupt):
            compare(tiny, colors, methods, out=tmp_path, **settings)  # type: ignore[arg-type]
        fitted.clear()
        resumed = compare(tiny, colors, methods, out=tmp_path, **settings)  # type: ignore[arg-type]
    assert fitted == ["subset"]
    whole = compare(tiny, colors, methods, **settings)  # type: ignore[arg-type]
    assert [row.top1 for row in resumed.rows] == [row.top1 for row in whole.rows]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"colors-{name}-seed{seed}.safetensors"
        for name in ("linear-probe-head_lr-0.1-", "subset-lr-0.01-")
        for seed in (0, 1)
    ]


def test_a_patch_of_another_comparison_is_not_taken_for_this_one(tiny: Backbone, colors: Task, tmp_path: Path) -> None:
    compare(tiny, colors, ["linear-probe"], out=tmp_path, epochs=1)
    with pytest.raises(CheckpointMismatchError, match="of a run with another backbone, method, settings or images"):
        compare(tiny, colors, ["linear-probe"], out=tmp_path, epochs=2)


def test_a_method_that_diverges_costs_its_own_row_only(tiny: Backbone, colors: Task) -> None:
    result = compare(tiny, colors, ["linear-probe", "subset(lr=1e30,optimizer=sgd)"], epochs=3)
    assert [row.method for row in result.rows] == ["linear-probe"]
    assert "the loss is" in result.skipped["subset(lr=1e30,optimizer=sgd)"]


def test_what_is_asked_wrongly_is_refused_before_any_training(
    tiny: Backbone, colors: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fit, "run", lambda *_: pytest.fail("it trained"))
    with pytest.raises(MethodError, match="'layer9' names no block"):
        compare(tiny, colors, ["linear-probe", "subset(blocks=layer9)"])
    with pytest.raises(TrainingError, match="epochs = 0"):
        compare(tiny, colors, ["linear-probe"], epochs=0)
