"""multitask on the command line: a folder with a backbone and its patches, resumption, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, write_folder
from modelpatch.backbone.load import load_backbone
from modelpatch.patch.contents import Patch
from modelpatch.train import callbacks
from modelpatch.train.callbacks import Checkpoint

pytestmark = pytest.mark.slow

TINY = "bundled:tiny"
FAST = ("--epochs", 1, "--batch-size", 8, "--image-size", 32)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "shades", ("dark", "light", "medium"))


def test_multitask_writes_a_backbone_and_patches_that_predict_finds(
    run: Run, folder: Path, other: Path, tmp_path: Path
) -> None:
    out, figures = tmp_path / "together", tmp_path / "figures.json"
    options = ["--set", "statistics=frozen", "--weight", "shades=2", "--dtype", "float16", "--fit", "clip=1"]
    command = ["multitask", folder, other, "-m", "scale-bias", *FAST, *options, "-o", out]
    result = run(*command, "--json", figures, "--log", tmp_path / "log")
    assert result.code == 0, result.err
    assert all((tmp_path / "log" / name / "curves.png").stat().st_size for name in ("colors", "shades"))
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.safetensors",
        "colors.safetensors",
        "run.yaml",
        "shades.safetensors",
    ]
    loaded = load_backbone(f"file:{out}/backbone.safetensors")
    written = json.loads(figures.read_text())
    assert written["fingerprint"] == loaded.fingerprint
    assert f"fingerprint {loaded.fingerprint[:12]}" in result.out
    patch = Patch.load(out / "shades.safetensors")
    patch.check_backbone(loaded)
    assert patch.created["multitask"]["shares"] == {"colors": 1 / 3, "shades": 2 / 3}
    assert f"{patch.inspect().file_bytes:,}" in result.out
    assert written["top1"] == sum(task["test_top1"] for task in written["tasks"].values()) / 2
    image = next((folder / "test").rglob("*.png"))
    assert run("predict", image, "-p", out / "shades.safetensors", "-p", out / "colors.safetensors").code == 0
    again = run("multitask", folder, other, *FAST, "-o", out)
    assert again.code == 1
    assert "backbone.safetensors exists already. Give --force" in again.err


def test_an_interrupted_run_resumes_when_the_same_command_is_given_again(
    run: Run, folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["multitask", folder, other, "-m", "linear-probe", *FAST, "-o", tmp_path / "out"]
    save = Checkpoint.save

    def stop(self: Checkpoint, state: dict[str, Any]) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(callbacks, "EVERY_SECONDS", 0)
        patched.setattr(Checkpoint, "save", stop)
        stopped = run(*command)
    assert stopped.code == 130
    assert "resumes when the same command is given again" in stopped.err
    result = run(*command)
    state = tmp_path / "out" / "backbone.safetensors.training"
    assert f"resuming the interrupted run in {state}" in result.out
    assert not state.exists()


def test_a_run_that_is_stopped_while_it_writes_its_files_goes_on(
    run: Run, folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "out" / "training" / "notes.txt"  # a user's file that no run may touch
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    command = ["multitask", folder, other, "-m", "linear-probe", *FAST, "-o", tmp_path / "out"]
    save = Patch.save

    def stop(self: Patch, path: Path) -> None:
        if path.name == "shades.safetensors":
            raise KeyboardInterrupt
        save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(Patch, "save", stop)
        assert run(*command).code == 130
    assert (tmp_path / "out" / "backbone.safetensors").exists()
    result = run(*command)
    assert result.code == 0, result.err
    assert "resuming the interrupted run" in result.out
    assert (tmp_path / "out" / "shades.safetensors").exists()
    assert run(*command, "--restart", "--force").code == 0
    assert own.read_text() == "mine"


def test_a_verb_that_cannot_share_its_work_is_refused_under_torchrun(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in ("multires", "compare", "profile"):
        result = run(verb, folder, "--epochs", 1)
        assert result.code == 1
        assert "error: only fit and multitask share their work under torchrun" in result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weight", "colors"], "--weight 'colors' is not TASK=NUMBER with a number above 0"),
        (["--weight", "colors=-1"], "--weight 'colors=-1' is not TASK=NUMBER"),
        (["--weight", "colors=1", "--weight", "colors=2"], "--weight colors=... is given twice"),
        (["--weight", "birds=1"], "there is no task 'birds' to weigh"),
        (["--sampling", "some"], "sampling is 'some'; expected one of: equal, proportional"),
        (["--shared", "lora"], "Name as shared bitfit, depthwise, full-finetune"),
        (["--private", "full-finetune"], "makes everything private"),
        (["--fit", "early_stopping=2"], "no setting 'early_stopping': all tasks end together"),
        (["-b", "torchvision:resnet18", "--argument", "pretrained=false"], "names an architecture of timm"),
    ],
)
def test_what_makes_no_sense_ends_in_one_line(
    run: Run, folder: Path, other: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    result = run("multitask", folder, other, *FAST, "-b", TINY, "-o", tmp_path / "out", *options)
    assert result.code == 1
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_one_task_given_twice_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("multitask", folder, folder, *FAST, "-o", tmp_path / "out")
    assert "two tasks are called 'colors'" in result.err
