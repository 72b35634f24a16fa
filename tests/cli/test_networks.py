"""Networks on the command line: own weights, patches that find their backbone, the toy, `modelpatch backbone`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from conftest import Run, draft_patch
from modelpatch.backbone.files import save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.places import CACHE
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.contents import Patch
from modelpatch.store.store import Store

SMALL = "test_resnet"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as a training script writes it, with a classifier of its own."""
    torch.manual_seed(5)
    state = {f"module.{name}": tensor for name, tensor in timm.create_model(SMALL, num_classes=7).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "run.pth")
    return tmp_path / "run.pth"


def fit(run: Run, folder: Path, out: Path, *network: object) -> None:
    result = run("fit", folder, *network, "-m", "linear-probe", "--epochs", 1, "--image-size", 32, "-o", out, "--force")
    assert result.code == 0, result.err


def test_eval_predict_and_export_follow_a_fit_on_own_weights(
    run: Run, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "patches" / "colors.safetensors"
    out.parent.mkdir()
    fit(run, folder, out, "-b", f"timm:{SMALL}", "--weights", checkpoint)
    assert run("eval", folder, "-p", out).code == 0
    assert run("verify", out, "-b", "own").code == 0
    shown = run("predict", folder / "test", "-p", out, "--base", "--json", "-")
    assert "the base answers at 32 px, in one pass with the patches" in shown.err
    assert set(json.loads(shown.out)[0]["tasks"]) == {"base", "colors"}
    again = run("predict", folder / "test", "-p", out, "--base", "--base-size", 160, "--json", "-")
    assert "the base answers" not in again.err
    refused = run("predict", folder / "test", "-p", out, "--base-size", 160)
    assert "Give --base as well" in refused.err


def test_eval_follows_a_fit_on_a_file_and_says_where_it_looked(run: Run, folder: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "weights" / "base.safetensors", tmp_path / "patches" / "colors.safetensors"
    base.parent.mkdir(), out.parent.mkdir()
    save_backbone(load_backbone(f"timm:{SMALL}", pretrained=False), base, SMALL)
    fit(run, folder, out, "-b", f"file:{base}")
    assert run("eval", folder, "-p", out).code == 0
    base.unlink()
    missing = run("eval", folder, "-p", out)
    assert missing.code == 1
    assert str(out.parent / base.name) in missing.err
    assert str(base) in missing.err
    assert "MODELPATCH_BACKBONES" in missing.err


def test_a_fit_without_a_backbone_says_that_it_uses_a_toy(run: Run, folder: Path, tmp_path: Path) -> None:
    arguments = ("fit", folder, "-m", "linear-probe", "--epochs", 1, "-o", tmp_path / "colors.safetensors", "--force")
    told = run(*arguments).err
    assert "warning: no --backbone is given: bundled:tiny is used, a toy" in told
    assert "name a network with -b" in told
    assert "warning" not in run(*arguments, "-b", "bundled:tiny").err


def test_a_network_is_written_as_one_file(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    assert run("backbone", "save", f"timm:{SMALL}", "--weights", checkpoint, "-o", out).code == 0
    whole = load_backbone(f"timm:{SMALL}", weights=checkpoint)
    assert load_backbone(f"file:{out}").fingerprint == whole.fingerprint
    facts = json.loads(run("backbone", "show", f"file:{out}", "--json", "-").out)
    assert (facts["fingerprint"], facts["features"]) == (whole.fingerprint, whole.chain.feature_dim)
    assert facts["blocks"] == [block.name for block in whole.chain.blocks]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "DATA", "--weights", "x.pth"], "Give --backbone"),
        (["fit", "DATA", "-b", "timm:test_resnet", "--weights", "x.pth"], "there is no such file"),
        (
            ["backbone", "show", "timm:test_resnet", "--weights", "CK", "--argument", "weights=y.pth"],
            "Give --weights alone",
        ),
        (
            ["backbone", "save", "torchvision:resnet18", "--argument", "pretrained=false", "-o", "OUT"],
            "cannot be written",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    run: Run, folder: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"DATA": folder, "CK": checkpoint, "OUT": tmp_path / "x.safetensors"}
    result = run(*(places.get(one, one) for one in arguments))
    assert result.code == 1
    assert words in result.err


def test_a_server_takes_the_backbone_of_its_patches(tmp_path: Path, checkpoint: Path) -> None:
    from modelpatch.cli.serving import find_served
    from modelpatch.errors import ServeError

    backbone = load_backbone(f"timm:{SMALL}", weights=checkpoint)
    store = Store(tmp_path / "store")
    store.publish("colors", draft_patch(backbone, LinearProbe()).save(tmp_path / "colors.safetensors"))
    assert find_served(store.url).fingerprint == backbone.fingerprint
    other = load_backbone(f"timm:{SMALL}", pretrained=False)
    store.publish("shapes", draft_patch(other, LinearProbe()).save(tmp_path / "shapes.safetensors"))
    with pytest.raises(ServeError, match="patches of 2 backbones"):
        find_served(store.url)
    assert Patch.load(tmp_path / "colors.safetensors").backbone.weights == "run.pth"
