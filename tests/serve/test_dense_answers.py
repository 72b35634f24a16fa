"""Masks and boxes over HTTP: what is said agrees with the patch alone, the picture can be read, the client knows both."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import make_timm, skip_without
from dense import box_task, square_task
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.store.store import Store
from modelpatch.tasks.detection import Detection, find_boxes
from modelpatch.tasks.drawing import palette
from modelpatch.tasks.kind import View
from modelpatch.tasks.segmentation import Segmentation
from modelpatch.train import fit
from serving import Serving, fill, network, serving

pytestmark = pytest.mark.service

skip_without("torchmetrics")


@pytest.fixture(scope="module")
def squares() -> Patch:
    return fit(network(), square_task(8), ScaleBias(), epochs=2)


@pytest.fixture
def there(tmp_path: Path, squares: Patch) -> Iterator[Serving]:
    store = fill(tmp_path / "store")
    store.publish("squares", squares)
    with serving(store) as running:
        yield running


def picture(width: int = 40, height: int = 20) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_a_mask_comes_as_areas_and_as_a_picture(there: Serving, squares: Patch) -> None:
    data = picture()
    with there.client() as client:
        said = client.ask([data], ["squares", "flowers"])["images"][0]["answers"]
        pairs = client.predict([data], ["squares"])[0]["squares"]
    expected = Segmentation().reduce(there.backbone.patched(squares)(squares.preprocessing(data)))[0]
    shares = np.bincount(expected.ravel(), minlength=3) / expected.size
    areas = said["squares"]["areas"]
    assert {area["index"]: area["share"] for area in areas} == pytest.approx(
        {index: share for index, share in enumerate(shares) if share}, abs=1e-6
    )
    assert [area["share"] for area in areas] == sorted((area["share"] for area in areas), reverse=True)
    assert pairs == [(area["class"], area["share"]) for area in areas[:3]]
    over = Image.open(io.BytesIO(base64.b64decode(said["squares"]["overlay"]["png"])))
    assert over.mode == "RGBA"
    assert np.array_equal(np.asarray(over)[:, :, :3], palette(3)[expected])
    assert said["squares"]["overlay"]["place"] == [0, 0, 1, 1], "the whole image is seen"
    assert "areas" not in said["flowers"]
    assert said["flowers"]["top"]
    assert said["squares"]["top"] == []


def test_a_cropped_image_says_where_the_mask_belongs(squares: Patch) -> None:
    seen = squares.preprocessing.model_copy(update={"framing": "crop"})
    view = View(squares.task.classes, seen, known_size=(40, 20))
    said = Segmentation().to_json(np.zeros((4, 4), dtype=np.uint8), view)
    assert said["overlay"]["place"] == [0.25, 0, 0.5, 1]


def test_boxes_come_in_the_pixels_of_the_image(tmp_path: Path) -> None:
    backbone = make_timm("resnet18", 64)
    patch = fit(backbone, box_task(4, 64), LinearProbe(head_lr=1e-3), epochs=1)
    store = Store(tmp_path / "store")
    store.publish("boxes", patch)
    data = picture(80, 40)
    with serving(store, backbone) as running, running.client() as client:
        said = client.ask([data], ["boxes"])["images"][0]["answers"]["boxes"]
        pairs = client.predict([data], ["boxes"])[0]["boxes"]
    answer = backbone.patched(patch)(patch.preprocessing(data))[0]
    expected = find_boxes(answer, View((), patch.preprocessing, data))
    assert said["size"] == [80, 40]
    assert [box["box"] for box in said["boxes"]] == [pytest.approx(box.corners, abs=0.02) for box in expected]
    assert pairs == [(box["class"], box["probability"]) for box in said["boxes"]]


def test_a_sure_box_is_told_and_an_unsure_one_is_not() -> None:
    import torch

    seen = make_timm("resnet18", 64).preprocessing.model_copy(update={"framing": "stretch"})
    answer = torch.tensor([[0.0, 0, 32, 64, 0.8, 1], [0, 0, 64, 64, 0.4, 0]])
    (box,) = Detection().to_json(answer, View(("red", "blue"), seen, known_size=(100, 50)))["boxes"]
    assert (box["class"], box["box"]) == ("blue", [0, 0, 50, 50])
