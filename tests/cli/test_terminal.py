"""What a terminal shows and refuses: whole figures, paths checked before the work, devices, arguments, interruptions."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

from conftest import Run, write_folder
from modelpatch.backbone.files import save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.cli import options
from modelpatch.cli.console import UNSEEN_WIDTH, Screen, check_file
from modelpatch.cli.training import suggestions
from modelpatch.errors import BackboneError, ModelpatchError
from modelpatch.patch.contents import Patch
from modelpatch.train.progress import Progress

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


# widths -----------------------------------------------------------------------------------------------------


def test_what_is_piped_is_wide_and_what_is_seen_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert Screen().width == UNSEEN_WIDTH
    assert Screen(force_terminal=True).width == 80


def test_a_piped_inspection_holds_every_hash_in_one_line(run: Run, patches: dict[str, Path]) -> None:
    inspection = Patch.load(patches["scale-bias"]).inspect()
    lines = run("inspect", patches["scale-bias"]).out.splitlines()
    for value in (inspection.fingerprint, inspection.file_sha256, inspection.content_hash):
        assert any(value in line for line in lines)


def test_a_bar_shows_its_parts_and_its_note_at_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, height=20, force_terminal=True, color_system=None)
    with Progress("scale-bias+depthwise on a [task]", console) as progress, progress.task("training", 40) as advance:
        advance(18)
        progress.note("epoch 10  loss 0.1234  lr 0.0003  validation_top1 0.8765")
        console.print(progress.get_renderable())
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for part in ("━━━━━━━", "45%", "-:--:--", "a [task]: training", "loss 0.1234", "validation_top1 0.8765"):
        assert part in shown
    assert "…" not in shown


# paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "missing", "--json", "no/x.json"], "the folder of --json no/x.json does not exist"),
        (["fit", "missing", "--log", "file"], "--log file cannot be a folder"),
        (["compare", "missing", "--json", "no/x.json"], "the folder of --json no/x.json does not exist"),
        (["compare", "missing", "--plot", "no/x.png"], "the folder of --plot no/x.png does not exist"),
        (["compare", "missing", "--bytes-plot", "x.docx"], "--bytes-plot x.docx: .docx is not a supported picture"),
        (["compare", "missing", "--plot", "x"], "--plot x: no suffix is not a supported picture"),
        (["compare", "missing", "--html", "no/x.html"], "the folder of --html no/x.html does not exist"),
        (["compare", "missing", "--markdown", "."], "--markdown . is a folder"),
        (["profile", "missing", "--plot", "x.docx"], "--plot x.docx: .docx is not a supported picture"),
        (["eval", "missing", "-p", "missing.st", "--plot", "no/x.png"], "the folder of --plot no/x.png does not exist"),
        (["eval", "missing", "-p", "missing.st", "--json", "."], "--json . is a folder"),
        (["predict", "missing", "-p", "missing.st", "--json", "no/x"], "the folder of --json no/x does not exist"),
        (["verify", "missing.st", "--json", "no/x.json"], "the folder of --json no/x.json does not exist"),
        (["inspect", "missing.st", "--plot", "x.txt"], "--plot x.txt: .txt is not a supported picture"),
        (["demo", "--out", "file"], "--out file cannot be a folder"),
    ],
)
def test_a_bad_path_is_found_before_data_and_patches_are_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = run(*arguments)
    assert (result.code, result.out) == (1, "")
    assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "FOLDER", "-o", "8"], "--out 8: expected a file or folder, not a number"),
        (["fit", "FOLDER", "-o", "--force"], "--out --force: expected a file or folder, not an option"),
        (["search", "FOLDER", "--trials", "8"], "--trials 8: expected a file or folder, not a number"),
        (["compare", "FOLDER", "--out", "3"], "--out 3: expected a file or folder, not a number"),
        (["fit", "FOLDER", "--log", "10"], "--log 10: expected a file or folder, not a number"),
    ],
)
def test_a_number_or_an_option_is_not_taken_for_a_file(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*[str(folder) if one == "FOLDER" else one for one in arguments])
    assert result.code == 1
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ModelpatchError, match="permission denied"):
        check_file("--json", tmp_path / "x.json")
    check_file("--json", Path("-"))


def test_figures_are_kept_when_a_picture_fails(
    run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ModelpatchError("no ink")

    monkeypatch.setattr("modelpatch.report.plots.plot_confusion", fail)
    outputs = ["--json", tmp_path / "x.json", "--plot", tmp_path / "x.png"]
    assert run("eval", folder, "-p", patches["linear-probe"], *outputs).code == 1
    assert "top1" in json.loads((tmp_path / "x.json").read_text())


def test_fit_and_compare_replace_files_only_by_force(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "colors-linear-probe-seed0.safetensors"
    out.write_bytes(b"precious")
    fit = ["fit", folder, "-o", out, "-m", "linear-probe", "--epochs", 1]
    compare = ["compare", folder, "--out", tmp_path, "--methods", "scale-bias,linear-probe", "--epochs", 1]
    for command, message in ((fit, "exists already. Give --force to replace it"), (compare, "is not a patch")):
        refused = run(*command)
        assert refused.code == 1
        assert str(out) in refused.err
        assert message in refused.err
        assert out.read_bytes() == b"precious"
    assert run(*fit, "--force", "--epochs", 2).code == 0
    assert Patch.load(out).method.name == "linear-probe"
    assert "of a run with another backbone, method, settings or images" in run(*compare).err
    assert run(*compare, "--force").code == 0
    trained = out.read_bytes()
    assert run(*compare).code == 0
    assert out.read_bytes() == trained


# devices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("name", "device"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("auto", "cuda:0")]
)
def test_a_device_is_found_by_its_name(name: str, device: str) -> None:
    assert options.find_device(name) == torch.device(device)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["cuda:2", "mps", "gpu", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ModelpatchError, match=f"no device '{name}' here.*auto, cpu, cuda:0, cuda:1, cuda"):
        options.find_device(name)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert options.find_device("auto") == CPU
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ModelpatchError, match="built without CUDA"):
        options.find_device("cuda")


@pytest.mark.parametrize("verb", ["fit", "compare", "eval", "predict"])
def test_verbs_that_compute_take_a_device(run: Run, folder: Path, patches: dict[str, Path], verb: str) -> None:
    patch = ["-p", patches["linear-probe"]] if verb in ("eval", "predict") else []
    result = run(verb, folder, *patch, "--device", "tpu")
    assert result.code == 1
    assert "there is no device 'tpu' here" in result.err


# backbones and their arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("spec=1", "spec=... is not an argument of the network's constructor. Name the backbone with --backbone"),
        ("preprocessing=1", "not an argument of the network's constructor. Use Python"),
        ("pretrained=no", "pretrained is 'no'; expected true or false"),
        ("seed=-1", "seed is -1; expected an integer"),
        ("segments=stem", "expected a list of names"),
    ],
)
def test_an_argument_that_no_network_takes_is_refused(run: Run, folder: Path, pair: str, message: str) -> None:
    result = run("fit", folder, "--argument", pair)
    assert result.code == 1
    assert message in result.err


def test_a_pair_that_stands_twice_is_refused(run: Run, folder: Path) -> None:
    assert "--set lr=... is given twice" in run("fit", folder, "--set", "lr=1", "--set", "lr=2").err


@pytest.mark.parametrize(
    ("verb", "pair", "message"),
    [
        ("fit", "epochs=3", "epochs has an option of its own: --epochs 3"),
        ("fit", "batch-size=3", "batch_size has an option of its own: --batch-size 3"),
        ("fit", "cache=false", "cache has an option of its own: --no-cache"),
        ("compare", "seeds=3", "seeds has an option of its own: --seeds 3"),
        ("fit", "checkpoint=x", "fit has no setting 'checkpoint'"),
        ("compare", "base=x", "fit has no setting 'base'"),
    ],
)
def test_the_other_settings_are_others(run: Run, folder: Path, verb: str, pair: str, message: str) -> None:
    result = run(verb, folder, "--fit", pair)
    assert result.code == 1
    assert message in result.err


def test_a_patch_is_no_backbone(run: Run, folder: Path, patches: dict[str, Path]) -> None:
    result = run("fit", folder, "-b", f"file:{patches['scale-bias']}")
    assert result.code == 1
    assert f"{patches['scale-bias']} is a patch, not a backbone" in result.err
    assert "bundled:tiny" in result.err


@pytest.fixture(scope="module")
def seeded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch of a network that its arguments make: random weights of seed 3."""
    backbone = options.open_backbone("timm:test_resnet", {"pretrained": False, "seed": 3}, CPU)
    from modelpatch import methods
    from modelpatch.data.task import load_task
    from modelpatch.train.fitting import fit

    patch = fit(backbone, load_task(folder), methods.LinearProbe(), epochs=1, image_size=32)
    return patch.save(tmp_path_factory.mktemp("seeded") / "seeded.safetensors")


