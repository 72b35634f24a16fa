"""The preprocessing that an image processor of transformers describes.

pixels -> resize -> centre crop -> factor * value [- 1] -> (value - mean) / std
"""

import math
from typing import Any

from pydantic import ValidationError

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import BackboneError
from modelpatch.text import first_problem

Numbers = tuple[float, ...]
RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
WHOLE = 384  # pixels from which ConvNeXt's processor does not crop


def preprocessing_of_processor(
    processor: Any, pixels: int | None, what: str, default: bool = False
) -> tuple[Preprocessing, bool]:
    """The preprocessing, and True if the channels go in as blue, green, red; `pixels` are those that the model names.

    Without a processor it is the default at that size; a `default` one of the library says nothing of the size. Raises
    `BackboneError` for steps that are not supported, by name.
    """
    if processor is None:
        size = pixels or 224
        return Preprocessing(input_size=(3, size, size)), False
    facts = {name: getattr(processor, name, None) for name in NAMES}
    kind = type(processor).__name__
    if facts["do_pad"] and "Levit" not in kind:
        raise _refusal(what, kind, "pads its images")
    if default and pixels:
        side = {"height": pixels, "width": pixels}
        whole = not facts["do_center_crop"] or facts["size"] == facts["crop_size"]
        facts |= {"crop_size": side, "size": side} if whole else {"crop_size": side, "size": {"shortest_edge": pixels}}
    size, framing, crop = _frame(kind, facts, pixels, what)
    mean, std = _normal(facts)
    resample = facts["resample"]
    number = getattr(resample, "value", resample)
    interpolation = number if isinstance(number, str) else RESAMPLINGS.get(2 if number is None else int(number))
    try:
        seen = Preprocessing.model_validate(
            {
                "input_size": (3, size, size),
                "mean": mean,
                "std": std,
                "interpolation": interpolation,
                "crop_pct": crop,
                "framing": framing,
            }
        )
    except ValidationError as error:
        raise _refusal(what, kind, f"sees images in a way that is not supported: {first_problem(error)}") from error
    return seen, bool(facts["do_flip_channel_order"])


NAMES = (
    "size", "crop_size", "crop_pct", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "resample",
    "rescale_factor", "rescale_offset", "include_top", "image_mean", "image_std", "do_flip_channel_order",
)  # fmt: skip


def _frame(kind: str, facts: dict[str, Any], pixels: int | None, what: str) -> tuple[int, str, float]:
    """(pixels a side, framing, share of the resized side that is kept)."""
    size, crop = _sides(facts["size"]), _sides(facts["crop_size"]) if facts["do_center_crop"] else {}
    shortest = size.get("shortest_edge")
    height, width = size.get("height"), size.get("width")
    cropped, crossed = crop.get("height"), crop.get("width")
    if (height != width) or (cropped != crossed):
        raise _refusal(
            what, kind, f"makes images of {facts['size']}, cropped to {facts['crop_size']}, which are no squares"
        )
    if not facts["do_resize"]:
        side = cropped or pixels
        if side is None:
            raise _refusal(what, kind, "does not resize, and nothing says of how many pixels images are")
        return side, "crop", 1.0
    share = facts["crop_pct"]
    if "ConvNext" in kind and shortest:
        return (shortest, "stretch", 1.0) if shortest >= WHOLE else (shortest, "crop", share or 224 / 256)
    if "PoolFormer" in kind and share:
        return cropped or shortest or height or 224, "crop", share
    if "Levit" in kind and shortest:
        shortest = int(256 / 224 * shortest)
    resized = shortest or height
    if resized is None:
        raise _refusal(what, kind, f"resizes to {facts['size']}; expected a shortest edge, or height and width")
    if cropped is None:
        return (resized, "crop", 1.0) if shortest else (resized, "stretch", 1.0)
    if cropped > resized:
        raise _refusal(what, kind, f"crops {cropped} pixels of images of {resized}, which fills a border up")
    if not shortest and cropped == resized:
        return cropped, "stretch", 1.0
    return cropped, "crop" if shortest else "squash", _share(cropped, resized)


def _share(size: int, resized: int) -> float:
    """The crop_pct with which images are resized to exactly `resized` pixels."""
    share = size / resized
    while math.floor(size / share) < resized:
        share = math.nextafter(share, 0)
    return share


def _normal(facts: dict[str, Any]) -> tuple[Numbers, Numbers]:
    """Mean and deviation of values in 0 to 1 that give what factor, offset and normalisation give."""
    factor = (facts["rescale_factor"] or 1 / 255) if facts["do_rescale"] else 1.0
    mean: Numbers = (0.0,) * 3
    std: Numbers = (1.0,) * 3
    if facts["do_normalize"]:
        mean, std = _three(facts["image_mean"]), _three(facts["image_std"])
    if facts["do_rescale"] and facts["rescale_offset"]:
        mean = tuple(one + 1 for one in mean)
    if facts["include_top"]:
        std = tuple(one * other for one, other in zip(std, _three(facts["image_std"]), strict=True))
    scale = 255 * factor
    return tuple(one / scale for one in mean), tuple(one / scale for one in std)


def _three(values: Any) -> Numbers:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))


def _sides(size: Any) -> dict[str, int]:
    """A size as a dictionary of the sides that it names."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    items = size.items() if hasattr(size, "items") else vars(size).items()
    return {name: int(value) for name, value in items if value is not None}


def _refusal(what: str, kind: str, does: str) -> BackboneError:
    return BackboneError(
        f"{what}: its {kind} {does}. Build the model yourself and give load_backbone preprocessing=..."
    )
