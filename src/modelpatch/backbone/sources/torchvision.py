"""`torchvision:NAME`: torchvision's models with their default weights, segmenters and detectors included.

Of segmentation and detection networks the trained trunk is taken, with features of the whole image:

    segmentation   trunk -> decoder -> mean over positions -> the last 1x1 convolution as a linear layer

    detection      trunk -> mean over positions

Averaging and a 1x1 convolution commute, so that a segmenter's own answer is the mean of the original's logits over all
positions; a detector's trunk gives features alone. Tensors keep torchvision's names, so that its state dicts load; those of
what is left out (auxiliary classifiers, boxes) are dropped.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, check_size, register_source
from modelpatch.errors import BackboneError, UnknownBackboneError

DETECTION_SIZE = 320  # pixels of networks that take any
_TRUNK = tuple(f"backbone.{name}" for name in ("fpn.", "extra.", "scale_weight"))
LEFT_OUT = ("aux_classifier.", *_TRUNK, "rpn.", "roi_heads.", "head.")


class WholeImageSegmenter(nn.Module):
    """Images (B, 3, H, W) to the mean logits (B, K) of a torchvision FCN or DeepLabV3."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        *layers, last = model.classifier.children()
        linear = nn.Linear(last.in_channels, last.out_channels)
        with torch.no_grad():
            linear.weight.copy_(last.weight.flatten(1))
            linear.bias.copy_(last.bias)
        self.classifier = nn.Sequential(*layers, linear)
        self.register_load_state_dict_pre_hook(_keep_own)

    def forward(self, x: Tensor) -> Tensor:
        *decoder, linear = self.classifier
        for layer in (*self.backbone.children(), *decoder):  # the trunk ends with what the decoder reads
            x = layer(x)
        return linear(x.mean((2, 3)))


class DetectorTrunk(nn.Module):
    """Images (B, 3, H, W) to the mean (B, D) of a torchvision detector's last map before its own extra layers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.register_load_state_dict_pre_hook(_keep_own)

    def forward(self, x: Tensor) -> Tensor:
        body = getattr(self.backbone, "body", None)  # a trunk below a pyramid
        for layer in [self.backbone.features] if body is None else body.children():
            x = layer(x)
        return x.mean((2, 3))


def _keep_own(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
    """Drop what the original has beside the trunk, and make its last 1x1 convolution a linear layer."""
    own = module.state_dict()
    for name in list(state):
        if name not in own and name.startswith(LEFT_OUT):
            del state[name]
        elif name in own and own[name].ndim == 2:
            state[name] = state[name].flatten(1)


def dense_models() -> dict[str, type[nn.Module]]:
    """The wrapper of each of torchvision's segmentation and detection networks, by its name."""
    from torchvision.models import detection, list_models, segmentation

    segmenters = [name for name in list_models(segmentation) if name.startswith(("fcn_", "deeplabv3_"))]
    detectors = [name for name in list_models(detection) if name.startswith(("fasterrcnn_", "ssd"))]
    return dict.fromkeys(segmenters, WholeImageSegmenter) | dict.fromkeys(detectors, DetectorTrunk)


@register_source("torchvision")
class TorchvisionSource(BackboneSource):
    """torchvision's models."""

    address = "https://download.pytorch.org"

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        from torchvision import models

        wrapper = dense_models().get(name)
        if wrapper is None and name not in models.list_models(models):
            raise UnknownBackboneError(
                f"torchvision has no model {name!r} that could be a backbone: for classification, FCN, DeepLabV3, "
                "Faster R-CNN or SSD. See torchvision.models.list_models()."
            )
        defaults: dict[str, Any] = {"init_weights": True}
        if wrapper is not None:
            defaults = {} if pretrained else {"weights_backbone": None, "aux_loss": False}
        builder, published = models.get_model_builder(name), models.get_model_weights(name).DEFAULT
        taken = {key: value for key, value in defaults.items() if key in inspect.signature(builder).parameters}
        if arguments:
            bare = dict.fromkeys({"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys())
            check_size(lambda: builder(**{**taken, **arguments, **bare}), f"torchvision:{name} with {arguments}")
        try:
            model: Any = builder(**{"weights": published if pretrained else None, **taken, **arguments})
        except Exception as error:  # a hub that cannot be reached, an argument the constructor does not take
            raise BackboneError(f"torchvision could not build {name!r} with {arguments}: {error}") from error
        if own := getattr(model, "transform", None):  # a detector, whose weights' transform resizes nothing
            size = (own.fixed_size or [DETECTION_SIZE])[0]
            seen = {"mean": own.image_mean, "std": own.image_std, "interpolation": "bilinear", "crop_pct": 1.0}
            preprocessing = Preprocessing(input_size=(3, size, size), **seen)
        else:
            preprocessing = from_torchvision(published.transforms())
        return BuiltNetwork(module=model if wrapper is None else wrapper(model), preprocessing=preprocessing)


def from_torchvision(transform: Any) -> Preprocessing:
    """The preprocessing that the transform of torchvision's weights describes: resize, centre crop, normalise."""
    whole = transform.resize_size[0]
    size = getattr(transform, "crop_size", transform.resize_size)[0]
    share = size / whole
    share = share if math.floor(size / share) == whole else math.nextafter(share, 0)  # floor(size / share) is `whole`
    return Preprocessing(
        input_size=(3, size, size),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
        crop_pct=share,
    )
