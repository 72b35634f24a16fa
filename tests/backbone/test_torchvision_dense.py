"""torchvision's segmenters and detectors as backbones: the same numbers, whole chains, state dicts that load."""

from __future__ import annotations

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.torchvision import DetectorTrunk, dense_models
from modelpatch.errors import UnknownBackboneError
from tolerance import close

pytestmark = pytest.mark.slow

SMALL = Preprocessing(input_size=(3, 64, 64), crop_pct=1.0)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_a_segmenter_answers_with_the_mean_of_its_logits(name: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).eval()
    path = f"{tmp_path}/{name}.safetensors"
    save_file(original.state_dict(), path)
    backbone = load_backbone(f"torchvision:{name}", weights=path, preprocessing=SMALL, num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = original.classifier(original.backbone(images)["out"])
    assert torch.allclose(backbone(images), logits.mean((2, 3)), atol=1e-5)
    assert len(backbone.chain) > 15
    assert close(backbone.chain.head(backbone.chain(images)), backbone(images))


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_a_detector_gives_its_trunks_features(name: str) -> None:
    backbone = load_backbone(f"torchvision:{name}", pretrained=False, preprocessing=SMALL)
    assert backbone.classifier is None
    assert len(backbone.chain.blocks) > 10
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert close(backbone(x), backbone.chain(x))


def test_what_is_none_of_them_is_said() -> None:
    assert dense_models()["ssd300_vgg16"] is DetectorTrunk
    with pytest.raises(UnknownBackboneError, match="has no model 'maskrcnn_resnet50_fpn' that could be a backbone"):
        load_backbone("torchvision:maskrcnn_resnet50_fpn")
