"""Whatever could stop a patch from being saved is found before the first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TinyBlock, color_task, make_tiny, small_preprocessing
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import HostileNameError, ModelpatchError, PatchError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.patch.contents import Patch
from modelpatch.train import Callback, Trainer, fit


class Named(nn.Module):
    """A network whose second block has a name of the user's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.ModuleDict({"block1-0": TinyBlock(8, 8, 1), name: TinyBlock(8, 8, 1)})
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks.values():
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Untrained(Callback):
    """Fails the test when a step is taken."""

    def on_step_begin(self, trainer: Trainer) -> None:
        pytest.fail("a step was taken")

    on_step_end = on_train_begin = on_step_begin


@pytest.mark.parametrize("name", ["block1-1", "conv/kernel:0", "größe 2", "a+b"])
def test_a_network_with_names_of_the_users_is_trained_saved_and_bound(name: str, tmp_path: Path) -> None:
    backbone = load_backbone(Named(name), preprocessing=small_preprocessing())
    fit(backbone, color_task(9), FullFinetune(), epochs=1, out=tmp_path / "patch.safetensors")
    patch = Patch.load(tmp_path / "patch.safetensors")
    assert any(f"blocks.{name}." in tensor for tensor in patch.tensors)
    images = torch.rand(2, *backbone.input_size)
    assert torch.isfinite(backbone.patched(patch)(images)).all()


@pytest.mark.parametrize("name", ["a\\b", "\x1b[31m", "//", "x" * 300, "a\u202eb"])
def test_a_name_that_no_file_holds_is_refused_before_the_first_step(name: str) -> None:
    backbone = load_backbone(Named(name), preprocessing=small_preprocessing())
    with pytest.raises(HostileNameError, match="holds a tensor named"):
        fit(backbone, color_task(9), FullFinetune(), epochs=1, callbacks=[Untrained()])


def test_a_type_that_no_file_holds_is_refused_before_the_first_step() -> None:
    backbone = load_backbone(make_tiny().module, preprocessing=small_preprocessing())
    task = color_task(9)
    task.facts["source"] = "bad\x1bname"
    with pytest.raises(PatchError, match="cannot be printed"):
        fit(backbone, task, "linear-probe", epochs=1, callbacks=[Untrained()])


def no_folder(folder: Path) -> Path:
    return folder / "none" / "patch.safetensors"


def a_folder(folder: Path) -> Path:
    return folder


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "patch.safetensors"


def long_name(folder: Path) -> Path:
    return folder / f"{'x' * 245}.safetensors"


def no_name(folder: Path) -> Path:
    return folder / "a\0b"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (no_folder, r"does not exist\. Make it first"),
        (a_folder, r"is a folder\. Name a file"),
        (below_a_file, r"does not exist|is a file, not a folder|Not a directory"),
        (long_name, r"too long"),
        (no_name, r"cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(
    place: Callable[[Path], Path], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelpatchError, match=expected):
        fit(make_tiny(), color_task(9), "linear-probe", out=place(tmp_path), epochs=1, callbacks=[Untrained()])
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ModelpatchError, match=r"needs about [0-9,]+ bytes; .* has room for 10\. Free some space"):
        fit(make_tiny(), color_task(9), "linear-probe", out=tmp_path / "p", epochs=1, callbacks=[Untrained()])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_refused_before_the_first_step(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ModelpatchError, match="Permission denied"):
        fit(make_tiny(), color_task(9), "linear-probe", out=tmp_path / "p", epochs=1, callbacks=[Untrained()])


@pytest.mark.parametrize("option", ["checkpoint", "log"])
def test_folders_of_a_run_are_tried_before_the_first_step(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options: dict[str, Any] = {option: tmp_path / "file" / "run"}
    with pytest.raises(ModelpatchError, match=r"Not a directory|is a file"):
        fit(make_tiny(), color_task(9), "linear-probe", epochs=1, callbacks=[Untrained()], **options)
