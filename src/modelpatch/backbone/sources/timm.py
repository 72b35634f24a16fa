"""`timm:NAME`: a network of timm, with the weights of its tag (`timm:resnet50.a1_in1k`).

`timm:hf-hub:OWNER/NAME` is one that anybody may have put on the Hugging Face hub.
"""

from typing import Any

from pydantic import ValidationError
from torch import nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.reach import HUB
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, register_source
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.text import first_problem

HUBS = ("hf-hub", "hf_hub")  # how timm spells a repository of the Hugging Face hub


@register_source("timm")
class TimmSource(BackboneSource):
    """timm's models."""

    address = HUB

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        import timm

        try:
            module = timm.create_model(name, pretrained=pretrained, **arguments)
        except Exception as error:  # a hub that cannot be reached, an argument the constructor does not take
            if "Unknown model" in str(error):
                close = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
                hint = f"Similar: {', '.join(close)}." if close else "See timm.list_models()."
                raise UnknownBackboneError(f"timm has no model {name!r}. {hint}") from error
            raise BackboneError(f"timm could not build {name!r} with {arguments}: {error}") from error
        return BuiltNetwork(module=module, preprocessing=preprocessing_of(module))

    def is_portable(self, name: str) -> bool:
        source, _, repository = name.rpartition(":")
        if source:
            return source.lower() in HUBS and not repository.startswith((".", "/"))
        return super().is_portable(name)

    def find_repository(self, name: str) -> str | None:
        source, _, repository = name.partition(":")
        return repository if source.lower() in HUBS else None


def preprocessing_of(module: nn.Module) -> Preprocessing:
    """The preprocessing of a network: as timm's networks describe theirs, the default for others. Raises `BackboneError`."""
    if not hasattr(module, "pretrained_cfg"):
        return Preprocessing()
    import timm

    config = timm.data.config.resolve_model_data_config(module)
    size = int(config["input_size"][-1])
    own = {name: config[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    try:
        return Preprocessing(input_size=(3, size, size), **own)
    except ValidationError as error:
        raise BackboneError(
            f"{type(module).__name__} sees images in a way that is not supported: {first_problem(error)}. Expected square "
            "RGB images; build the module yourself and give it to load_backbone with preprocessing=..."
        ) from error
