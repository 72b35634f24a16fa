"""Backbones of transformers, built small from their configurations: features, blocks, preprocessing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Library
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.processor import preprocessing_of_processor
from modelpatch.errors import BackboneError, UnknownBackboneError

transformers = Library("transformers")

VIT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_labels": 5}
EFFICIENT: dict[str, Any] = {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320, "image_size": 32}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any], int]] = {  # class: configuration, arguments, blocks at least
    "ViTForImageClassification": ("ViTConfig", VIT, 3),
    "DeiTForImageClassification": ("DeiTConfig", VIT, 3),
    "BeitForImageClassification": ("BeitConfig", VIT, 3),
    "Data2VecVisionForImageClassification": ("Data2VecVisionConfig", VIT, 3),
    "Dinov2ForImageClassification": ("Dinov2Config", VIT, 3),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", VIT, 3),
    "ConvNextForImageClassification": ("ConvNextConfig", {**STAGES, "image_size": 32}, 5),
    "ResNetForImageClassification": ("ResNetConfig", {**STAGES, "embedding_size": 8}, 5),
    "EfficientNetForImageClassification": ("EfficientNetConfig", EFFICIENT, 7),  # padding="valid"
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.25}, 16),
}


def build(kind: str) -> Any:
    config, arguments, _ = CLASSIFIERS[kind]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()


@torch.no_grad()
def read_by(classifier: nn.Module, model: Any, images: Tensor) -> Tensor:
    """What a module of a model reads."""
    seen: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(pixel_values=images)
    handle.remove()
    return seen[0].flatten(1)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_features_are_what_the_models_own_classifier_reads(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    expected = read_by(model.classifier, model, images)
    with pytest.warns(match="no preprocessor_config"):
        backbone = load_backbone(f"transformers:{tmp_path}")
    assert torch.equal(backbone.chain(images), expected)
    assert torch.equal(backbone(images), model(pixel_values=images).logits)
    assert len(backbone.chain.blocks) >= CLASSIFIERS[kind][2]
    assert backbone.computing.record.probes
    assert backbone.spec == f"transformers:{tmp_path.name}"
    assert load_backbone(model).fingerprint == backbone.fingerprint
    assert set(backbone.module.state_dict()) == set(model.state_dict())


def test_the_mean_of_two_classifiers_has_the_mean_of_what_they_read() -> None:
    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VIT)).eval()
    images = torch.randn(2, 3, 32, 32)
    read = [read_by(one, model, images) for one in (model.cls_classifier, model.distillation_classifier)]
    torch.testing.assert_close(load_backbone(model).chain(images), (read[0] + read[1]) / 2)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("CLIPVisionModel", "CLIPVisionConfig"),
        ("SiglipVisionModel", "SiglipVisionConfig"),
        ("DINOv3ViTModel", "DINOv3ViTConfig"),
    ],
)
def test_towers_give_their_pooled_output(kind: str, config: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**VIT)).eval()
    images = torch.randn(2, 3, 32, 32)
    backbone = load_backbone(model)
    assert torch.equal(backbone.chain(images), model(pixel_values=images).pooler_output)
    assert len(backbone.chain.blocks) >= 3


def test_a_trunk_is_pooled_as_its_architectures_classifier_does() -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VIT)).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model(pixel_values=images).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(load_backbone(model).chain(images), expected)


def test_pickled_weights_unknown_names_and_other_models_are_refused(tmp_path: Path) -> None:
    model = build("ViTForImageClassification")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"pickled weights alone \(pytorch_model\.bin\)"):
        load_backbone(f"transformers:{tmp_path}")
    with pytest.raises(UnknownBackboneError, match="there is no folder"):
        load_backbone(f"transformers:{tmp_path / 'absent'}")
    with pytest.raises(UnknownBackboneError, match="an architecture without weights"):
        load_backbone("transformers:vit")
    with pytest.raises(BackboneError, match=r"not images alone|no image model"):
        load_backbone("transformers:bert", pretrained=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}))
    with pytest.raises(BackboneError, match="code of its repository"):
        load_backbone(f"transformers:{tmp_path}")


def test_naflex_is_refused_by_name_with_any_preprocessing() -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**small))
    for load in (
        lambda: load_backbone(module),
        lambda: load_backbone(module, preprocessing=Preprocessing()),
        lambda: load_backbone("transformers:siglip2_vision_model", pretrained=False, **small),
    ):
        with pytest.raises(BackboneError, match="NaFlex"):
            load()


def test_the_processor_says_how_images_are_seen() -> None:
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.1] * 3, resample=2
    )
    seen, flips = preprocessing_of_processor(processor, None, "x")
    assert (seen.image_size, seen.resize_to, seen.framing, seen.interpolation) == (32, 40, "crop", "bilinear")
    assert seen.mean == pytest.approx((0.1,) * 3)
    assert not flips
    whole = transformers.ViTImageProcessor(size={"height": 48, "width": 48}, do_rescale=True, rescale_factor=1 / 127.5)
    seen, _ = preprocessing_of_processor(whole, None, "x")
    assert (seen.image_size, seen.framing) == (48, "stretch")
    assert seen.std == pytest.approx((0.25,) * 3)  # twice the values
    with pytest.raises(BackboneError, match="no squares"):
        preprocessing_of_processor(transformers.ViTImageProcessor(size={"height": 48, "width": 32}), None, "x")
