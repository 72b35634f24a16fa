"""modelpatch merge, diff and --alpha, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run
from modelpatch.patch.contents import Patch

pytestmark = pytest.mark.slow


def test_merge_writes_one_patch_of_several(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    result = run("merge", *patches.values(), "-o", out, "--weights", "1,0.5", "--head", "all")
    assert result.code == 0, result.err
    patch = Patch.load(out)
    assert patch.method.hyperparameters["weights"] == [1.0, 0.5]
    assert len(patch.task.classes) == sum(len(Patch.load(path).task.classes) for path in patches.values())
    assert run("verify", out).code == 0
    assert "exists already" in run("merge", *patches.values(), "-o", out).err
    ties = run("merge", *patches.values(), "-o", out, "--rule", "ties", "--density", "0.5", "--alpha", "0.5", "--force")
    assert ties.code == 0, ties.err


def test_diff_says_where_two_patches_differ(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    path = patches["scale-bias"]
    assert "the two compute the same" in run("diff", path, path).out
    other = tmp_path / "half.safetensors"
    Patch.load(path).with_alpha(0.5).save(other)
    result = run("diff", path, other, "--json", tmp_path / "d.json")
    assert "the two compute different answers" in result.out
    assert "strength" in result.out
    assert json.loads((tmp_path / "d.json").read_text())["total"]["cosine"] == pytest.approx(1)


def test_alpha_turns_a_patch_when_it_is_used(run: Run, patches: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    path, half = patches["scale-bias"], tmp_path / "half.safetensors"
    Patch.load(path).with_alpha(0.5).save(half)
    image = next(folder.rglob("*.png"))
    answers = []
    for options in (["-p", path, "--alpha", "0.5"], ["-p", half], ["-p", path]):
        run("predict", image, *options, "--json", tmp_path / "a.json")
        answers.append(json.loads((tmp_path / "a.json").read_text())[0]["tasks"])
    assert [list(answer.values()) for answer in answers[:1]] == [list(answer.values()) for answer in answers[1:2]]
    assert list(answers[0].values()) != list(answers[2].values())
    assert "expected a number from 0" in run("predict", image, "-p", path, "--alpha", "2").err


def test_patches_of_two_backbones_and_odd_options_are_one_line(
    run: Run, patches: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    for options, problem in (
        (["--weights", "a,b"], "not numbers"),
        (["--head", "x"], "neither 'all'"),
        (["--rule", "max"], "no rule"),
    ):
        result = run("merge", *patches.values(), "-o", out, *options)
        assert (result.code, result.err.startswith("error: ")) == (1, True)
        assert problem in result.err
