"""`openclip:NAME/TAG`: the image tower of an open_clip model as the backbone, its frozen text tower beside it.

    features = image tower(x)          logits = exp(logit_scale) cos(features, text tower(prompt))

Radford et al., *Learning Transferable Visual Models From Natural Language Supervision* (2021). Without a tag, or with
`pretrained=False`, the weights are random and follow the seed.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from modelpatch.backbone.framing import Framing
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.reach import HUB
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, register_source
from modelpatch.backbone.text_tower import ClipText
from modelpatch.errors import BackboneError, UnknownBackboneError, require
from modelpatch.text import first_problem

FRAMINGS: dict[str, Framing] = {"shortest": "crop", "longest": "border", "squash": "stretch"}  # by resize_mode
NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9_.-]*)(?:/([A-Za-z0-9_-][A-Za-z0-9_.-]*))?")


class ImageTower(nn.Module):
    """An open_clip image tower that gives one tensor: images (B, 3, H, W) to features (B, D).

    A vision transformer is run block by block, so that the chain can be cut between its blocks.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.blockwise = isinstance(getattr(visual, "transformer", None), nn.Module) and all(
            hasattr(visual, part) for part in ("_embeds", "_pool", "proj")
        )

    def forward(self, images: Tensor) -> Tensor:
        visual: Any = self.visual
        if not self.blockwise:
            return visual(images)
        x = visual._embeds(images)
        turned = not visual.transformer.batch_first
        x = x.transpose(0, 1) if turned else x
        for block in visual.transformer.resblocks:
            x = block(x)
        pooled = visual._pool(x.transpose(0, 1) if turned else x)[0]
        return pooled if visual.proj is None else pooled @ visual.proj


@register_source("openclip")
class OpenClipSource(BackboneSource):
    """open_clip's image towers."""

    address = HUB

    def is_portable(self, name: str) -> bool:
        return NAME.fullmatch(name) is not None

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        """The image tower with its preprocessing and the text tower.

        Raises `MissingExtraError` without open_clip, `UnknownBackboneError` for a name or tag that it does not list (a tag
        that is a path would be read as a pickle), `BackboneError` where the network cannot be built.
        """
        open_clip = require("open_clip", "clip", f"The backbone openclip:{name}", "open_clip_torch")
        match = NAME.fullmatch(name)
        if match is None or match[1] not in open_clip.list_models():
            raise UnknownBackboneError(
                f"open_clip has no model {name!r}. Expected openclip:NAME/TAG, see open_clip.list_models()."
            )
        tags = open_clip.list_pretrained_tags_by_model(match[1])
        if pretrained and match[2] not in tags:
            raise UnknownBackboneError(
                f"open_clip has no weights {match[2]!r} of {match[1]}. It has: {', '.join(tags[:8]) or 'none'}. "
                "Random weights: pretrained=False."
            )
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            model = open_clip.create_model(match[1], pretrained=match[2] if pretrained else None, **arguments)
            tokenizer = open_clip.get_tokenizer(match[1])
        except Exception as error:  # a hub that cannot be reached, an argument the constructor does not take
            raise BackboneError(f"open_clip could not build {name!r} with {arguments}: {error}") from error
        finally:
            logging.disable(level)
        config = open_clip.get_model_preprocess_cfg(model)
        try:
            preprocessing = from_openclip(config)
        except ValidationError as error:
            raise BackboneError(
                f"{name} sees images in a way that is not supported: {first_problem(error)}."
            ) from error
        visual = model.visual
        model.visual = nn.Identity()  # the text tower does not hold the image tower
        return BuiltNetwork(module=ImageTower(visual), preprocessing=preprocessing, text=ClipText(model, tokenizer))


def from_openclip(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that open_clip's config describes. Raises pydantic's `ValidationError` for one that cannot be."""
    size = config.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    framing = FRAMINGS[config.get("resize_mode") or "shortest"]
    own: dict[str, Any] = {"interpolation": "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"}
    own |= {"fill": (config.get("fill_color", 0),) * 3} if framing == "border" else {}
    for part in ("mean", "std"):
        own[part] = config[part] if isinstance(config[part], list | tuple) else (config[part],) * 3
    return Preprocessing(input_size=(3, height, width), crop_pct=1.0, framing=framing, **own)
