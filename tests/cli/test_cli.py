"""The command line, verb by verb, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import modelpatch
from conftest import CLASSES, Run, write_folder
from modelpatch.backbone.files import save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.cli import main
from modelpatch.data.task import load_task
from modelpatch.errors import DataError
from modelpatch.patch.contents import Patch
from modelpatch.recipes.cascading import held_out
from modelpatch.select.automatic import Chooser
from modelpatch.train import callbacks, evaluate, fit, harmonic_mean

pytestmark = pytest.mark.slow

VERBS = tuple(main.VERBS)
TINY = "bundled:tiny"


# every verb -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.code == 0
    assert f"modelpatch {verb}" in result.out
    assert result.err == ""


def test_the_command_lists_all_verbs_and_its_version(run: Run) -> None:
    listed = run("--help").out
    for verb, (module, _) in main.VERBS.items():
        assert re.search(rf"\b{verb}\b", listed)
        assert main.PANELS[module] in listed
    assert run("--version").out == f"modelpatch {modelpatch.__version__}\n"


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "modelpatch", "inspect", "missing.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


# fit --------------------------------------------------------------------------------------------------------


def test_fit_writes_a_patch_and_says_that_the_base_is_unchanged(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "colors.safetensors"
    options = ["--set", "lr=0.02", "--set", "head_lr=0.05", "--fit", "label_smoothing=0.1", "--dtype", "float16"]
    result = run("fit", folder, "-o", out, "--epochs", 1, *options, "--json", tmp_path / "fit.json")
    assert result.code == 0
    assert f"wrote {out} ({out.stat().st_size:,} bytes); the base is unchanged" in result.out
    patch = Patch.load(out)
    assert patch.method.hyperparameters["lr"] == 0.02
    assert patch.created["settings"]["label_smoothing"] == 0.1
    assert {tensor.dtype for tensor in patch.tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "fit.json").read_text()) == as_json(patch.inspect().as_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"colors.safetensors", "colors.run.yaml", "fit.json"}


def test_an_interrupted_fit_resumes_when_the_same_command_is_given_again(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", folder, "--epochs", 3, "--batch-size", 8, "-m", "linear-probe(solver=steps)", "-o"]
    out = tmp_path / "resumed.safetensors"
    steps: list[object] = []

    def interrupt(*given: object) -> None:
        steps.append(given)
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "EVERY_SECONDS", 0)
    hook = register_optimizer_step_pre_hook(interrupt)
    stopped = run(*command, out)
    hook.remove()
    assert stopped.code == 130
    assert "resumes when the same command is given again" in stopped.err
    assert "Traceback" not in stopped.err
    assert f"resuming the interrupted run in {out}.training" in run(*command, out).out
    run(*command, tmp_path / "straight.safetensors")
    straight = Patch.load(tmp_path / "straight.safetensors").tensors
    assert all(torch.equal(tensor, straight[name]) for name, tensor in Patch.load(out).tensors.items())


def test_a_fit_without_a_method_says_what_it_tried_and_resumes_its_choice(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = ["fit", folder, "--epochs", 1, "--budget", 3, "-o"], tmp_path / "chosen.safetensors"
    score, trials = Chooser.score, list[float]()

    def interrupt(self: Chooser, fit: Any, share: float) -> float:
        trials.append(share)
        if len(trials) == 2:
            raise KeyboardInterrupt
        return score(self, fit, share)

    monkeypatch.setattr(Chooser, "score", interrupt)
    assert "resumes when the same command is given again" in run(*command, out).err
    told = run(*command, out)
    assert f"resuming the interrupted run in {out}.training.choice.jsonl" in told.out
    assert "choice of a patch" in told.out
    assert "the best of 3 trials" in told.out
    assert len(trials) == 4  # the second one twice
    assert {path.name for path in tmp_path.iterdir()} == {"chosen.safetensors", "chosen.run.yaml"}
    limited = run(*command, out, "--force", "-m", "subset", "--max-bytes", "1MB")
    assert "limit a choice. Leave --method and --set out" in limited.err


# inspect and verify -----------------------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_inspect_shows_what_the_file_holds(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    path = patches["scale-bias"]
    result = run("inspect", path, "--json", "-", "--plot", tmp_path / "parts.png")
    inspection = Patch.load(path).inspect()
    signature = {"signed_by": [], "checked": False, "statement": None, "problem": None}
    assert json.loads(result.out) == as_json({**inspection.as_dict(), "signature": signature})
    assert f"{path.stat().st_size:,} bytes" in result.err
    assert inspection.fingerprint in result.err
    assert (tmp_path / "parts.png").stat().st_size > 0


def test_inspect_measures_and_draws_what_the_skips_weigh(run: Run, folder: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "delta.safetensors", tmp_path / "skips.png"
    assert run("fit", folder, "-o", path, "-m", "delta", "--set", "modules=2", "--epochs", 1).code == 0
    result = run("inspect", path, "--data", folder, "--plot", picture, "--json", tmp_path / "skips.json")
    assert result.code == 0
    assert f"drew {picture}" in result.out
    assert picture.stat().st_size > 0
    figures = json.loads((tmp_path / "skips.json").read_text())
    blocks = [block.name for block in load_backbone(TINY).chain.blocks]
    assert [stage["stage"] for stage in figures["skips"]] == [f"{blocks[4]} to {blocks[6]}", blocks[7]]
    for stage in figures["skips"]:
        assert stage["stage"] in result.out
        assert all(0 < edge["mean"] < 1 for edge in stage["edges"])
        assert all(f"{variance:.3g}" in result.out for variance in stage["variances"])
    assert [len(stage["variances"]) for stage in figures["skips"]] == [3, 1]


def test_verify_accepts_intact_files(run: Run, patches: dict[str, Path]) -> None:
    for options in ([], ["-b", "own"]):
        result = run("verify", *patches.values(), *options)
        assert result.code == 0
        assert result.out.count("intact") == len(patches)
        assert ("file and backbone bundled:tiny" in result.out) == bool(options)


def test_verify_fails_on_a_damaged_file_and_still_checks_the_others(
    run: Run, patches: dict[str, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged [bold].safetensors"
    data = bytearray(patches["scale-bias"].read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    result = run("verify", damaged, patches["linear-probe"], "--json", tmp_path / "verify.json")
    assert result.code == 1
    assert f"refused   {damaged}: DamagedPatchError" in result.out
    assert "intact" in result.out
    first, second = json.loads((tmp_path / "verify.json").read_text())
    assert (first["ok"], first["error"], second["ok"]) == (False, "DamagedPatchError", True)


def test_verify_refuses_another_backbone(run: Run, patches: dict[str, Path], tmp_path: Path) -> None:
    other = load_backbone("timm:test_resnet", pretrained=False)
    save_backbone(other, tmp_path / "other.safetensors", "test_resnet")
    options = ["-b", f"file:{tmp_path / 'other.safetensors'}"]
    result = run("verify", patches["scale-bias"], *options)
    assert result.code == 1
    assert "refused" in result.out
    assert "WrongBackboneError" in result.out
    assert run("verify", patches["scale-bias"]).code == 0


def test_a_backbone_file_is_found_beside_its_patches(run: Run, folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_backbone(load_backbone("timm:test_resnet", pretrained=False), base, "test_resnet")
    out = tmp_path / "colors.safetensors"
    fitted = run(
        "fit", folder, "-b", f"file:{base}", "-m", "linear-probe", "--epochs", 1, "--image-size", 32, "-o", out
    )
    assert fitted.code == 0
    assert run("verify", out, "-b", "own").code == 0
    base.unlink()
    missing = run("verify", out, "-b", "own")
    assert missing.code == 1
    assert missing.out.startswith("unchecked")
    assert "the file is intact, its backbone was not checked" in missing.out
    assert "needs the backbone file base.safetensors" in missing.out
    assert "refused" not in missing.out


# eval and predict -------------------------------------------------------------------------------------------


def test_eval_measures_the_patch(run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path) -> None:
    path = patches["linear-probe"]
    result = run("eval", folder, "-p", path, "--per-class", "--json", "-", "--plot", tmp_path / "confusion.png")
    figures = json.loads(result.out)
    result_of_python = evaluate(load_backbone(TINY), Patch.load(path), load_task(folder))
    rows = figures.pop("by_class")
    assert figures == json.loads(json.dumps(result_of_python.as_dict()))
    assert {row["name"]: row["recall"] for row in rows} == figures["per_class"]
    assert all(name in result.err for name in CLASSES)
    assert (tmp_path / "confusion.png").stat().st_size > 0


def test_eval_measures_the_base_beside_the_patch(
    run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path
) -> None:
    base = write_folder(tmp_path / "base", load_backbone(TINY).classes[:3])
    figures = json.loads(run("eval", folder, "-p", patches["linear-probe"], "--base-data", base, "--json", "-").out)
    expected = harmonic_mean(figures["top1"], figures["base_top1"])
    assert figures["harmonic_mean"] == pytest.approx(expected)


@pytest.mark.parametrize("created", [{}, {"settings": "x"}, {"settings": {"seed": "x"}}, {"settings": {"seed": -1}}])
def test_eval_takes_seed_0_where_a_file_names_none(
    run: Run, patches: dict[str, Path], tmp_path: Path, created: dict[str, Any]
) -> None:
    loaded = Patch.load(patches["linear-probe"])
    path = replace(loaded, created=created).save(tmp_path / "odd.safetensors")
    folder = write_folder(tmp_path / "colors", CLASSES) / "train"  # no test split: the seed makes one
    result = run("eval", folder, "--patch", path, "--json", "-")
    expected = evaluate(load_backbone(TINY), loaded, load_task(folder, seed=0))
    assert (result.code, json.loads(result.out)["confusion"]) == (0, expected.confusion)


def test_the_split_that_a_patch_was_fitted_on_is_the_one_it_is_tested_on(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colors", CLASSES) / "train"  # no test split: the seed makes one
    tiny, data = load_backbone(TINY), load_task(folder, seed=3)
    path = fit(tiny, data, "linear-probe", epochs=1, image_size=32, seed=1).save(tmp_path / "colors.safetensors")
    result = run("eval", folder, "-p", path, "--json", "-")
    assert json.loads(result.out)["confusion"] == evaluate(tiny, Patch.load(path), data).as_dict()["confusion"]
    refused = run("eval", folder, "-p", path, "--seed", 1)
    assert refused.code == 1
    assert "fitted on the split of seed 3" in refused.err
    with pytest.raises(DataError, match="split of seed 3"):
        held_out([Patch.load(path)], load_task(folder, seed=0))


def test_predict_answers_with_every_patch_and_the_base(run: Run, folder: Path, patches: dict[str, Path]) -> None:
    options = [option for path in patches.values() for option in ("-p", path)]
    result = run("predict", folder / "test", *options, "--base", "--top", 2, "--json", "-")
    answers = json.loads(result.out)
    files = sorted(folder.glob("test/*/*.png"))
    assert [answer["image"] for answer in answers] == [str(file) for file in files]
    assert list(answers[0]["tasks"]) == sorted(["colors", "shades", "base"])
    backbone, patch = load_backbone(TINY), Patch.load(patches["linear-probe"])
    scores = backbone.patched(patch)(patch.preprocessing(*files)).softmax(1)
    for answer, row in zip(answers, scores, strict=True):
        assert len(answer["tasks"]["base"]) == 2
        best = answer["tasks"]["colors"][0]
        assert best["label"] == patch.task.classes[row.argmax()]
        assert best["probability"] == pytest.approx(row.max().item(), abs=1e-4)


def test_predict_explains_its_plan_and_what_each_part_took(
    run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path
) -> None:
    options = [option for path in patches.values() for option in ("-p", path)]
    picture = tmp_path / "plan.png"
    result = run("predict", folder / "test", *options, "--base", "--explain", "--plot", picture, "--workers", 1)
    assert result.code == 0
    for text in ("3 tasks, up to", "% shared", "heads base, ", "tuning: plain", "ms", "100%"):
        assert text in result.out, text
    assert picture.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(run("predict", folder / "test", *options, "--explain", "--json", "-").out)
    assert len(facts["images"]) == len(list(folder.glob("test/*/*.png")))
    assert 0 < facts["plan"]["flops"] <= facts["plan"]["separate_flops"]
    assert sum(step["milliseconds"] for step in facts["plan"]["steps"]) > 0


def test_patches_of_one_task_are_told_apart_by_their_file_names(
    run: Run, folder: Path, patches: dict[str, Path], tmp_path: Path
) -> None:
    first = patches["linear-probe"]
    second = tmp_path / "again.safetensors"
    second.write_bytes(first.read_bytes())
    image = next(folder.glob("test/*/*.png"))
    answers = json.loads(run("predict", image, "-p", first, "-p", second, "--json", "-").out)
    assert set(answers[0]["tasks"]) == {"linear-probe", "again"}
    assert "a patch file is given twice" in run("predict", image, "-p", first, "-p", first).err
    other = tmp_path / "other" / first.name
    other.parent.mkdir()
    other.write_bytes(first.read_bytes())
    answers = json.loads(run("predict", image, "-p", first, "-p", other, "--json", "-").out)
    assert set(answers[0]["tasks"]) == {str(first), str(other)}


def test_eval_tests_on_the_images_that_the_fit_held_out(run: Run, folder: Path, tmp_path: Path) -> None:
    classes = folder / "train"  # class folders without a test split: one is made by the fit's seed
    out, figures = tmp_path / "p.safetensors", tmp_path / "figures.json"
    assert run("fit", classes, "-o", out, "-m", "linear-probe", "--epochs", 1, "--seed", 3).code == 0
    held = load_task(classes, seed=3)
    backbone, patch = load_backbone("bundled:tiny"), Patch.load(out)
    assert sorted(map(str, held.test.images)) != sorted(map(str, load_task(classes, seed=0).test.images))
    assert run("eval", classes, "-p", out, "--json", figures).code == 0
    assert json.loads(figures.read_text())["confusion"] == evaluate(backbone, patch, held).confusion


# compare ----------------------------------------------------------------------------------------------------


def test_compare_puts_methods_in_one_table_and_keeps_their_patches(run: Run, folder: Path, tmp_path: Path) -> None:
    names = ["linear-probe", "scale-bias"]
    outputs = {name: tmp_path / name for name in ("c.json", "c.png", "c.md", "patches")}
    options = ["--json", outputs["c.json"], "--plot", outputs["c.png"], "--markdown", outputs["c.md"]]
    result = run("compare", folder, "--methods", ", ".join(names), "--epochs", 1, *options, "--out", outputs["patches"])
    assert result.code == 0
    rows = json.loads(outputs["c.json"].read_text())["rows"]
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert (outputs["patches"] / f"colors-{row['method']}-seed0.safetensors").stat().st_size == row["file_bytes"]
        assert f"{row['file_bytes']:,}" in outputs["c.md"].read_text()
        assert f"{row['file_bytes']:,}" in result.out
    assert outputs["c.png"].stat().st_size > 0


def test_a_sweep_gives_a_row_and_a_point_for_every_value(run: Run, folder: Path, tmp_path: Path) -> None:
    picture, figures = tmp_path / "lr.png", tmp_path / "lr.json"
    outputs = ["--plot", picture, "--json", figures, "--methods", "linear-probe,scale-bias", "--epochs", 1]
    result = run("compare", folder, "--sweep", "lr=0.001,0.1", *outputs)
    assert result.code == 0
    rows = [row["method"] for row in json.loads(figures.read_text())["rows"]]
    assert rows == ["linear-probe", "scale-bias(lr=0.001)", "scale-bias(lr=0.1)"]
    assert "linear-probe is compared as it is: linear-probe trains a head alone" in " ".join(result.out.split())
    assert picture.stat().st_size > 0


# errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "missing"], "missing is neither a folder"),
        (["compare", "FOLDER", "--sweep", "lr=1"], "--sweep 'lr=1' is not KEY=V1,V2,... with at least two values"),
        (["compare", "FOLDER", "--sweep", "speed=1,2"], "has no hyperparameter 'speed'"),
        (["fit", "FOLDER", "-m", "magic"], "there is no method 'magic'"),
        (["fit", "FOLDER", "--set", "speed=9"], "has no hyperparameter 'speed'"),
        (["fit", "FOLDER", "--set", "lr"], "--set 'lr' is not KEY=VALUE"),
        (["fit", "FOLDER", "--fit", "speed=9"], "fit has no setting 'speed'"),
        (["fit", "FOLDER", "--fit", "ema=often"], "ema = 'often' is not valid"),
        (["fit", "FOLDER", "--fit", "accumulate=0"], "accumulate = 0 is not valid"),
        (["fit", "FOLDER", "--fit", "monitor=3"], "monitor = 3 is not valid"),
        (["fit", "FOLDER", "--fit", "checkpoint_activations=1"], "checkpoint_activations = 1 is not valid"),
        (["compare", "FOLDER", "--fit", "ema=0.9"], "fit has no setting 'ema'"),
        (["fit", "FOLDER", "--epochs", "0"], "epochs = 0 is not valid"),
        (
            ["fit", "FOLDER", "--dtype", "int4", "--epochs", "100000"],
            "dtype = 'int4' is not valid: Input should be 'float32'",
        ),
        (["fit", "FOLDER", "-o", "missing/x.safetensors"], "the folder of --out missing/x.safetensors does not exist"),
        (["fit", "FOLDER", "-o", "FOLDER"], "is a folder. Name a file in it"),
        (["fit", "FOLDER", "--seed", "100000000000000"], "seed = 100000000000000 is not valid"),
        (["fit", "FOLDER", "-b", "bundled:huge"], "bundles no backbone 'huge'"),
        (["fit", "FOLDER", "-b", "tiny"], "'tiny' is not a backbone"),
        (["compare", "FOLDER", "--methods", "magic"], "there is no method 'magic'"),
        (
            ["compare", "FOLDER", "--methods", "linear-probe", "--epochs", "1", "--markdown", "no/x.md"],
            "the folder of --markdown no/x.md does not exist",
        ),
        (["inspect", "missing.safetensors"], "missing.safetensors"),
        (["inspect", "FOLDER/test/red/000.png"], "000.png"),
        (["inspect", "PATCH", "--plot", "missing/x.png"], "the folder of --plot missing/x.png does not exist"),
        (["inspect", "PATCH", "--json", "missing/x.json"], "the folder of --json missing/x.json does not exist"),
        (["inspect", "PATCH", "--data", "FOLDER"], "made by linear-probe, which weighs no skips"),
        (["inspect", "PATCH", "--backbone", "bundled:huge"], "bundles no backbone 'huge'"),
        (["predict", "missing.png", "-p", "PATCH"], "there is no image or folder missing.png"),
        (["predict", "EMPTY", "-p", "PATCH"], "no images in"),
        (["eval", "EMPTY", "-p", "PATCH"], "holds no class folders"),
    ],
)
def test_an_error_is_one_line_and_exit_status_one(
    run: Run,
    folder: Path,
    patches: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = {"FOLDER": str(folder), "PATCH": str(patches["linear-probe"]), "EMPTY": str(tmp_path / "empty")}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    result = run(*arguments)
    assert result.code == 1
    assert result.err.startswith("error: ") or "\nerror: " in result.err
    assert message in result.err
    assert "Traceback" not in result.out + result.err
    assert len([line for line in result.err.splitlines() if not line.startswith("warning: no --backbone")]) == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_wrong_option_is_a_usage_error(run: Run) -> None:
    result = run("inspect", "--speed")
    assert result.code == 2
    assert "No such option" in result.err
