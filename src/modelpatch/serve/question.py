"""Requests for answers, read within limits: an image's file with options in the address, a multipart form, or JSON."""

import asyncio
import base64
import io
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.types import Message
from torch import Tensor

from modelpatch.backbone.preprocessing import Preprocessing, open_image
from modelpatch.serve.problems import Problem
from modelpatch.serve.schemas import MOST_TOP, REFERENCE, PredictRequest
from modelpatch.serve.settings import Settings

Decoded = tuple[dict[Preprocessing, Tensor], tuple[int, int]]  # uint8 crops (3, S, S), the width and height, upright
OCTETS = "application/octet-stream"
SILENCE = 10.0  # seconds without a byte
SLOWEST = 4096  # bytes a second of a body, in the mean, once it has been coming for `PATIENCE` seconds
PATIENCE = 5.0
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
TOP = {"type": "integer", "minimum": 1, "maximum": MOST_TOP, "default": 3}
BINARY = {"type": "string", "format": "binary"}
NAMES = {"type": "array", "items": {"type": "string", "pattern": REFERENCE}}
FIELDS = {"images": {"type": "array", "items": BINARY, "minItems": 1}, "tasks": NAMES, "per_image": NAMES, "top": TOP}
FORM = {
    "schema": {"type": "object", "required": ["images"], "properties": FIELDS},
    "encoding": {"images": {"contentType": "image/png, image/jpeg"}},
    "examples": {
        "every patch": {"value": {"images": ["@photo.jpg"]}},
        "two patches": {"value": {"images": ["@photo.jpg"], "tasks": ["flowers", "birds@prod"], "top": 5}},
        "one patch an image": {"value": {"images": ["@a.jpg", "@b.jpg"], "per_image": ["flowers", "birds"]}},
    },
}


def _query(name: str, schema: dict[str, Any], text: str, **more: Any) -> dict[str, Any]:
    text = f"For an image that is the body itself: {text}"
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema, **more}


QUESTION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": BINARY},
            OCTETS: {"schema": BINARY},
            "application/json": {"schema": PredictRequest.model_json_schema()},
            "multipart/form-data": FORM,
        },
    },
    "parameters": [
        _query("tasks", {"type": "string"}, "Patches, comma-separated; all without it.", example="flowers,birds@prod"),
        _query("top", TOP, "Answers of each."),
    ],
}


async def read_question(
    request: Request, settings: Settings, add: Callable[[int], None]
) -> tuple[PredictRequest, list[bytes]]:
    """The request's options, and its image files; `add` is told of bytes as they arrive.

    Raises `Problem` or `RequestValidationError`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limit = settings.body_bytes
    if kind.startswith("image/") or kind == OCTETS:
        words = _words(request.query_params.multi_items())
        if "images" in words:
            raise Problem("invalid-request", "The address names images, and the body is one.", "Send one of them.")
        return _validate({"images": ["file"], **words}), [await read_body(request, limit, add)]
    if request.query_params:
        said = f"The address asks for {next(iter(request.query_params))[:80]!r}, which goes with an image as the body."
        raise Problem("invalid-request", said, "Put it into the form or the JSON.")
    if kind == "application/json":
        asked = _validate(await read_body(request, limit, add))
        return asked, [_decode_base64(text, place) for place, text in enumerate(asked.images)]
    if kind == "multipart/form-data":
        most = settings.images + 2 * settings.tasks + 64
        counted = _counted(request, limit, add).form(max_files=most, max_fields=most, max_part_size=64 * 1024)
        async with counted as form:
            parts = form.multi_items()
            files = [value for _, value in parts if isinstance(value, UploadFile)]
            for name, value in parts:
                if isinstance(value, UploadFile) != (name == "images"):
                    said = "is no file" if name == "images" else "is a file"
                    raise Problem("invalid-request", f"A part {name[:80]!r} {said}.", "With curl: -F images=@photo.jpg")
            words = _words((name, value) for name, value in parts if isinstance(value, str))
            return _validate({"images": ["file"] * len(files), **words}), [await f.read() for f in files]
    raise Problem(
        "unknown-kind",
        f"The body is {kind[:80] or 'of no stated kind'!r}.",
        "Send an image as it is with its type (image/jpeg), multipart/form-data with parts named images, or application/json.",
    )


def _words(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Fields of a form or an address: lists are comma-separated, or given several times."""
    words: dict[str, Any] = {}
    for name, value in pairs:
        words[name] = value if name == "top" else words.get(name, []) + [part.strip() for part in value.split(",")]
    return words