def test_a_named_backbone_keeps_the_recorded_arguments_unless_told(run: Run, folder: Path, seeded: Path) -> None:
    verbs = (
        ["verify", seeded, "-b", "own"],
        ["eval", folder, "-p", seeded],
        ["predict", folder / "test" / "red", "-p", seeded],
    )
    for command in verbs:
        named = [*command, "-b", "timm:test_resnet"]
        assert run(*named).code == 0
        assert run(*named, "--argument", "seed=3").code == 0
        refused = run(*named, "--argument", "seed=4")
        assert refused.code == 1
        assert str(seeded) in refused.out + refused.err
        assert "differs in" in refused.out + refused.err


def test_a_file_of_another_name_brings_its_own_arguments(seeded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_backbone(load_backbone("timm:test_resnet", pretrained=False, seed=3), other, "test_resnet")
    patch = Patch.load(seeded)
    network = options.PatchNetwork(f"file:{other}")
    assert network.open(patch, seeded).fingerprint == patch.backbone.fingerprint.whole
    with pytest.raises(BackboneError, match="has no model"):
        options.PatchNetwork("timm:no_such_network").open(patch, seeded)


def test_inspect_shows_spans_without_the_weights(
    run: Run, seeded: Path, patches: dict[str, Path], tmp_path: Path
) -> None:
    path = patches["scale-bias"]
    result = run("inspect", path, "-b", "own", "--json", tmp_path / "x.json")
    figures = json.loads((tmp_path / "x.json").read_text())
    chain = load_backbone("bundled:tiny").chain
    assert [span["name"] for span in figures["spans"]] == [chain[span["segments"][0]].name for span in figures["spans"]]
    for span in figures["spans"]:
        assert f"segment {span['segments'][0]} {span['name']}" in result.out
        assert f"{span['bytes']:,}" in result.out
    assert f"{figures['header_bytes']:,}" in result.out
    parts = figures["header_bytes"] + sum(part["bytes"] for part in figures["parts"])
    assert parts == figures["file_bytes"] == path.stat().st_size
    assert run("inspect", seeded, "-b", "own").code == 0
    plain = run("inspect", path)
    assert all(part["name"] in plain.out for part in figures["parts"])
    assert "--backbone own" in plain.out


# predict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_broken_image_is_a_row_with_its_error(
    run: Run, patches: dict[str, Path], tmp_path: Path, batch_size: int
) -> None:
    images = write_folder(tmp_path / "colors") / "test" / "red"
    whole = sorted(images.iterdir())
    (images / "000 broken.png").write_bytes(b"not a picture")
    command = ["predict", images, "-p", patches["linear-probe"], "--base", "--batch-size", batch_size]
    result = run(*command, "--json", tmp_path / "x.json")
    assert result.code == 1
    assert f"1 of {len(whole) + 1} images cannot be read" in result.err
    assert "cannot be read as an image" in result.out
    answers = json.loads((tmp_path / "x.json").read_text())
    assert [answer["image"] for answer in answers if "error" in answer] == [str(images / "000 broken.png")]
    alone = json.loads(run(command[0], *whole, *command[2:], "--json", "-").out)
    answered = [answer for answer in answers if "error" not in answer]
    assert [answer["image"] for answer in answered] == [answer["image"] for answer in alone]
    for one, other in zip(answered, alone, strict=True):
        for task, best in other["tasks"].items():
            assert one["tasks"][task][0] == pytest.approx(best[0], abs=1e-4)


