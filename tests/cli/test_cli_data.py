"""The verb `data`, and the lines about data that other verbs begin with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from conftest import Run, write_folder
from modelpatch.cli import data as verb
from modelpatch.data import report


@pytest.fixture
def folder_with_twin(tmp_path: Path) -> Path:
    """Class folders in which a test image is a training image too."""
    root = write_folder(tmp_path / "colors")
    first = min((root / "train" / "red").iterdir())
    shutil.copy(first, root / "test" / "red" / "twin.png")
    return root


def test_data_shows_what_is_read(folder_with_twin: Path, run: Run, tmp_path: Path) -> None:
    sheet, figures = tmp_path / "sheet.png", tmp_path / "data.json"
    done = run("data", folder_with_twin, "--near", "--sheet", sheet, "--json", figures)
    assert done.code == 0, done.err
    assert "colors: classification, 3 classes, 24 train, 13 test images" in done.out
    assert "warning: 1 image of test is in train too" in done.out
    assert f"drew {sheet}" in done.out
    assert Image.open(sheet).width > 0
    found = json.loads(figures.read_text())
    assert found["splits"][0]["classes"] == {"blue": 8, "green": 8, "red": 8}
    assert "twice" in {finding["code"] for finding in found["findings"]}


def test_names_alone_and_a_strict_end(folder_with_twin: Path, run: Run) -> None:
    done = run("data", folder_with_twin, "--images", "0", "--strict")
    assert done.code == 1
    assert "the same file" in done.out
    assert "pixels" not in done.out
    (folder_with_twin / "test" / "red" / "twin.png").unlink()
    assert run("data", folder_with_twin, "--strict", "-q").code == 0


def test_json_alone_stands_on_standard_output(folder_with_twin: Path, run: Run) -> None:
    done = run("data", folder_with_twin, "--json", "-")
    assert json.loads(done.out)["kind"] == "classification"
    assert "24 train" in done.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("gone",), "gone"),
        ((".", "--sheet", "sheet.txt"), "not a picture format"),
        ((".", "--near", "--images", "0"), "opening images"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], reason: str, folder_with_twin: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_with_twin)
    done = run("data", *arguments)
    assert done.code == 1
    assert reason in done.err


def test_the_help_names_the_default_of_the_report() -> None:
    assert verb.MOST_IMAGES == report.MOST_IMAGES


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("fit", "-m", "linear-probe"), ("compare", "--methods", "linear-probe")], ids=str
)
def test_verbs_that_train_begin_with_the_data(
    arguments: tuple[str, ...], folder_with_twin: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_with_twin.parent)
    done = run(arguments[0], folder_with_twin, *arguments[1:], "--epochs", "1")
    assert done.code == 0, done.err
    assert done.out.startswith("colors: classification, 3 classes, 24 train, 13 test images\nwarning: 1 image of test")
