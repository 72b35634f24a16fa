"""Segmentation from data to a measured patch: joint views, losses, every method, the engine's answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import color_task, make_timm, make_tiny, small_preprocessing
from dense import SHADES, mask_table, square_task, write_masks
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.tuning import Tuning
from modelpatch.data.augmentation import AUGMENTATIONS
from modelpatch.data.images import ImageStore
from modelpatch.data.splits import Split
from modelpatch.data.task import Task, load_task
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import DataError, MethodError, TrainingError, TrainingWarning
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.pruned import Pruned
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.methods.widened import Widened
from modelpatch.patch.contents import Patch
from modelpatch.recipes.comparison import compare
from modelpatch.tasks.decoding import find_maps
from modelpatch.tasks.kind import balance
from modelpatch.tasks.segmentation import IGNORED, MaskMeter, PixelMask, Segmentation
from modelpatch.train import Callback, Trainer, evaluate, fit
from tolerance import close

pytestmark = pytest.mark.slow

METHODS: dict[str, Method] = {
    "probe": LinearProbe(),
    "scale-bias": ScaleBias(),
    "scale-bias recomputed": ScaleBias(statistics="recomputed"),
    "subset": Subset(),
    "piggyback": Piggyback(lr=1e-2),
    "delta": DeltaNetwork(modules="all"),
    "lora": LoRA(),
    "widened": Widened(),
    "full": FullFinetune(),
    "sum": ScaleBias() + DeltaNetwork(),
}


def answer_alike(backbone: Backbone, patch: Patch) -> None:
    """The patched model, the bound patch and the engine answer alike."""
    images = torch.randn(3, *patch.preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    expected = backbone.patched(patch)(images)
    assert close(BoundPatch(backbone, patch)(images), expected)
    engine = Engine(backbone, {"squares": patch}, tuning=Tuning())
    assert close(engine(images, only=["squares"])["squares"], expected)
    rows = engine(images, ["base", "squares", "base"])
    assert torch.allclose(rows[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_segments_under_any_decoder(name: str, tiny: Backbone, tmp_path: Path) -> None:
    pytest.importorskip("peft") if name == "lora" else None
    before = tiny.fingerprint
    for decoder in ("deeplab", "fcn16"):
        patch = fit(tiny, square_task(8), METHODS[name], epochs=1, decoder=decoder)
        tiny.verify()
        assert tiny.fingerprint == before
        loaded = Patch.load(patch.save(tmp_path / f"{decoder}.safetensors"))
        assert loaded.task == patch.task
        assert loaded.preprocessing.framing == "stretch"
        images = torch.randn(2, 3, 16, 16)
        assert tiny.patched(loaded)(images).shape == (2, 3, 16, 16)
        answer_alike(tiny, loaded)
        assert evaluate(tiny, loaded, square_task(8)).score == pytest.approx(patch.metrics["test_miou"])


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_tiny", "mobilenetv2_100"])
def test_decoders_read_the_maps_of_any_network(name: str) -> None:
    builders: dict[str, Callable[[], Backbone]] = {
        "resnet18": lambda: make_timm("resnet18", 32),
        "convnext_tiny": lambda: make_timm("convnext_tiny", 32, dims=(24, 48, 96, 192)),
        "vit_tiny": lambda: make_timm("vit_tiny_patch16_224", 32, img_size=32),
        "mobilenetv2_100": lambda: make_timm("mobilenetv2_100", 64),
    }
    backbone = builders[name]()
    method: Method = Pruned() if name == "resnet18" else LinearProbe()
    patch = fit(backbone, square_task(6, 32), method, epochs=1)
    assert patch.head.strides[-1] == max(one.stride for one in find_maps(backbone, backbone.input_size[1]))
    answer_alike(backbone, patch)


def test_training_learns_the_squares(tiny: Backbone) -> None:
    untrained = fit(tiny, square_task(), ScaleBias(lr=1e-9, head_lr=1e-9), epochs=1).metrics["test_miou"]
    learned = fit(tiny, square_task(64), ScaleBias(lr=1e-2), epochs=12, batch_size=16).metrics
    assert learned["test_miou"] > untrained + 0.2
    assert learned["test_pixel_accuracy"] > 0.6


def test_an_interrupted_fit_goes_on_to_the_same_patch(tiny: Backbone, tmp_path: Path) -> None:
    whole = fit(tiny, square_task(), ScaleBias(), epochs=3)

    class Stop(Callback):
        def on_epoch_begin(self, trainer: Trainer) -> None:
            if trainer.epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny, square_task(), ScaleBias(), epochs=3, checkpoint=tmp_path / "state", callbacks=[Stop()])
    again = fit(tiny, square_task(), ScaleBias(), epochs=3, checkpoint=tmp_path / "state")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


# views ------------------------------------------------------------------------------------------------------


def test_a_mask_moves_with_its_image() -> None:
    """Pictures whose value is their mask: after any view the two must agree but at edges, where images are mixed."""
    generator = np.random.default_rng(0)
    masks = [np.kron(generator.integers(0, 3, (4, 4)), np.ones((8, 8))).astype(np.uint8) for _ in range(6)]
    images = [np.repeat(100 * mask[:, :, None], 3, 2) for mask in masks]
    split = Split(images, np.zeros(6, dtype=np.int64), [PixelMask(mask, mask_table()) for mask in masks])
    seen = Preprocessing(input_size=(3, 32, 32), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
    store = ImageStore(split, seen, 2**20)
    rows = torch.arange(6)
    assert torch.equal(
        store.plain(rows)[:, 0].mul(255 / 100).round().long(), store.batch(rows, AUGMENTATIONS["none"], ()).targets
    )
    for name in ("light", "standard"):
        views = store.batch(rows, AUGMENTATIONS[name], (0, 1, 2)).images[:, 0] * 255 / 100
        targets = store.batch(rows, AUGMENTATIONS[name], (0, 1, 2)).targets
        inside = (views - views.round()).abs() < 1e-3
        assert inside.float().mean() > 0.5
        assert ((views.round().long() == targets) | ~inside).float().mean() > 0.98
        assert not torch.equal(targets, store.batch(rows, AUGMENTATIONS[name], (0, 2, 2)).targets)


@pytest.mark.parametrize("framing", ["crop", "stretch"])
def test_a_frame_is_where_it_says(framing: str) -> None:
    """A white square in the middle of what is seen fills the framed area's middle."""
    seen = small_preprocessing(16).model_copy(update={"framing": framing})
    left, top, width, height = seen.framed_area(64, 32)
    assert (left, top, width, height) == ((16, 0, 32, 32) if framing == "crop" else (0, 0, 64, 32))
    picture = Image.new("RGB", (64, 32))
    box = [round(v) for v in (left + width / 4, top + height / 4, left + 3 * width / 4, top + 3 * height / 4)]
    picture.paste("white", tuple(box))
    crop = seen.center_crop(seen.decode(picture))[0].float() / 255
    assert crop[5:11, 5:11].min() > 0.9
    assert crop[:3].max() < 0.1
    assert crop[:, :3].max() < 0.1