def _validate(given: bytes | dict[str, Any]) -> PredictRequest:
    try:
        if isinstance(given, bytes):
            return PredictRequest.model_validate_json(given, strict=True)
        return PredictRequest.model_validate(given, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _decode_base64(text: str, place: int) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError as error:
        said = f"Image {place} is no base64: {error}."
        raise Problem("unreadable-image", said, "Encode the bytes of the file.", image=place) from error


def read_signature(header: str | None) -> bytes | None:
    """The signature file that a header holds in base64. Raises `Problem`, 422, for anything else."""
    try:
        return None if header is None else base64.b64decode(header, validate=True)
    except ValueError as error:
        said = f"The header Modelpatch-Signature is no base64: {error}."
        raise Problem("invalid-request", said, "Encode the file: base64 -w0 PATCH.sig") from error


async def read_body(request: Request, limit: int, add: Callable[[int], None]) -> bytes:
    """The whole body. Raises `Problem`: 413 beyond `limit` bytes, 408 where it comes too slowly, and what `add` raises."""
    return await _counted(request, limit, add).body()


def _counted(request: Request, limit: int, add: Callable[[int], None]) -> Request:
    """The request, whose body raises `Problem` as `read_body` does, however it is read."""
    too_large = Problem("too-large", f"The body is larger than {limit:,} bytes.", "Send less at once.")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said[:20]) > limit:
        raise too_large
    seen, began = 0, time.monotonic()

    async def receive() -> Message:
        nonlocal seen
        try:
            async with asyncio.timeout(SILENCE):
                message = await request.receive()
        except TimeoutError:
            raise Problem("too-slow", f"No byte came for {SILENCE:g} seconds.", "Send the body faster.") from None
        arrived = len(message.get("body", b""))
        seen += arrived
        if seen > limit:
            raise too_large
        add(arrived)
        took = time.monotonic() - began
        if message.get("more_body") and took > PATIENCE and seen < SLOWEST * took:
            said = f"{seen:,} bytes came in {took:.0f} seconds; expected {SLOWEST:,} a second."
            raise Problem("too-slow", said, "Send the body faster.")
        return message

    return Request(request.scope, receive)


def decode(data: bytes, kinds: Iterable[Preprocessing], pixels: int) -> Decoded:
    """An encoded image, of an animation the first frame, as every preprocessing sees it.

    Raises `Problem`: 413 for more than `pixels`, in the file or as resized, 422 for anything but an image of a known format.
    """
    wanted = list(dict.fromkeys(kinds))
    if not data:
        raise Problem("unreadable-image", "The image is empty: 0 bytes.", "Send the bytes of the file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below it
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, wanted, pixels)
        ImageOps.exif_transpose(image, in_place=True)  # so that the image as it was is not kept beside
        whole = open_image(image)
        return {kind: kind.center_crop(kind.decode(whole)) for kind in wanted}, whole.size
    except Problem:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Problem("too-large", f"The image is too large: {error}.", "Send a smaller one.") from error
    except UnidentifiedImageError as error:
        said = f"The image's format is not known. Expected {', '.join(FORMATS)}."
        raise Problem("unreadable-image", said, "Convert it.") from error
    except Exception as error:  # Pillow's parsers raise dozens of kinds for files that were made to hurt
        if isinstance(error.__cause__, MemoryError):
            raise Problem("too-large", "The image does not fit into memory.", "Send a smaller one.") from error
        said = f"{type(error).__name__}: {error}"[:200]
        raise Problem("unreadable-image", f"The image cannot be decoded: {said}.", "Save it again.") from error


def _check_size(image: Image.Image, kinds: Iterable[Preprocessing], pixels: int) -> None:
    width, height = image.size
    short, long = max(1, min(width, height)), max(width, height)
    sizes = {"": width * height}  # the shorter side becomes `resize_to`, which makes a long strip enormous
    sizes |= {f" as resized to {kind.resize_to} px": kind.resize_to**2 * long // short for kind in kinds}
    for how, count in sizes.items():
        if count > pixels:
            said = f"The image of {width} x {height} has {count:,} pixels{how}; this server takes {pixels:,}."
            raise Problem("too-large", said, "Resize or crop it first.")
