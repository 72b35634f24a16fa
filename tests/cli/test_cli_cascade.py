"""modelpatch cascade, and what takes its file, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run
from modelpatch.engine.cascade import Cascade

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Patches of one task at two resolutions, trained for one epoch, that held out the same images."""
    from typer.testing import CliRunner

    from modelpatch.cli.main import app

    root = tmp_path_factory.mktemp("sized")
    paths = [root / f"colors-{pixels}.safetensors" for pixels in (32, 64)]
    for path, pixels in zip(paths, ("32", "64"), strict=True):
        options = ["--epochs", "1", "--image-size", pixels, "-m", "linear-probe", "--fit", "validation=0.25"]
        result = CliRunner().invoke(app, ["fit", str(folder), "-o", str(path), *options])
        assert result.exit_code == 0, result.output
    return paths


def test_a_cascade_is_built_measured_and_used(run: Run, folder: Path, sized: list[Path], tmp_path: Path) -> None:
    pictures = ["--plot", tmp_path / "cascade.png", "--json", tmp_path / "cascade.json"]
    result = run("cascade", *sized, "--data", folder, "--accuracy", 0.1, *pictures)
    assert result.code == 0, result.err
    file = sized[0].parent / "colors.cascade.json"
    assert f"wrote {file}" in result.out
    assert "fewer multiply-adds on test images" in " ".join(result.out.split())
    assert (tmp_path / "cascade.png").stat().st_size > 0
    figures = json.loads((tmp_path / "cascade.json").read_text())
    assert [single["name"] for single in figures["singles"]] == ["colors-32", "colors-64"]
    assert len(Cascade.load(file).patches) == len(figures["order"])
    measured = json.loads(run("eval", folder, "-p", file, "--json", "-").out)
    assert measured["top1"] == figures["test"]["top1"]
    assert measured["macs"] == pytest.approx(figures["test"]["macs"])
    shown = run("eval", folder, "-p", file)
    assert "multiply-adds" in shown.out
    assert "answered by stage 1" in shown.out
    image = next((folder / "test").rglob("*.png"))
    (row,) = json.loads(run("predict", image, "-p", file, "--json", "-").out)
    assert set(row["tasks"]) == {"colors"}
    taken = run("cascade", *sized, "--data", folder)
    assert taken.code == 1
    assert "exists already. Give --force to replace it" in taken.err
    assert run("cascade", *sized, "--data", folder, "--force", "--confidence", "fitted").code == 0
    never = run("cascade", *sized, "--data", folder, "--force", "--accuracy", 0.1)
    assert never.code == 0, never.err
    assert ("no cascade of these patches" in never.out) == (len(Cascade.load(file).patches) == 1)
    assert "is for eval, predict and serve --cascade" in run("inspect", file).err


def test_what_cannot_be_a_cascade_is_one_line(
    run: Run, folder: Path, sized: list[Path], patches: dict[str, Path], tmp_path: Path
) -> None:
    for arguments, problem in (
        ([sized[0], sized[0]], "a patch file is given twice"),
        ([sized[0], "-o", sized[0].parent / "n.json"], "1 patches; a cascade is built of 2 to 32"),
        ([*sized, "-o", tmp_path / "c.json"], "does not lie beside"),
        ([*sized, "-o", sized[0].parent / "c.txt"], "Expected one that ends in .json"),
        (
            [*sized, "-o", sized[0].parent / "n.json", "--accuracy", 2],
            "the accuracy to keep is 2; expected one above 0",
        ),
    ):
        result = run("cascade", *arguments, "--data", folder)
        assert (result.code, problem in " ".join(result.err.split())) == (1, True), result.err


def test_what_holds_for_patches_alone_is_refused(run: Run, folder: Path, sized: list[Path]) -> None:
    file = sized[0].parent / "alone.json"
    assert run("cascade", *sized, "--data", folder, "-o", file).code == 0
    assert "--alpha turns the strength of a patch" in run("eval", folder, "-p", file, "--alpha", 0.5).err
    image = next((folder / "test").rglob("*.png"))
    assert "is a cascade" in run("predict", image, "-p", file, "--labels", "a,b").err
    file.write_text("{}")
    assert "is no cascade" in run("eval", folder, "-p", file).err