def test_framing_is_chosen_by_the_task_or_by_name(tiny: Backbone) -> None:
    assert fit(tiny, color_task(6), LinearProbe(), epochs=1).preprocessing == tiny.preprocessing
    assert fit(tiny, color_task(6), LinearProbe(), epochs=1, framing="stretch").preprocessing.framing == "stretch"
    assert fit(tiny, square_task(6), LinearProbe(), epochs=1, framing="crop").preprocessing == tiny.preprocessing


def test_one_pass_serves_a_classification_and_a_segmentation(tiny: Backbone) -> None:
    masks = fit(tiny, square_task(8), ScaleBias(), epochs=1)
    labels = fit(tiny, color_task(8), ScaleBias(), epochs=1, framing="stretch")
    engine = Engine(tiny, {"squares": masks, "colors": labels}, tuning=Tuning())
    assert (engine.kind("squares"), engine.kind("colors"), engine.kind("base")) == (
        "segmentation",
        "classification",
        "classification",
    )
    images = torch.randn(2, 3, 16, 16)
    found = engine(images)
    assert close(found["squares"], tiny.patched(masks)(images))
    assert torch.allclose(found["colors"], tiny.patched(labels)(images), atol=1e-5)
    plan = engine.plan_for(2, only=["squares", "colors"])
    assert len(plan.roots) == 1, "both see the images alike"
    probe = fit(tiny, square_task(8), LinearProbe(), epochs=1)
    frozen = fit(tiny, color_task(8), LinearProbe(), epochs=1, framing="stretch")
    shared = Engine(tiny, {"squares": probe, "colors": frozen}, tuning=Tuning()).plan_for(1, only=["squares", "colors"])
    assert shared.flops == max(
        Engine(tiny, {"a": one}, tuning=Tuning()).plan_for(1, only=["a"]).flops for one in (probe, frozen)
    ), "all of the frozen chain runs once"


