"""Detection from annotations to measured boxes: layouts, views, both detectors, figures, the engine's answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import color_task, make_timm, small_preprocessing
from dense import box_task, draw_scene, mask_table, square_task, write_voc
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.tuning import Tuning
from modelpatch.data.augmentation import AUGMENTATIONS
from modelpatch.data.images import ImageStore
from modelpatch.data.splits import Split
from modelpatch.data.task import load_task
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import DataError, TrainingError, TrainingWarning
from modelpatch.heads.detector import BOXES, pack, unpack
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.tasks.detection import Boxes, BoxMeter, find_boxes
from modelpatch.tasks.kind import View
from modelpatch.tasks.segmentation import PixelMask
from modelpatch.train import evaluate, fit
from tolerance import close

pytestmark = pytest.mark.slow

METHODS: dict[str, Method] = {
    "probe": LinearProbe(),
    "scale-bias": ScaleBias(),
    "piggyback": Piggyback(lr=1e-2),
    "delta": DeltaNetwork(),
}


@pytest.fixture(scope="module")
def mobile() -> Backbone:
    return make_timm("mobilenetv2_035", 64)


@pytest.fixture(scope="module")
def short() -> Backbone:
    """A ResNet-18 of one narrow block a stage."""
    return make_timm("resnet18", 64, layers=[1, 1, 1, 1], channels=[16, 32, 64, 128])


@pytest.mark.parametrize("decoder", ["faster-rcnn", "ssdlite"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_detects_with_either_detector(name: str, decoder: str, tmp_path: Path, mobile: Backbone) -> None:
    data = box_task(4, 64)
    patch = fit(mobile, data, METHODS[name], epochs=1, batch_size=2, decoder=decoder)
    mobile.verify()
    loaded = Patch.load(patch.save(tmp_path / "boxes.safetensors"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = mobile.patched(loaded)(images)
    assert found.shape == (2, BOXES, 6)
    assert close(BoundPatch(mobile, loaded)(images), found)
    assert close(Engine(mobile, {"boxes": loaded}, tuning=Tuning())(images, only=["boxes"])["boxes"], found)
    assert patch.metrics.keys() >= {"test_map", "test_map50", "test_images"}
    assert evaluate(mobile, loaded, data).score == pytest.approx(patch.metrics["test_map"], abs=1e-6)


def test_training_finds_the_squares(short: Backbone) -> None:
    start = fit(short, box_task(4, 64), ScaleBias(lr=1e-9, head_lr=1e-9), epochs=1).metrics["test_map50"]
    settings = {"epochs": 6, "batch_size": 4, "augment": "none"}
    found = fit(short, box_task(32, 64), ScaleBias(lr=3e-3, head_lr=1e-3), **settings).metrics["test_map50"]
    assert found > start + 0.2


def test_a_rate_for_linear_heads_is_warned_of(short: Backbone) -> None:
    task = box_task(2, 64)
    with pytest.warns(TrainingWarning, match=r"the head of a detection task learns little at head_lr=0\.01"):
        fit(short, task, ScaleBias(), epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        fit(short, task, ScaleBias(head_lr=1e-3), epochs=1)


def test_one_pass_serves_all_three_kinds(mobile: Backbone) -> None:
    made = {
        "colors": fit(mobile, color_task(6, 64), ScaleBias(), epochs=1, framing="stretch"),
        "squares": fit(mobile, square_task(6, 64), ScaleBias(), epochs=1),
        "boxes": fit(mobile, box_task(4, 64), LinearProbe(), epochs=1),
    }
    engine = Engine(mobile, made, tuning=Tuning())
    images = torch.randn(2, 3, 64, 64)
    found = engine(images)
    assert {name: tuple(found[name].shape[1:]) for name in made} == {
        "colors": (3,),
        "squares": (3, 64, 64),
        "boxes": (BOXES, 6),
    }
    for name, patch in made.items():
        assert torch.allclose(found[name], mobile.patched(patch)(images), atol=1e-4)
    assert len(engine.plan_for(2, only=list(made)).roots) == 1


# boxes and views --------------------------------------------------------------------------------------------


def test_boxes_move_with_their_image() -> None:
    """A box's edges in a view lie where the mask of the same object ends in it."""
    generator = np.random.default_rng(0)
    images, masks, found = [], [], []
    for _ in range(8):
        image, mask = draw_scene(generator, 64)
        mask = (mask == 2).astype(np.uint8)
        rows, columns = np.nonzero(mask)
        corners = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        images.append(image)
        masks.append(PixelMask(mask, mask_table()))
        found.append(Boxes(np.array(corners, dtype=float), np.zeros(1, np.int64), np.zeros(1, bool)))
    zeros = np.zeros(8, dtype=np.int64)
    seen = Preprocessing(input_size=(3, 48, 48), crop_pct=0.75)
    stores = [ImageStore(Split(images, zeros, targets), seen, 2**20) for targets in (masks, found)]
    rows = torch.arange(8)
    compared = 0
    for name, seed in (("none", ()), ("light", (1, 2)), ("standard", (3, 4))):
        shown, placed = (store.batch(rows, AUGMENTATIONS[name], seed).targets for store in stores)
        for mask, target in zip(shown, placed, strict=True):
            for box in target["boxes"]:
                inside = [int(v) for v in (box + torch.tensor([1.5, 1.5, -1.5, -1.5])).round()]
                patch = mask[inside[1] : inside[3], inside[0] : inside[2]]
                if patch.numel():
                    assert patch.float().mean() > 0.97
                    compared += 1
    assert compared >= 12


