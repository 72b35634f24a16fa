"""modelpatch extract, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import CLASSES, Run
from modelpatch.backbone.load import load_backbone
from modelpatch.convert.extraction import DELTA_CODECS
from modelpatch.data.task import load_task
from modelpatch.patch.contents import Patch
from modelpatch.train import evaluate

pytestmark = pytest.mark.slow

TINY = "bundled:tiny"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The bundled network with other numbers and a head for three classes."""
    torch.manual_seed(0)
    backbone = load_backbone(TINY)
    state = {
        n: t * (1 + 0.02 * torch.randn_like(t)) if t.is_floating_point() else t
        for n, t in backbone.module.state_dict().items()
    }
    state[f"{backbone.classifier}.weight"] = torch.randn(3, backbone.chain.feature_dim)
    state[f"{backbone.classifier}.bias"] = torch.zeros(3)
    safetensors.torch.save_file(state, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def test_extract_measures_every_codec_and_writes_the_named_one(
    run: Run, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "colors.safetensors"
    options = [
        "--base",
        TINY,
        "--finetuned",
        checkpoint,
        "--data",
        folder,
        "--codec",
        "sign",
        "-o",
        out,
        "--rank",
        2,
        "--calibrate",
        3,
    ]
    result = run("extract", *options, "--json", tmp_path / "x.json")
    assert result.code == 0, result.err
    assert all(codec in result.out for codec in DELTA_CODECS)
    rows = json.loads((tmp_path / "x.json").read_text())["codecs"]
    assert [row["codec"] for row in rows] == [*DELTA_CODECS, "sign, calibrated", "two-bit, calibrated"]
    patch = Patch.load(out)
    assert patch.method.hyperparameters == {"codec": "sign", "calibration": 3}
    assert out.stat().st_size == next(row["file_bytes"] for row in rows if row["codec"] == "sign, calibrated")
    assert patch.metrics["test_top1"] == evaluate(load_backbone(TINY), patch, load_task(folder)).top1
    assert run("verify", out).code == 0
    assert "exists already" in run("extract", *options).err


def test_extract_names_classes_or_numbers_them(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    for text, expected in ((",".join(CLASSES), CLASSES), (names, CLASSES), (None, ("0", "1", "2"))):
        given = () if text is None else ("--classes", text)
        result = run("extract", "--base", TINY, "--finetuned", checkpoint, *given, "--force")
        assert result.code == 0, result.err
        assert Patch.load(checkpoint.with_name("tuned.patch.safetensors")).task.classes == expected


def test_extract_says_in_one_line_what_is_wrong(run: Run, checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    for options, problem in (
        (["--finetuned", tmp_path / "none.pth"], "does not exist. Expected a safetensors file"),
        (["--finetuned", checkpoint, "--codec", "zip"], "unknown codec"),
        (["--finetuned", checkpoint, "--classes", "a,a"], "names nothing, or something twice"),
        (["--finetuned", checkpoint, "--classes", "a,b,c", "--data", folder], "has no folder of the class 'a'"),
        (["--finetuned", checkpoint, "--label-column", "a"], "--label-column is for reading data. Give --data"),
    ):
        result = run("extract", "--base", TINY, *options)
        assert result.code == 1
        assert result.err.startswith("error: ")
        assert problem in result.err.replace("\n", " ")
        assert "Traceback" not in result.err
