"""modelpatch-studies: what it lists, what it writes, and what it says where it cannot begin."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Run, write_folder
from modelpatch_studies import registry
from modelpatch_studies.normalisation import TABLE_6
from modelpatch_studies.registry import RECIPES, choose

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A recipe whose small scale has one step over two made-up data sets; the folder that holds them."""
    for name in ("one", "two"):
        write_folder(tmp_path / "data" / name)
    scale = replace(TABLE_6.scales["small"], data=("one", "two"), steps=1, seeds=2, images=None)
    recipe = replace(TABLE_6, scales={**TABLE_6.scales, "small": scale})
    monkeypatch.setattr(registry, "RECIPES", (recipe,))
    return tmp_path / "data"


def test_a_table_is_written_and_a_second_run_makes_nothing_anew(run: Run, quick: Path, tmp_path: Path) -> None:
    command = ("run", "k-for-1", "--table", "6", "--data", quick, "--out", tmp_path / "out")
    first = run(*command)
    assert first.code == 0, first.err
    assert "last layer + statistics" in first.out
    assert "K3: statistics alone hurt the last layer" in first.out
    folder = tmp_path / "out" / "k-for-1" / "table-6"
    written = json.loads((folder / "outcome.json").read_text())
    assert {cell["column"] for cell in written["cells"]} == {"one", "two"}
    assert {len(cell["seeds"]) for cell in written["cells"]} == {2}
    assert (folder / "table.md").read_text().startswith("## k-for-1/table-6")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "<table>" in (tmp_path / "out" / "report.html").read_text()
    parts = (folder / "jobs.jsonl").read_bytes()
    assert run(*command).code == 0
    assert (folder / "jobs.jsonl").read_bytes() == parts


def test_all_recipes_are_listed_with_what_they_need(run: Run) -> None:
    result = run("list")
    assert result.code == 0
    for recipe in RECIPES:
        assert recipe.table in result.out
    assert "bundled:digits" in result.out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["nobody"],
            "there are no recipes of 'nobody'. Expected one of: delta-networks, paint, k-for-1, subtuning, piggyback, or all.",
        ),
        (["k-for-1", "--table", "99"], "k-for-1 has no table '99'"),
        (["k-for-1", "--scale", "large"], "has no scale 'large'. Expected one of: small, paper"),
        (["k-for-1", "--data", "nowhere"], "--data nowhere is not a folder"),
        (["k-for-1", "--data", "."], "lacks data sets: rsscn7 (for k-for-1/transfer"),
        (
            ["k-for-1", "--data", ".", "--scale", "paper"],
            "flowers102 (for k-for-1/transfer, k-for-1/section-5.1, k-for-1/table-6",
        ),
        (["k-for-1", "--device", "cuda:77"], "--device cuda:77 is not a device of this machine"),
    ],
)
def test_what_cannot_begin_is_one_line(
    arguments: list[str], problem: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("run", *arguments)
    assert result.code == 1
    assert problem in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


COMMANDS = sorted(
    (page.name, line.partition("#")[0].strip())
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "studies" / "README.md"]
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith("modelpatch-studies run")
)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_names_a_paper_a_table_and_a_scale(page: str, command: str) -> None:
    words = shlex.split(command)[2:]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options.keys() <= {"--table", "--scale", "--data", "--out", "--seeds", "--device"}, page
    assert choose(words[0], options.get("--table"), options.get("--scale", "small"))
