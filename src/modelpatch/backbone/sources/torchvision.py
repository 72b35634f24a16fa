"""`torchvision:NAME`: torchvision's models with their default weights, segmenters and detectors included."""

from __future__ import annotations

from typing import Any

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, register_source
from modelpatch.backbone.sources.torchvision_dense import build_dense, build_model, dense_models
from modelpatch.errors import UnknownBackboneError


@register_source("torchvision")
class TorchvisionSource(BackboneSource):
    """torchvision's models."""

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        import torchvision

        if name in dense_models():
            module, seen = build_dense(name, pretrained, arguments)
            return BuiltNetwork(module=module, preprocessing=seen)
        if name not in torchvision.models.list_models(torchvision.models):
            raise UnknownBackboneError(
                f"torchvision has no model {name!r} that could be a backbone: for classification, FCN, DeepLabV3, "
                "Faster R-CNN or SSD. See torchvision.models.list_models()."
            )
        module, transform = build_model(name, pretrained, arguments, init_weights=True)
        crop = int(transform.crop_size[0])
        seen = Preprocessing(
            input_size=(3, crop, crop),
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            interpolation=transform.interpolation.value,
            crop_pct=crop / transform.resize_size[0],
        )
        return BuiltNetwork(module=module, preprocessing=seen)
