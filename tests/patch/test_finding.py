"""A patch finds its backbone: beside it, in named folders, where it was loaded from; and says where it looked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import timm
import torch

from conftest import draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.places import CACHE, SEARCHED, recall
from modelpatch.errors import UnknownBackboneError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.contents import Patch
from modelpatch.patch.finding import find_backbone

SMALL = "test_resnet"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


def forget(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A backbone's file in a folder of its own."""
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "base.safetensors"
    save_backbone(load_backbone(f"timm:{SMALL}", pretrained=False), path, SMALL)
    return path


def saved(backbone: Backbone, tmp_path: Path) -> Patch:
    folder = tmp_path / "patches"
    folder.mkdir(exist_ok=True)
    return Patch.load(draft_patch(backbone, LinearProbe()).save(folder / "own.safetensors"))


def test_the_place_that_a_file_was_loaded_from_is_remembered(base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(f"file:{os.path.relpath(base)}")
    patch = saved(backbone, tmp_path)
    assert patch.backbone.spec == "file:base.safetensors"  # the patch names no folder
    assert find_backbone(patch).fingerprint == backbone.fingerprint


@pytest.mark.parametrize("where", ["beside", "searched", "renamed"])
def test_a_file_that_was_moved_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    patch = saved(load_backbone(f"file:{base}"), tmp_path)
    forget(tmp_path)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv(SEARCHED, os.pathsep.join([str(tmp_path / "absent"), str(shelf)]))
    target = {
        "beside": tmp_path / "patches" / base.name,
        "searched": shelf / base.name,
        "renamed": shelf / "x.safetensors",
    }
    base.rename(target[where])
    found = find_backbone(patch, tmp_path / "patches" / "own.safetensors")
    assert found.fingerprint == patch.backbone.fingerprint.whole
    assert found.place is not None
    assert found.place.spec == f"file:{target[where]}"


def test_a_file_of_other_weights_is_passed_over(base: Path, tmp_path: Path) -> None:
    patch = saved(load_backbone(f"file:{base}"), tmp_path)
    other = tmp_path / "patches" / base.name
    save_backbone(load_backbone(f"timm:{SMALL}", pretrained=False, seed=1), other, SMALL)
    assert find_backbone(patch, other.parent).fingerprint == patch.backbone.fingerprint.whole
    base.unlink()
    with pytest.raises(UnknownBackboneError) as caught:
        find_backbone(patch, other.parent)
    text = str(caught.value)
    assert f"{other}: other weights" in text
    assert str(base) in text
    assert SEARCHED in text


def test_weights_of_a_zoos_network_are_found_by_name_and_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    checkpoint = tmp_path / "run.pth"
    torch.save({"state_dict": timm.create_model(SMALL, num_classes=3).state_dict()}, checkpoint)
    backbone = load_backbone(f"timm:{SMALL}", weights=checkpoint)
    patch = saved(backbone, tmp_path)
    assert (patch.backbone.spec, patch.backbone.weights) == (f"timm:{SMALL}", "run.pth")
    assert find_backbone(patch).fingerprint == backbone.fingerprint
    forget(tmp_path)
    monkeypatch.setenv(SEARCHED, str(tmp_path))
    assert find_backbone(patch).fingerprint == backbone.fingerprint
    monkeypatch.delenv(SEARCHED)
    forget(tmp_path)
    with pytest.raises(UnknownBackboneError, match=rf"the weights run\.pth of timm:{SMALL}.*--weights PATH/run\.pth"):
        find_backbone(patch)


def test_a_module_is_left_to_python(tmp_path: Path) -> None:
    with pytest.raises(UnknownBackboneError, match=r"module .TinyNet. that only your own code"):
        find_backbone(saved(make_tiny(), tmp_path))


def test_a_zoos_random_network_is_built_by_name_and_nothing_is_remembered(tmp_path: Path) -> None:
    backbone = load_backbone(f"timm:{SMALL}", pretrained=False, seed=4)
    assert recall(backbone.fingerprints.chain) is None
    assert find_backbone(saved(backbone, tmp_path)).fingerprint == backbone.fingerprint


def test_a_cache_that_cannot_be_written_to_costs_the_memory_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "cache"))
    backbone = load_backbone(f"file:{base}")
    assert recall(backbone.fingerprints.chain) is None
