"""modelpatch export, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run
from modelpatch.backbone.load import load_backbone
from modelpatch.patch.contents import Patch

pytestmark = pytest.mark.slow


def test_export_writes_a_model_and_checks_it_on_images(
    run: Run, patches: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    options = ["-f", "onnx", "-o", out, "--data", folder, "--images", 6, "--alpha", "0.5"]
    result = run("export", patches["scale-bias"], *options, "--json", tmp_path / "x.json")
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["equal_answers"] == figures["images"] == 6
    assert figures["bytes"] == out.stat().st_size
    assert "exists already" in run("export", patches["scale-bias"], *options).err


def test_export_of_weights_is_a_backbone_again(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert run("export", patches["scale-bias"], "-o", out).code == 0
    patch = Patch.load(patches["scale-bias"])
    assert load_backbone(f"file:{out}").classes == patch.task.classes


def test_export_says_in_one_line_what_is_wrong(
    run: Run, patches: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    for options, problem in (
        (["-f", "tflite"], "unknown format"),
        (["--data", folder], "--data checks the format onnx"),
    ):
        result = run("export", patches["scale-bias"], "-o", tmp_path / "x", *options)
        assert (result.code, problem in result.err) == (1, True)


def test_several_patches_are_exported_as_one_graph_and_checked(
    run: Run, patches: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    out, files = tmp_path / "tasks.onnx", [patches["scale-bias"], patches["linear-probe"]]
    assert "all in one with --one-graph" in run("export", *files, "-o", out).err
    assert "holds one patch" in run("export", *files, "-o", out, "--one-graph", "-f", "safetensors").err
    assert "given twice" in run("export", *files, files[0], "-o", out, "--one-graph").err
    assert "torch-export ends in .pt2" in run("export", *files, "-o", out, "--one-graph", "-f", "torch-export").err
    options = ["--one-graph", "--data", folder, "--images", 6, "--json", tmp_path / "x.json"]
    result = run("export", *files, "-o", out, *options)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "x.json").read_text())
    assert [one["equal_answers"] for one in figures["tasks"].values()] == [6, 6]
