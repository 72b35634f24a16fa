"""A method of another distribution: the command finds it by its entry point, trains, saves, loads and serves it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelpatch as mp
from conftest import write_folder
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.patch.contents import Patch
from modelpatch.store.store import Store
from serving import picture, serving

pytestmark = [pytest.mark.service, pytest.mark.usefixtures("registries")]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as pip leaves it: the module of the guide and a dist-info with its entry point."""
    site = tmp_path / "site"
    (site / "biases-1.0.dist-info").mkdir(parents=True)
    (site / "biases").mkdir()
    source = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    entry = re.search(r'\[project\.entry-points\."(.*?)"\]\n(.*?) = "(.*?)"', PAGE)
    assert source is not None and entry is not None  # noqa: PT018
    (site / "biases" / "__init__.py").write_text("")
    (site / "biases" / "method.py").write_text(source[1])
    (site / "biases-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: biases\nVersion: 1.0\n")
    points = f"[{entry[1]}]\n{entry[2]} = {entry[3]}\nbroken = biases.nowhere:Method\n"
    (site / "biases-1.0.dist-info" / "entry_points.txt").write_text(points)
    return site


def modelpatch(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, "-m", "modelpatch", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_method_of_another_distribution_is_trained_saved_loaded_and_served(tmp_path: Path, installed: Path) -> None:
    data, file = write_folder(tmp_path / "colors"), tmp_path / "colors.safetensors"
    options = ("-b", "bundled:tiny", "--epochs", 2, "-o", file)
    done = modelpatch(installed, "fit", data, "--method", "biases(blocks=[stage1],linear_only=false)", *options)
    assert done.returncode == 0, done.stderr
    patch = Patch.load(file)
    assert patch.method.name == "biases"
    assert patch.method.hyperparameters["blocks"] == ["stage1"]
    changed = [name for name in patch.tensors if not name.startswith("head.")]
    assert changed
    assert all(name.startswith("replace/") and name.endswith(".bias") for name in changed)

    backbone = mp.load_backbone("bundled:tiny")
    images = torch.randn(2, *patch.preprocessing.input_size)
    expected = backbone.patched(patch)(images)
    answers = Engine(backbone, {"colors": patch}, tuning=Tuning())(images, only=["colors"])["colors"]
    assert torch.allclose(answers, expected, atol=1e-4)

    store = Store(tmp_path / "store")
    store.publish("colors", patch)
    data_of_image = picture(pixels=32)
    with serving(store, backbone) as running, running.client() as client:
        best = client.predict([data_of_image], ["colors"], top=1)[0]["colors"][0]
    alone = backbone.patched(patch)(patch.preprocessing(data_of_image)).softmax(1)[0]
    assert best[0] == patch.task.classes[int(alone.argmax())]
    assert best[1] == pytest.approx(float(alone.max()), abs=1e-3)


def test_a_method_that_cannot_be_imported_says_where_it_comes_from(tmp_path: Path, installed: Path) -> None:
    options = ("-b", "bundled:tiny", "-o", tmp_path / "p.safetensors")
    done = modelpatch(installed, "fit", "bundled:digits", "--method", "broken", *options)
    assert done.returncode == 1
    assert "'broken' of biases.nowhere:Method cannot be imported" in " ".join(done.stderr.split())
    done = modelpatch(installed, "fit", "bundled:digits", "--method", "biasess", *options)
    assert done.returncode == 1
    assert "Did you mean 'biases'?" in " ".join(done.stderr.split())
