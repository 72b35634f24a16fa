"""`timm:NAME`: a network of timm, with the weights of its tag (`timm:resnet50.a1_in1k`).

`timm:hf-hub:OWNER/NAME` is one that anybody may have put on the Hugging Face hub.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from pydantic import ValidationError
from torch import nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.reach import HUB
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, check_size, register_source
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.text import first_problem

FRAMINGS = {"center": "crop"}  # by timm's names, others are called as here
HUBS = ("hf-hub", "hf_hub")  # how timm spells a repository of the Hugging Face hub


@register_source("timm")
class TimmSource(BackboneSource):
    """timm's models."""

    address = HUB

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        import timm

        if arguments and self.find_repository(name) is None:
            check_size(lambda: timm.create_model(name, pretrained=False, **arguments), f"timm:{name} with {arguments}")
        try:
            module = timm.create_model(name, pretrained=pretrained, **arguments)
        except Exception as error:  # a hub that cannot be reached, an argument the constructor does not take
            if "Unknown model" in str(error):
                close = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
                hint = f"Similar: {', '.join(close)}." if close else "See timm.list_models()."
                raise UnknownBackboneError(f"timm has no model {name!r}. {hint}") from error
            raise BackboneError(f"timm could not build {name!r} with {arguments}: {error}") from error
        return BuiltNetwork(module=module, preprocessing=preprocessing_of(module, arguments.get("in_chans")))

    def is_portable(self, name: str) -> bool:
        source, _, repository = name.rpartition(":")
        if source:
            return source.lower() in HUBS and not repository.startswith((".", "/"))
        return super().is_portable(name)

    def find_repository(self, name: str) -> str | None:
        source, _, repository = name.partition(":")
        return repository if source.lower() in HUBS else None


def preprocessing_of(module: nn.Module, channels: int | None = None) -> Preprocessing:
    """The preprocessing of a network: as timm's networks describe theirs, the default for others. Raises `BackboneError`.

    `channels` are those of its images, where they were asked for: timm describes the published weights' three.
    """
    if not hasattr(module, "pretrained_cfg"):
        return Preprocessing()
    import timm

    config = timm.data.config.resolve_model_data_config(module)
    try:
        return from_timm(config, channels or _channels_of(module))
    except ValidationError as error:
        raise BackboneError(
            f"{type(module).__name__} sees images in a way that is not supported: {first_problem(error)}. Expected square "
            "images; build the module yourself and give it to load_backbone with preprocessing=..."
        ) from error


def from_timm(config: Mapping[str, Any], channels: int | None = None) -> Preprocessing:
    """The preprocessing that timm's data config describes. Raises pydantic's `ValidationError` for one that cannot be."""
    _, height, width = config["input_size"]
    framing = FRAMINGS.get(config["crop_mode"], config["crop_mode"])
    if framing == "squash" and config["crop_pct"] == 1:
        framing = "stretch"
    channels = channels or config["input_size"][0]
    own: dict[str, Any] = {name: spread(config[name], channels) for name in ("mean", "std")}
    own |= {name: config[name] for name in ("interpolation", "crop_pct")}
    if framing != "border" and config["crop_pct"] > 1:  # torchvision's CenterCrop fills up with black
        own["fill"] = (0,) * channels
    return Preprocessing(input_size=(channels, height, width), framing=framing, **own)


def _channels_of(module: Any) -> int | None:
    """The channels of a network that says them, or whose first convolution has fewer than colour's."""
    said = getattr(module, "in_chans", None)
    if isinstance(said, int):
        return said
    name = module.pretrained_cfg.get("first_conv")
    layer = dict(module.named_modules()).get(name) if isinstance(name, str) else None
    inputs = getattr(layer, "in_channels", 3)
    return inputs if inputs < 3 else None


def spread(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Numbers a channel for another count of channels: the mean for one, else in turn, as timm spreads a stem's weights."""
    if channels == len(values):
        return tuple(values)
    return (sum(values) / len(values),) if channels == 1 else tuple(islice(cycle(values), channels))
