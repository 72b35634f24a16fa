"""modelpatch paint and predict --labels, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import Run, write_folder
from modelpatch.backbone.load import load_backbone
from modelpatch.patch.contents import Patch
from modelpatch.train.batches import Minibatch
from modelpatch.train.fitting import PatchTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("kept") / "shades", ("dark", "light", "medium"))


def test_paint_writes_the_patch_the_table_and_the_picture(run: Run, folder: Path, kept: Path, tmp_path: Path) -> None:
    out, picture, table = tmp_path / "p.safetensors", tmp_path / "p.png", tmp_path / "p.md"
    options = ["--supported", kept, "--steps", 3, "--epochs", 1, "--rule", "drop=1", "-o", out]
    more = ["--plot", picture, "--markdown", table, "--json", tmp_path / "p.json"]
    result = run("paint", folder, *options, *more)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "p.json").read_text())
    assert [point["weights"] for point in figures["curve"]] == [[0.0], [0.5], [1.0]]
    assert picture.stat().st_size > 0
    assert table.read_text().startswith("| alpha | colors | shades | patched | supported | combined |")
    patch = Patch.load(out)
    assert patch.strength == figures["chosen"]["weights"][0]
    assert "distance to optimal" in result.out
    assert "exists already" in run("paint", folder, *options).err


def test_an_interrupted_run_goes_on_without_training_again_what_was_trained(
    run: Run, folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_folder(tmp_path / "hues", ("p", "q", "r"))
    command = ["paint", folder, other, "--supported", kept, "--steps", 2, "--epochs", 1, "--mode", "parallel", "-o"]
    out, straight = tmp_path / "p.safetensors", tmp_path / "straight.safetensors"
    trained: list[str] = []
    step = PatchTrainer.train_step

    def recorded(self: PatchTrainer, batch: Minibatch) -> torch.Tensor:
        trained.append("hues" if self.classes == ("p", "q", "r") else "colors")
        if trained[-1] == "hues" and "again" not in trained:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(PatchTrainer, "train_step", recorded)
    stopped = run(*command, out)
    assert (stopped.code, set(trained)) == (130, {"colors", "hues"})
    assert "the run resumes when the same command is given again" in stopped.err
    refused = run(*command, out, "--batch-size", 7)
    assert refused.code == 1
    assert "--restart" in refused.err
    trained[:] = ["again"]
    resumed = run(*command, out)
    assert f"resuming the interrupted run in {out}.training" in resumed.out
    assert set(trained) == {"again", "hues"}
    assert not out.with_name(out.name + ".training").exists()
    run(*command, straight)
    wanted = Patch.load(straight).tensors
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in Patch.load(out).tensors.items())


def test_several_tasks_are_patched_together(run: Run, folder: Path, kept: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "hues", ("p", "q", "r"))
    out = tmp_path / "both.safetensors"
    modes = ["--mode", "parallel", "--mixing", "search", "--trials", 2]
    result = run("paint", folder, other, "--supported", kept, "--steps", 2, "--epochs", 1, "-o", out, *modes)
    assert result.code == 0, result.err
    assert len(Patch.load(out).task.classes) == 6
    modes = ["--mode", "sequential", "--orders", 2, "--force"]
    result = run("paint", folder, other, "--supported", kept, "--steps", 2, "--epochs", 1, "-o", out, *modes)
    assert result.code == 0, result.err
    assert "sequences, test accuracy" in result.out


def test_words_answer_any_labels(run: Run, folder: Path, kept: Path, sentence_encoder: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "p.safetensors", tmp_path / "w.json"
    words.write_text(json.dumps({"red": "a cat"}))
    text = ["--text", f"folder:{sentence_encoder}", "--names", words, "--template", "a photo of {}"]
    result = run("paint", folder, "--supported", kept, "--steps", 2, "--epochs", 1, "-o", out, *text)
    assert result.code == 0, result.err
    patch = Patch.load(out)
    assert patch.head.kind == "cosine"
    assert patch.method.hyperparameters["templates"] == ["a photo of {}"]
    image = next(folder.rglob("*.png"))
    asked = ["predict", image, "-p", out, "--labels", "cat,dog,two dogs", "--json", tmp_path / "a.json"]
    assert run(*asked, "--text", f"folder:{sentence_encoder}").code == 0
    answers = json.loads((tmp_path / "a.json").read_text())[0]["tasks"]["colors"]
    assert {answer["label"] for answer in answers} == {"cat", "dog", "two dogs"}
    assert "names no text tower for labels" in run(*asked).err  # a folder is named by a person, never by a file


def test_an_openclip_patch_knows_its_own_text_tower(
    run: Run, clip_models: None, folder: Path, kept: Path, tmp_path: Path
) -> None:
    from conftest import CLIP_MODELS

    out = tmp_path / "p.safetensors"
    base = ["-b", f"openclip:{CLIP_MODELS[0]}", "--argument", "pretrained=false"]
    result = run("paint", folder, "--supported", kept, *base, "--steps", 2, "--epochs", 1, "-o", out)
    assert result.code == 0, result.err
    asked = run("predict", next(folder.rglob("*.png")), "-p", out, "--labels", "cat,dog", "--alpha", "0.4")
    assert asked.code == 0, asked.err
    assert "cat" in asked.out
    assert run("verify", out).code == 0
    assert load_backbone(f"openclip:{CLIP_MODELS[0]}", pretrained=False).text is not None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rule", "best"], "is no rule"),
        (["--mode", "both"], "mode is"),
        (["--template", "a {}"], "Give --text as well"),
        (["--text", "magic"], "no text tower"),
        (["--set", "speed=1"], "no hyperparameter"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    run: Run, folder: Path, kept: Path, tmp_path: Path, options: list[str], problem: str
) -> None:
    result = run("paint", folder, "--supported", kept, "-o", tmp_path / "p.safetensors", "--epochs", 1, *options)
    assert result.code == 1
    assert problem in result.err
    assert "Traceback" not in result.err
