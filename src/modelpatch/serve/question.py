"""Requests for answers: one image's file with options in the address, a multipart form of several, or JSON with base64."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from modelpatch.serve.body import read_body, read_form
from modelpatch.serve.problems import Problem
from modelpatch.serve.schemas import REFERENCE, PredictRequest
from modelpatch.serve.settings import Settings
from modelpatch.text import first_problem

OCTETS = "application/octet-stream"
BODY = {
    "required": True,
    "content": {
        **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/*", OCTETS)},
        "application/json": {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
                    "tasks": {"type": "array", "items": {"type": "string", "pattern": REFERENCE}},
                    "per_image": {"type": "array", "items": {"type": "string", "pattern": REFERENCE}},
                    "top": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 3},
                },
            },
            "encoding": {"images": {"contentType": "image/png, image/jpeg"}},
            "examples": {
                "every patch": {"value": {"images": ["@photo.jpg"]}},
                "two patches": {"value": {"images": ["@photo.jpg"], "tasks": ["flowers", "birds@prod"], "top": 5}},
                "one patch an image": {"value": {"images": ["@a.jpg", "@b.jpg"], "per_image": ["flowers", "birds"]}},
            },
        },
    },
}
QUESTION: dict[str, Any] = {
    "requestBody": BODY,
    "parameters": [
        {
            "name": "tasks",
            "in": "query",
            "required": False,
            "description": "Patches for an image that is the body itself, comma-separated; all without it.",
            "schema": {"type": "string"},
            "example": "flowers,birds@prod",
        },
        {
            "name": "top",
            "in": "query",
            "required": False,
            "description": "Answers of each, for an image that is the body itself.",
            "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 3},
        },
    ],
}


async def read_question(request: Request, settings: Settings) -> tuple[PredictRequest, list[bytes]]:
    """The request's options, and its image files. Raises `Problem`, 400, 408, 413, 415 or 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limit = settings.body_bytes
    if kind.startswith("image/") or kind == OCTETS:
        words = _words(request.query_params.multi_items())
        if "images" in words:
            raise Problem("invalid-request", "The address names images, and the body is one.", "Send one of them.")
        return _validate({"images": ["file"], **words}, strict=False), [await read_body(request, limit)]
    if request.query_params:
        raise Problem(
            "invalid-request",
            f"The address asks for {next(iter(request.query_params))[:80]!r}, which goes with an image as the body.",
            "Put it into the form or the JSON.",
        )
    if kind == "application/json":
        asked = _validate(await read_body(request, limit))
        return asked, [_decode_base64(text, place) for place, text in enumerate(asked.images)]
    if kind == "multipart/form-data":
        async with read_form(request, limit, settings.images + 2 * settings.tasks + 64) as form:
            parts = form.multi_items()
            files = [value for _, value in parts if isinstance(value, UploadFile)]
            for name, value in parts:
                if isinstance(value, UploadFile) != (name == "images"):
                    said = "is no file" if name == "images" else "is a file"
                    raise Problem("invalid-request", f"A part {name[:80]!r} {said}.", "With curl: -F images=@photo.jpg")
            words = _words((name, value) for name, value in parts if isinstance(value, str))
            return _validate({"images": ["file"] * len(files), **words}, strict=False), [await f.read() for f in files]
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


def _validate(given: bytes | dict[str, Any], strict: bool = True) -> PredictRequest:
    try:
        if isinstance(given, bytes):
            return PredictRequest.model_validate_json(given, strict=strict)
        return PredictRequest.model_validate(given, strict=strict)
    except ValidationError as error:
        kind = "bad-request" if error.errors()[0]["type"] == "json_invalid" else "invalid-request"
        raise Problem(
            kind, f"The request's {first_problem(error)}.", "GET /openapi.json shows what is expected."
        ) from error


def _decode_base64(text: str, place: int) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(
            "unreadable-image", f"Image {place} is no base64: {error}.", "Encode the bytes of the file.", image=place
        ) from error
