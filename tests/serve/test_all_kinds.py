"""Patches of all five kinds: one pass of an engine, one HTTP request, one call of the command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import color_task, make_timm, skip_without
from dense import box_task, square_task
from modelpatch.backbone.backbone import Backbone
from modelpatch.engine.engine import Engine
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.contents import Patch
from modelpatch.store.store import Store
from modelpatch.tasks.kind import kind_of
from modelpatch.train import fit
from serving import serving
from vectors import label_task, number_task

pytestmark = pytest.mark.service
skip_without("torchmetrics", "pycocotools")
PIXELS = 64
KINDS = {"colors", "lights", "brightness", "squares", "boxes"}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_timm("resnet18", PIXELS)


@pytest.fixture(scope="module")
def patches(backbone: Backbone) -> dict[str, Patch]:
    tasks = {
        "colors": color_task(12, PIXELS),
        "lights": label_task(24, PIXELS),
        "brightness": number_task(12, PIXELS, scale=30.0, shift=1990.0),
        "squares": square_task(4, PIXELS),
        "boxes": box_task(4, PIXELS),
    }
    return {name: fit(backbone, task, LinearProbe(head_lr=1e-3), epochs=1) for name, task in tasks.items()}


@pytest.fixture(scope="module")
def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_one_pass_answers_patches_of_all_kinds(backbone: Backbone, patches: dict[str, Patch], picture: bytes) -> None:
    assert {patch.task.kind for patch in patches.values()} >= {
        "classification",
        "multilabel",
        "regression",
        "segmentation",
        "detection",
    }
    engine = Engine(backbone, patches)
    answers = engine(engine.read([picture], list(patches)), only=list(patches))
    for name, patch in patches.items():
        alone = backbone.patched(patch)(patch.preprocessing(picture))
        assert torch.allclose(answers[name], alone, rtol=1e-3, atol=1e-2), name
        kind = kind_of(engine.kind(name))
        (reduced,) = kind.reduce(answers[name])
        assert kind.summarize(kind.describe(reduced, engine.view(name, picture)))
    view = engine.view("lights", picture)
    assert view.options == patches["lights"].task.options


def test_one_request_answers_patches_of_all_kinds(
    backbone: Backbone, patches: dict[str, Patch], picture: bytes, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    for name, patch in patches.items():
        store.publish(name, patch)
    with serving(store, backbone) as running, running.client() as client:
        said = client.ask([picture], sorted(KINDS))["images"][0]["answers"]
        pairs = client.predict([picture], sorted(KINDS))[0]
        listed = {one["name"]: one["metrics"] for one in client.patches()}
    assert said.keys() == KINDS
    assert said["colors"]["top"] and said["squares"]["areas"] and "boxes" in said["boxes"]  # noqa: PT018
    values = backbone.patched(patches["brightness"])(patches["brightness"].preprocessing(picture))[0].tolist()
    assert [one["value"] for one in said["brightness"]["values"]] == pytest.approx(values, rel=1e-4)
    assert pairs["brightness"] == [(one["name"], one["value"]) for one in said["brightness"]["values"]]
    shares = backbone.patched(patches["lights"])(patches["lights"].preprocessing(picture))[0].sigmoid().tolist()
    thresholds = patches["lights"].task.options["thresholds"]
    told = {index for index, (share, least) in enumerate(zip(shares, thresholds, strict=True)) if share >= least}
    assert {one["index"] for one in said["lights"]["labels"]} == told
    assert len(said["lights"]["top"]) == 3
    assert pairs["lights"] == [(one["class"], one["probability"]) for one in said["lights"]["labels"]]
    assert "values" not in said["lights"] and "labels" not in said["colors"]  # noqa: PT018
    assert listed["brightness"]["test_r2"] == patches["brightness"].metrics["test_r2"]
    assert json.dumps(said)
