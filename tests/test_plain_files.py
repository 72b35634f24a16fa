"""A pipe, a device or a socket in the place of any file that a user names is refused at once, by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import modelpatch as mp
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import image_bytes, open_image
from modelpatch.backbone.states import read_states
from modelpatch.backbone.tuning import Tuning
from modelpatch.convert.peft import import_peft
from modelpatch.engine.cascade import Cascade
from modelpatch.errors import ModelpatchError
from modelpatch.methods.vocabulary import read_words
from modelpatch.patch.envelope import read_beside
from modelpatch.patch.keys import read_private_key
from modelpatch.plain_files import open_plain, read_plain
from modelpatch.serve.tenants import Tenants

READERS: dict[str, tuple[str, Callable[[Path, Backbone], object]]] = {  # the file's name, and who reads it
    "a patch": ("p.safetensors", lambda path, _: mp.Patch.load(path)),
    "a signature": ("p.safetensors.sig", lambda path, _: read_beside(path.with_suffix(""))),
    "a key": ("id_ed25519", lambda path, _: read_private_key(path)),
    "a cascade": ("c.cascade", lambda path, _: Cascade.load(path)),
    "weights": ("w.pth", lambda path, _: read_states(path)),
    "a backbone": ("b.safetensors", lambda path, _: mp.load_backbone(f"file:{path}")),
    "an image": ("i.jpg", lambda path, _: open_image(path)),
    "an image's bytes": ("i.jpg", lambda path, _: image_bytes(path)),
    "a manifest": ("m.csv", lambda path, _: mp.load_task(path)),
    "settings of an engine": ("t.json", lambda path, _: Tuning.load(path)),
    "tenants": ("t.toml", lambda path, _: Tenants.read(path)),
    "words": ("w.json", lambda path, _: read_words(path)),
    "a configuration of PEFT": (
        "adapter_config.json",
        lambda path, backbone: import_peft(path.parent, backbone, ("t", ("a", "b"))),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused_and_not_waited_for(reader: str, tiny: Backbone, tmp_path: Path) -> None:
    name, read = READERS[reader]
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelpatchError, match=r"pipe|no file|neither|not a"):
        read(tmp_path / name, tiny)


def test_only_plain_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"some bytes")
    (tmp_path / "link").symlink_to(plain)
    assert read_plain(plain) == read_plain(tmp_path / "link") == b"some bytes"
    assert read_plain(plain, 4) == b"some"
    with pytest.raises(IsADirectoryError):
        open_plain(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "nothing")
    with pytest.raises(OSError, match="a pipe, a device or a socket"):
        open_plain("/dev/zero")
    (tmp_path / "to-zero").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="a pipe, a device or a socket"):
        read_plain(tmp_path / "to-zero")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        listening.bind("socket")
        with pytest.raises(OSError, match=r"socket|No such device"):
            open_plain("socket")