# losses and figures -----------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_pixels_that_have_a_class() -> None:
    kind = Segmentation()
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(3, 3, 4, 4, generator=generator), torch.randint(0, 3, (3, 4, 4), generator=generator)
    masks[0, :2] = IGNORED
    weights = torch.tensor([0.5, 1.0, 2.0])
    for chosen in (None, weights):
        expected = F.cross_entropy(logits, masks, chosen, ignore_index=IGNORED, label_smoothing=0.1)
        assert torch.allclose(kind.loss(logits, masks, chosen, 0.1), expected)
        parts = [kind.loss(logits[i : i + 1], masks[i : i + 1], chosen, 0.1) for i in range(3)]
        counts = kind.weigh_images(masks, chosen)
        assert torch.allclose(sum(p * c for p, c in zip(parts, counts, strict=True)) / counts.sum(), expected)  # type: ignore[arg-type]
    assert kind.loss(logits, torch.full_like(masks, IGNORED)) == 0


def test_balanced_weights_count_pixels() -> None:
    data = square_task(8)
    store = ImageStore(data.train, small_preprocessing(), 2**20)
    masks = store.batch(torch.arange(len(store)), AUGMENTATIONS["none"], ()).targets
    weights = balance(Segmentation().count_classes(masks, 3))
    values = np.concatenate([np.asarray(target.source).ravel() for target in data.train.targets or ()])  # type: ignore[union-attr]
    counts = np.bincount(values[values != IGNORED], minlength=3)
    assert weights.tolist() == pytest.approx((counts.sum() / (3 * counts)).tolist(), rel=1e-5)


def test_mean_iou_and_pixel_accuracy_by_hand() -> None:
    """Two images of 2 x 2: right 2 of class 0, 1 of class 1; one pixel of class 1 answered as 0; the rest has no class."""
    meter = MaskMeter(("a", "b", "c"))
    asked = torch.tensor([[[0, 0], [1, 1]], [[IGNORED] * 2] * 2])
    answered = torch.tensor([[[0, 0], [1, 0]], [[2, 2], [2, 2]]])
    meter.update(F.one_hot(answered, 3).permute(0, 3, 1, 2).float(), asked)
    result = meter.result()
    assert result.per_class == {"a": 2 / 3, "b": 1 / 2}, "no image and no answer that counts has c"
    assert result.miou == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result.pixel_accuracy == 3 / 4
    assert result.images == 2


# what is refused --------------------------------------------------------------------------------------------


def test_what_makes_no_sense_for_pixels_is_refused(tiny: Backbone) -> None:
    with pytest.raises(MethodError, match="siamese"):
        fit(tiny, square_task(4), Subset(head="siamese"), epochs=1)
    with pytest.raises(MethodError, match="whole images"):
        fit(tiny, square_task(4), Head2Toe(), epochs=1)
    with pytest.raises(TrainingError, match="is a classification task"):
        fit(tiny, color_task(4), LinearProbe(), epochs=1, decoder="deeplab")
    with pytest.raises(TrainingError, match="no segment called 'nowhere' gives a map"):
        fit(tiny, square_task(4), LinearProbe(), epochs=1, taps=("nowhere",))
    patch = fit(tiny, square_task(4), LinearProbe(), epochs=1)
    with pytest.raises(DataError, match="is a classification task, the patch answers a segmentation task"):
        evaluate(tiny, patch, color_task(4))


def test_methods_are_compared_by_mean_iou(tiny: Backbone) -> None:
    found = compare(tiny, square_task(4), ["linear-probe"], epochs=1)
    assert found.as_dict()["rows"][0]["miou"] == found.patches["linear-probe"].metrics["test_miou"]


