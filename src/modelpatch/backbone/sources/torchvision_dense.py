"""torchvision's segmentation and detection networks as backbones: their trained trunks, with features of the whole image.

    segmentation   trunk -> decoder -> mean over positions -> the last 1x1 convolution as a linear layer

Averaging and a 1x1 convolution commute, so that this network's own answer is the mean of the original's logits over all
positions: which class fills the image. Patches read the maps of the trunk and the decoder as they read any other network's.

    detection      trunk -> mean over positions

A detector's own answer needs its boxes; its trunk has no classes of whole images, and gives features alone. Tensors keep
torchvision's names, so that its state dicts load; those of what is left out (auxiliary classifiers, boxes) are dropped.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import BackboneError

DETECTION_SIZE = 320  # pixels of networks that take any


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
        self.register_load_state_dict_pre_hook(_flatten_last)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (
            *self.backbone.children(),
            *list(self.classifier)[:-1],
        ):  # the trunk ends with what the decoder reads
            x = layer(x)
        return self.classifier[-1](x.mean((2, 3)))


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


def _flatten_last(module: WholeImageSegmenter, state: dict[str, Any], *rest: Any) -> None:
    _keep_own(module, state)
    name = f"classifier.{len(module.classifier) - 1}.weight"
    if name in state:
        state[name] = state[name].flatten(1)


def _keep_own(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
    """Drop what the original has beside the trunk."""
    own = set(module.state_dict())
    left_out = (
        "aux_classifier.",
        "backbone.fpn.",
        "backbone.extra.",
        "backbone.scale_weight",
        "rpn.",
        "roi_heads.",
        "head.",
    )
    for name in [name for name in state if name not in own and name.startswith(left_out)]:
        del state[name]


def dense_models() -> dict[str, type[nn.Module]]:
    """The wrapper of each of torchvision's segmentation and detection networks, by its name."""
    from torchvision.models import detection, list_models, segmentation

    segmenters = [name for name in list_models(segmentation) if name.startswith(("fcn_", "deeplabv3_"))]
    detectors = [name for name in list_models(detection) if name.startswith(("fasterrcnn_", "ssd"))]
    return dict.fromkeys(segmenters, WholeImageSegmenter) | dict.fromkeys(detectors, DetectorTrunk)


def build_dense(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocessing]:
    """One of `dense_models` as a backbone's module. Raises `BackboneError` where torchvision cannot build it."""
    import torchvision

    wrapper = dense_models()[name]
    published = torchvision.models.get_model_weights(name).DEFAULT
    given = {"weights": published if pretrained else None, **({} if pretrained else {"weights_backbone": None})}
    if (
        wrapper is WholeImageSegmenter
        and not pretrained
        and "aux_loss" in inspect.signature(torchvision.models.get_model_builder(name)).parameters
    ):
        given["aux_loss"] = False
    try:
        model = torchvision.models.get_model(name, **{**given, **arguments})
    except Exception as error:  # a hub that cannot be reached, an argument the constructor does not take
        raise BackboneError(f"torchvision could not build {name!r} with {arguments}: {error}") from error
    if wrapper is WholeImageSegmenter:
        transform = published.transforms()
        size = int(transform.resize_size[0])
        seen = Preprocessing(
            input_size=(3, size, size), mean=tuple(transform.mean), std=tuple(transform.std), crop_pct=1.0
        )
        return WholeImageSegmenter(model), seen
    return DetectorTrunk(model), _seen_by(model)


def _seen_by(model: nn.Module) -> Preprocessing:
    """As the detector's own transform has it: a square of its fixed size, or of `DETECTION_SIZE`."""
    transform: Any = model.transform
    size = transform.fixed_size[0] if transform.fixed_size is not None else DETECTION_SIZE
    return Preprocessing(
        input_size=(3, size, size), mean=tuple(transform.image_mean), std=tuple(transform.image_std), crop_pct=1.0
    )
