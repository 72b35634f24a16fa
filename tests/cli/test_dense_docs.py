"""The code of docs/segmentation.md and docs/detection.md runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from conftest import Run, write_folder
from dense import write_masks, write_voc

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")
DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["segmentation", "detection"])
def test_every_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    write_masks(tmp_path / "streets", 4, 32)
    write_voc(tmp_path / "cells", 3)
    write_folder(tmp_path / "scenes")
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    commands = 0
    for kind, text in BLOCK.findall((DOCS / f"{name}.md").read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(text, f"{name}.md", "exec"), known)
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "modelpatch":
                found = run(*words[1:])
                assert found.code == 0, found.err
                commands += 1
    assert commands == 3
    assert len(list((tmp_path / "drawn").iterdir())) >= 4