def test_named_outputs_are_read(tiny: Backbone) -> None:
    names = [tiny.chain[one.segment].name for one in find_maps(tiny, 16)]
    head = Segmentation().make_head(tiny, 3, 16, "deeplab", (names[0], names[-1]))
    assert head is not None
    assert [tiny.chain[tap].name for tap in head.record.taps] == [names[0], names[-1]]


# data -------------------------------------------------------------------------------------------------------


def test_values_without_names_are_told(tmp_path: Path) -> None:
    data = write_masks(tmp_path / "squares", 2, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(data)
    (data / "classes.txt").unlink()
    with pytest.warns(TrainingWarning, match=r"each value of its masks is one: 0, 1, .*--ignore"):
        assert load_task(data).classes == tuple(str(value) for value in range(len(SHADES)))


def test_masks_that_are_none_are_named(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "squares", 4)
    assert load_task(root).classes == SHADES
    assert load_task(root, classes=["a", "b", "c"]).classes == ("a", "b", "c")
    assert load_task(root, ignore=0).classes == SHADES[1:]
    (root / "classes.txt").unlink()
    assert load_task(root).classes == ("0", "1", "2")
    first = root / "train" / "labels" / "00.png"
    with pytest.raises(DataError, match=r"00\.png holds the value 2, which stands for no class"):
        load_task(root, classes=["a", "b"])
    Image.new("RGB", (16, 16), "red").save(first)
    with pytest.raises(DataError, match=r"00\.png is a picture of shape \(16, 16, 3\)"):
        load_task(root)
    Image.new("L", (8, 16)).save(first)
    with pytest.raises(DataError, match=r"00\.png is 8 x 16 pixels, its image 16 x 16"):
        load_task(root)
    first.unlink()
    with pytest.raises(DataError, match="has no mask for 1 of 4 images"):
        load_task(root)


def test_voc_masks_are_palette_pictures(tmp_path: Path) -> None:
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem in ("a", "b", "c"):
        Image.new("RGB", (20, 10), "red").save(root / "JPEGImages" / f"{stem}.jpg")
        mask = Image.new("P", (20, 10), 15)
        mask.putpalette([0, 0, 0, 200, 100, 50] * 128)
        mask.putpixel((0, 0), 255)
        mask.save(root / "SegmentationClass" / f"{stem}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("c\n")
    data = load_task(root, kind="segmentation")
    assert data.classes[0] == "background"
    assert data.classes[15] == "person"
    assert (len(data.train), len(data.test), data.validation) == (2, 1, None)
    mask = (
        ImageStore(data.test, small_preprocessing().model_copy(update={"framing": "stretch"}), 2**20)
        .batch(torch.arange(1), AUGMENTATIONS["none"], ())
        .targets
    )
    assert set(mask.unique().tolist()) <= {15, IGNORED}


def test_a_data_set_of_the_hub_with_two_pictures_is_a_segmentation(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from dense import draw_scene

    generator = np.random.default_rng(0)
    scenes = [draw_scene(generator, 16) for _ in range(4)]
    table = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(image) for image, _ in scenes],
            "annotation": [Image.fromarray(mask) for _, mask in scenes],
        },
        features=datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()}),
    )
    folder = tmp_path / "scenes"
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    table.to_parquet(str(folder / "test.parquet"))
    data = load_task(f"hf:{folder}", classes=SHADES)
    assert (data.task.kind, data.classes, len(data.train)) == ("segmentation", SHADES, 4)
    store = ImageStore(data.train, small_preprocessing(), 2**20)
    found = store.batch(torch.arange(4), AUGMENTATIONS["none"], ()).targets.numpy()
    assert np.array_equal(found, np.stack([mask for _, mask in scenes]))


@pytest.mark.real
def test_camvid_is_read(real_data: Callable[[str], Path]) -> None:
    data: Task = load_task(real_data("camvid"), ignore=11)
    assert (len(data.classes), len(data.train), len(data.test)) == (11, 96, 48)


def test_make_tiny_has_maps() -> None:
    assert [one.stride for one in find_maps(make_tiny(), 16)][-1] == 4