@pytest.mark.parametrize("framing", ["crop", "stretch"])
def test_answers_come_back_to_the_pixels_of_the_image(framing: str) -> None:
    seen = small_preprocessing(16).model_copy(update={"framing": framing})
    corners = np.array([[20.0, 4.0, 40.0, 28.0]])
    boxes_in = Boxes(corners, np.zeros(1, np.int64), np.zeros(1, bool))
    picture = Image.new("RGB", (64, 32))
    target = (
        ImageStore(Split([picture], np.zeros(1, np.int64), [boxes_in]), seen, 2**20)
        .batch(torch.arange(1), AUGMENTATIONS["none"], ())
        .targets[0]
    )
    answer = torch.zeros(2, 6)
    answer[0] = torch.cat([target["boxes"][0], torch.tensor([0.9, 0.0])])
    (box,) = find_boxes(answer, View(("a",), seen, picture))
    assert box.corners == pytest.approx(tuple(corners[0]), abs=1e-4)


def test_answers_are_packed_with_the_surest_first() -> None:
    one = {
        "boxes": torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]]),
        "scores": torch.tensor([0.2, 0.7]),
        "labels": torch.tensor([1, 2]),
    }
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    packed = pack([one, none])
    assert packed[0, :2, 4].tolist() == pytest.approx([0.7, 0.2])
    assert packed[0, :2, 5].tolist() == [1, 0]
    assert not packed[1].any()
    assert unpack(packed[0])["boxes"].tolist() == [[2, 2, 3, 3], [0, 0, 1, 1]]


def test_mean_average_precision_by_hand() -> None:
    """Class a: found exactly, and again wrongly but less sure: precision 1. Class b: of two one is found: recall 1/2."""
    meter = BoxMeter(("a", "b", "never"))
    answer = torch.zeros(4, 6)
    answer[0] = torch.tensor([0, 0, 10, 10, 0.9, 0])
    answer[1] = torch.tensor([0, 0, 8, 8, 0.8, 1])
    answer[2] = torch.tensor([20, 20, 30, 30, 0.3, 0])
    asked = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 8, 8], [40, 40, 50, 50]]),
        "labels": torch.tensor([0, 1, 1]),
        "difficult": torch.zeros(3, dtype=torch.bool),
    }
    meter.update(answer[None], [asked])
    result = meter.result()
    half = 51 / 101  # of 101 recalls those up to 0.5 are reached
    assert result.per_class == pytest.approx({"a": 1.0, "b": half})
    assert result.map == pytest.approx((1 + half) / 2)
    assert result.map50 == pytest.approx((1 + half) / 2)


def test_difficult_boxes_are_not_learned_and_not_wrong() -> None:
    meter = BoxMeter(("a", "b"))
    answer = torch.zeros(2, 6)
    answer[0] = torch.tensor([0, 0, 10, 10, 0.9, 0])
    answer[1] = torch.tensor([20, 20, 40, 40, 0.95, 0])
    asked = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]),
        "labels": torch.tensor([0, 0]),
        "difficult": torch.tensor([False, True]),
    }
    meter.update(answer[None], [asked])
    assert meter.result().map == pytest.approx(1.0)


