"""Masks and boxes on the command line: fit, eval, predict with pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Run, skip_without, write_folder
from dense import SHADES, write_masks
from modelpatch.backbone.load import load_backbone
from modelpatch.patch.contents import Patch
from modelpatch.report.tables import percent
from modelpatch.tasks.kind import View
from modelpatch.tasks.segmentation import Segmentation, lay_over

pytestmark = pytest.mark.slow

skip_without("torchmetrics")


def test_masks_from_fit_to_pictures(tmp_path: Path, run: Run) -> None:
    data = write_masks(tmp_path / "squares", 4, 32)
    (data / "classes.txt").unlink()
    file, figures = tmp_path / "p.safetensors", tmp_path / "f.json"
    named = ("--classes", ",".join(SHADES), "--ignore", "0")
    done = run("fit", data, "-o", file, "--epochs", "1", *named, "--fit", "decoder=fcn16", "--json", figures)
    assert done.code == 0, done.err
    assert "names no classes" not in done.err
    patch = Patch.load(file)
    assert patch.task.classes == SHADES[1:]
    assert patch.head.kind == "fcn"
    done = run("eval", data, "-p", file, "--json", figures, "--per-class")  # reads masks as the fit did
    assert done.code == 0, done.err
    assert json.loads(figures.read_text())["miou"] == pytest.approx(patch.metrics["test_miou"])
    assert "mean IoU" in done.out
    assert "IoU" in done.out.partition("precision")[2]
    shares = json.loads(figures.read_text())["per_class"]
    lines = [line for line in done.out.splitlines() if line.strip()]
    for name in SHADES[1:]:
        assert any(line.split()[0] == name and line.split()[-1] == percent(shares.get(name)) for line in lines)
    drawn = tmp_path / "drawn"
    done = run("predict", data / "test" / "images", "-p", file, "--overlay", drawn, "--json", figures)
    assert done.code == 0, done.err
    assert f"drew 4 overlays in {drawn}" in " ".join(done.out.split())
    rows = json.loads(figures.read_text())
    assert len(rows) == 4
    for row in rows:
        assert sum(area["share"] for area in row["tasks"]["squares"]) == pytest.approx(1)
        model = load_backbone("bundled:tiny").patched(patch)
        image = Image.open(row["image"]).convert("RGB")
        answer = Segmentation().reduce(model(patch.preprocessing(image)))[0]
        expected = lay_over(answer, View(patch.task.classes, patch.preprocessing, image))
        drawn_picture = np.asarray(Image.open(row["overlays"]["squares"]))
        assert np.array_equal(drawn_picture[: image.height, : image.width], np.asarray(expected)), "a legend lies below"
        assert len(drawn_picture) > image.height


def test_what_makes_no_sense_is_refused(tmp_path: Path, run: Run, patches: dict[str, Path]) -> None:
    folder = write_folder(tmp_path / "colors")
    done = run("predict", folder / "test", "-p", patches["linear-probe"], "--overlay", tmp_path / "drawn")
    assert done.code == 1
    assert "no answer of these patches is drawn, those of detection, " in done.err
    done = run("fit", folder, "-o", tmp_path / "p.safetensors", "--kind", "segmentation")
    assert done.code == 1
    assert "holds no segmentation task in a layout that is read" in done.err
    masks = write_masks(tmp_path / "squares", 4, 32)
    for verb in (("profile", masks), ("select", masks, "-o", tmp_path / "s.safetensors")):
        done = run(*verb, "--epochs", "1")
        assert done.code == 1
        assert "takes classification tasks" in done.err, (verb, done.err)
