"""profile, select, search and label on the command line: files, pictures, resumption, errors in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from conftest import Run
from modelpatch.errors import ModelpatchError
from modelpatch.patch.contents import Patch
from modelpatch.report.selection import contact_sheet
from modelpatch.select.active import Pick

pytestmark = pytest.mark.slow

FAST = ("--epochs", 1, "--image-size", 32)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("unit", "rows"), [((), 8), (("--stages",), 4), (("--consecutive", 3), 6)])
def test_profile_draws_and_writes_a_row_a_unit(run: Run, folder: Path, unit: tuple[object, ...], rows: int) -> None:
    result = run("profile", folder, *FAST, "-m", "scale-bias", *unit, "--plot", "bars.png", "--json", "profile.json")
    assert result.code == 0, result.err
    assert "linear probe" in result.out
    assert len(json.loads(Path("profile.json").read_text())["rows"]) == rows
    assert Image.open("bars.png").width > 100
    assert Path("colors.trials.jsonl").exists()


def test_profile_of_fewer_images_and_a_word_on_interruption(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelpatch.select.trials import Bench

    seen: list[int] = []

    def stop(self: Bench, trial: object) -> None:
        seen.append(len(self.folds.images))
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run", stop)
    result = run("profile", folder, *FAST, "--images", 12, "--trials", "kept.jsonl")
    assert result.code == 130
    assert "finished trials are in kept.jsonl" in result.err
    assert seen == [12]


def test_profile_of_pairs_draws_a_heat_map(run: Run, folder: Path) -> None:
    result = run("profile", folder, *FAST, "--pairs", "-m", "scale-bias", "--plot", "pairs.png", "--json", "pairs.json")
    assert result.code == 0, result.err
    assert len(json.loads(Path("pairs.json").read_text())["rows"]) == 8 * 7 // 2
    assert Image.open("pairs.png").height > 100


def test_select_prints_its_rounds_writes_a_patch_and_reuses_a_profile(run: Run, folder: Path) -> None:
    among = "stages.2.blocks.1,stages.3.blocks.0"
    command = ("select", folder, *FAST, "--folds", 2, "--among", among, "--epsilon", 0, "-o", "best.safetensors")
    result = run(*command, "--plot", "order.png", "--json", "select.json")
    assert result.code == 0, result.err
    assert "round 1" in result.out
    assert "test top-1" in result.out
    figures = json.loads(Path("select.json").read_text())
    patch = Patch.load(Path("best.safetensors"))
    assert list(patch.method.hyperparameters["blocks"]) == figures["blocks"]
    assert figures["test"]["test_top1"] == patch.metrics["test_top1"]
    assert Image.open("order.png").width > 100
    lines = Path("colors.trials.jsonl").read_text()
    again = run(*command, "--force")
    assert again.code == 0, again.err
    assert Path("colors.trials.jsonl").read_text() == lines
    assert Patch.load(Path("best.safetensors")).content_hash == patch.content_hash
    refused = run(*command)
    assert refused.code == 1
    assert "--force" in refused.err


def test_search_keeps_its_budget(run: Run, folder: Path) -> None:
    result = run(
        "search", folder, *FAST, "--methods", "linear-probe,scale-bias", "--max-bytes", "30KB", "--tries", 3,
        "--plot", "pareto.png", "--json", "search.json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert Path("colors.safetensors").stat().st_size <= 30_000
    assert json.loads(Path("search.json").read_text())["file_bytes"] == Path("colors.safetensors").stat().st_size
    assert Image.open("pareto.png").width > 100
    assert "left out before training" in result.out
    assert "not drawn among 3 tries" in result.out


def test_a_busy_machine_is_named_before_times_are_measured(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    search = ("search", folder, *FAST, "--methods", "linear-probe", "--halving", 0)
    assert "this machine is busy" in run(*search, "--max-latency", "+500%").out
    assert "this machine is busy" not in run(*search, "--force").out


def test_profiles_of_several_sizes_stand_beside_each_other(run: Run, folder: Path) -> None:
    sizes = ("profile", folder, *FAST, "--stages", "-m", "scale-bias", "--sizes", "9,12")
    result = run(*sizes, "--plot", "sizes.png", "--json", "sizes.json")
    assert result.code == 0, result.err
    assert [one["images"] for one in json.loads(Path("sizes.json").read_text())] == [9, 12]
    assert Image.open("sizes.png").width > 100
    refused = run(*sizes, "--images", 12)
    assert refused.code == 1
    assert "Leave --images and --pairs out" in refused.err


def test_label_lists_and_shows_images(run: Run, folder: Path, patches: dict[str, Path]) -> None:
    asked = ("label", folder, "--unlabeled", folder / "test", "--budget", 5)
    result = run(*asked, "-p", patches["scale-bias"], "--out", "next.csv")
    assert result.code == 0, result.err
    result = run(*asked, *FAST, "-m", "linear-probe", "--out", "next.csv", "--sheet", "sheet.png")
    assert result.code == 0, result.err
    rows = list(csv.DictReader(Path("next.csv").read_text().splitlines()))
    assert len(rows) == 5
    assert all(Path(row["image"]).exists() for row in rows)
    assert [float(row["margin"]) for row in rows] == sorted(float(row["margin"]) for row in rows)
    assert Image.open("sheet.png").width == 5 * 128
    result = run(*asked, "-p", patches["scale-bias"], "--weights", "gone.pth")  # for the network that the patch names
    assert "--weights gone.pth: there is no such file" in result.err


def test_a_sheet_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    picks, sheet = [Pick(0, 0.1, "red", "blue")], tmp_path / "gone" / "sheet.png"
    with pytest.raises(ModelpatchError, match=r"cannot write .*sheet\.png.*has room"):
        contact_sheet(picks, [Image.new("RGB", (8, 8))], sheet)


def test_an_unreadable_image_is_named_and_left_out(run: Run, folder: Path, patches: dict[str, Path]) -> None:
    pool = Path("pool")
    pool.mkdir()
    good = sorted((folder / "test").rglob("*.png"))[:3]
    for image in good:
        (pool / image.name).write_bytes(image.read_bytes())
    (pool / "a.jpg").write_bytes(b"no image")
    asked = ("label", folder, "--unlabeled", pool, "-p", patches["scale-bias"], "--out", "next.csv")
    result = run(*asked)
    assert result.code == 0, result.err
    assert "left out: " in result.out
    assert "a.jpg" in result.out
    picked = {Path(row["image"]).name for row in csv.DictReader(Path("next.csv").read_text().splitlines())}
    assert picked == {image.name for image in good}
    for image in good:
        (pool / image.name).unlink()
    refused = run(*asked)
    assert refused.code == 1
    assert "none of the 1 images can be read" in refused.err


def test_label_simulates(run: Run, folder: Path) -> None:
    result = run(
        "label", folder, *FAST, "-m", "linear-probe", "--simulate", "6,12", "--seeds", 2, "--plot", "curves.png"
    )
    assert result.code == 0, result.err
    assert "margin" in result.out
    assert Image.open("curves.png").width > 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("profile", "--pairs", "--stages"), "exclude each other"),
        (("profile", "--halving", 1), "Give 2 or more"),
        (("profile", "--ray-address", "auto"), "without --ray"),
        (("profile", "-m", "linear-probe"), "nothing to change"),
        (("profile", "--fit", "early_stopping=3"), "early_stopping"),
        (("profile", "--disk", "much"), "no number of bytes"),
        (("select", "--start", "all"), "rule='code'"),
        (("select", "--among", "stages.9"), "no block 'stages.9'"),
        (("select", "--max-latency", "slow"), "no added latency"),
        (("search", "--max-bytes", "200XB"), "no number of bytes"),
        (("label",), "either --unlabeled"),
        (("label", "--simulate", "5,many"), "whole numbers"),
        (("label", "--simulate", "5,9", "--sheet", "sheet.png"), "leave --patch, --out and --sheet out"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, folder: Path, arguments: tuple[object, ...], words: str) -> None:
    verb, *rest = arguments
    result = run(verb, folder, *FAST, *rest)
    assert result.code == 1
    assert words in result.err
    assert "Traceback" not in result.err