def test_images_that_are_all_broken_are_rows(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not a picture")
    result = run("predict", tmp_path, "-p", patches["linear-probe"])
    assert result.code == 1
    assert result.out.count("error:") == 2


# interruptions ----------------------------------------------------------------------------------------------


def stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interruption_speaks_of_resuming_only_if_something_is_kept(
    run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpatch.evaluate", stop)
    hook = register_optimizer_step_pre_hook(stop)
    for command in (["eval", folder, "-p", patches["linear-probe"]], ["fit", folder, "-o", tmp_path / "x.safetensors"]):
        result = run(*command)
        assert result.code == 130
        assert result.err.endswith("interrupted\n")
        assert "resume" not in result.err
    hook.remove()


# the demo's last words --------------------------------------------------------------------------------------


def test_suggestions_are_commands_that_run_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/modelpatch"])
    lines = suggestions(Path("my demo")).splitlines()
    comments, commands = lines[::2], lines[1::2]
    assert all(comment.startswith("# ") for comment in comments)
    assert commands[0] == ".venv/bin/modelpatch inspect 'my demo'/digits-scale-bias.safetensors"
    assert max(map(len, suggestions(Path("demo")).splitlines())) <= 80
    monkeypatch.setattr(sys, "argv", ["/lib/modelpatch/__main__.py"])
    assert "\npython -m modelpatch inspect " in suggestions(Path("demo"))


def test_an_image_is_decoded_once_for_patches_that_see_alike(
    run: Run, folder: Path, patches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda source, *rest: opened.append(source) or original(source, *rest))
    image = next(folder.glob("test/*/*.png"))
    options_ = [option for path in patches.values() for option in ("-p", path)]
    assert run("predict", image, *options_, "--base").code == 0
    assert opened == [image]


def test_an_unforeseen_error_is_one_line_unless_the_traceback_is_asked_for(
    run: Run, patches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("modelpatch.patch.contents.Patch.load", fail)
    result = run("inspect", patches["linear-probe"])
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ZeroDivisionError: by zero. ")
    assert len(result.err.splitlines()) == 1
    monkeypatch.setenv("MODELPATCH_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run("inspect", patches["linear-probe"])
