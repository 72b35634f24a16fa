"""modelpatch multires as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run
from modelpatch.patch.contents import Patch

pytestmark = pytest.mark.slow


def test_multires_writes_a_backbone_and_its_patches_and_compares(run: Run, folder: Path, tmp_path: Path) -> None:
    command = ["multires", folder, "--resolutions", "32,48", "--epochs", 1, "--batch-size", 12, "-o", tmp_path / "out"]
    plot = ["--sharing", "private,shared", "--plot", tmp_path / "lines.png", "--json", tmp_path / "figures.json"]
    result = run(*command, *plot)
    assert result.code == 0, result.err
    assert "32 px" in result.out
    assert (
        f"private: patches at 32 px, 48 px over file:colors-private-seed0.safetensors in {tmp_path / 'out'}"
        in result.out
    )
    assert (tmp_path / "lines.png").stat().st_size > 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["sharing"] for row in figures["rows"]] == ["private", "shared"]
    patch = tmp_path / "out" / "colors-private-seed0-32px.safetensors"
    assert Patch.load(patch).preprocessing.image_size == 32
    measured = run("eval", folder, "-p", patch, "--json", "-")
    assert json.loads(measured.out)["top1"] == figures["rows"][0]["top1"]["32"]["value"]
    again = run(*command, *plot)  # nothing is trained again
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert again.out.splitlines()[:4] == result.out.splitlines()[:4]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--resolutions", "32,big"], "--resolutions '32,big' is not N1,N2,...: whole numbers above 0"),
        (["--resolutions", "32"], "expected at least two different ones"),
        (
            ["--sharing", "some"],
            "--sharing 'some' is unknown. Expected some of: private, shared, independent, or 'all'.",
        ),
        (["--image-size", "32"], "--image-size is given beside --resolutions"),
        (["--set", "speed=1"], "has no hyperparameter 'speed'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    run: Run, folder: Path, tmp_path: Path, options: list[str], problem: str
) -> None:
    result = run("multires", folder, "-o", tmp_path / "out", *options)
    assert result.code == 1
    assert problem in result.err