def test_settings_that_detectors_have_not_are_refused(mobile: Backbone) -> None:
    for settings in ({"class_weights": "balanced"}, {"label_smoothing": 0.1}):
        with pytest.raises(TrainingError, match=f"the loss of detection tasks does not take {next(iter(settings))}"):
            fit(mobile, box_task(2, 64), LinearProbe(), epochs=1, **settings)
    with pytest.raises(TrainingError, match="decoder='deeplab' is none for detection"):
        fit(mobile, box_task(2, 64), LinearProbe(), epochs=1, decoder="deeplab")


# layouts ----------------------------------------------------------------------------------------------------


def test_voc_and_coco_say_the_same(tmp_path: Path) -> None:
    voc = load_task(write_voc(tmp_path / "voc"))
    assert (voc.task.kind, voc.classes, len(voc.train), len(voc.test)) == ("detection", ("blue", "red"), 6, 6)
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, images in (("train", voc.train), ("test", voc.test)):
        (root / "images" / split).mkdir(parents=True)
        described: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": []}
        described["categories"] = [{"id": 7, "name": "blue"}, {"id": 9, "name": "red"}]
        for number, (image, target) in enumerate(zip(images.images, images.targets or (), strict=True)):
            assert isinstance(image, Path) and isinstance(target, Boxes)  # noqa: PT018
            (root / "images" / split / image.name).write_bytes(image.read_bytes())
            described["images"].append({"id": number, "file_name": image.name})
            for (x0, y0, x1, y1), label in zip(target.corners.tolist(), target.labels.tolist(), strict=True):
                box = {"image_id": number, "category_id": (7, 9)[label], "bbox": [x0, y0, x1 - x0, y1 - y0]}
                described["annotations"].append(box)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(described))
    coco = load_task(root)
    assert coco.classes == voc.classes
    for ours, theirs in zip(coco.train.targets or (), voc.train.targets or (), strict=True):
        assert ours.content() == theirs.content()


def test_annotations_that_are_none_are_named(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", 2)
    first = root / "Annotations" / "train0.xml"
    kept = first.read_text()
    first.write_text(kept.replace("<xmin>", "<left>").replace("</xmin>", "</left>"))
    with pytest.raises(
        DataError, match=r"train0\.xml, object\[0\]\.bndbox: it has no 'xmin'; it has left, ymin, xmax, ymax"
    ):
        load_task(root)
    first.write_text(kept[:40])
    with pytest.raises(DataError, match=r"train0\.xml cannot be read"):
        load_task(root)
    first.write_text(kept)
    (root / "JPEGImages" / "train1.png").unlink()
    with pytest.raises(DataError, match="has no image 'train1'"):
        load_task(root)
    with pytest.raises(DataError, match="classes and ignore are for the values of masks"):
        load_task(write_voc(tmp_path / "other", 2), ignore=3)


def test_a_data_set_of_the_hub_with_objects_is_a_detection(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    voc = load_task(write_voc(tmp_path / "voc", 3))
    targets = [target for target in voc.train.targets or () if isinstance(target, Boxes)]
    rows = {
        "image": [Image.open(str(image)) for image in voc.train.images],
        "objects": [
            {
                "bbox": [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in t.corners.tolist()],
                "category": t.labels.tolist(),
            }
            for t in targets
        ],
    }
    inner = {
        "bbox": datasets.Sequence(datasets.Value("float32"), length=4),
        "category": datasets.ClassLabel(names=["blue", "red"]),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.Sequence(inner)})
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    data = load_task(f"hf:{folder}", hold_out=False)
    assert (data.task.kind, data.classes) == ("detection", ("blue", "red"))
    for ours, theirs in zip(data.train.targets or (), targets, strict=True):
        assert isinstance(ours, Boxes)
        assert np.allclose(ours.corners, theirs.corners)


@pytest.mark.real
@pytest.mark.parametrize(("name", "counts"), [("bccd_voc", (3, 205, 72)), ("raccoon_voc", (1, 156, 40))])
def test_real_annotations_are_read(name: str, counts: tuple[int, ...], real_data: Callable[[str], Path]) -> None:
    data = load_task(real_data(name))
    assert (len(data.classes), len(data.train), len(data.test)) == counts
