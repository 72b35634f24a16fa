"""Descriptions of frozen networks in files, checked before anything is built.

Files come from strangers. One may name an architecture of the zoo and plain values for its constructor. It may not make
the constructor read other files or addresses, nor set what `load_backbone` keeps for its caller.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import BackboneError
from modelpatch.text import MAX_LENGTH, Text, check_printable, first_problem

READING = r"weights.*|pretrained_.*|checkpoint_.*|cache_dir|hf_hub_.*|features_only|feature_cls"
CALLERS = r"spec|preprocessing|classifier|segments"
REFUSED = re.compile(f"{READING}|{CALLERS}")
MAX_NUMBER = 2**20  # a wider or deeper network would only be named to exhaust the memory
MAX_METADATA = 4 * 2**20


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments from a file. Raises ValueError for one that no file may set, or that is not plain."""
    for name, value in arguments.items():
        check_printable(name)
        if len(name) > MAX_LENGTH or REFUSED.fullmatch(name):
            raise ValueError(f"a file cannot set {name[:80]!r} of its backbone")
        _check_plain(name, value)
    return arguments


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, list | tuple) and len(value) <= MAX_LENGTH:
        for item in value:
            _check_plain(name, item)
    elif isinstance(value, str) and len(value) <= MAX_LENGTH:
        check_printable(value)
    elif not (value is None or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER)):
        given = f"{type(value).__name__} {str(value)[:80]!r}"
        raise ValueError(f"{name} = {given} is no plain value: expected numbers to {MAX_NUMBER:,}, short words, lists")


Arguments = Annotated[dict[str, Any], AfterValidator(check_arguments)]
Architecture = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=MAX_LENGTH)]


class Described(BaseModel):
    """A backbone's own description in its file: timm's name of the architecture, its arguments and its preprocessing.

    `classes` name the outputs of its own head, if they have names; `about` holds facts that nothing here relies on.
    """

    model_config = ConfigDict(frozen=True)

    architecture: Architecture
    arguments: Arguments
    preprocessing: Preprocessing | None
    classes: tuple[Text, ...]
    about: dict[str, Any]

    @classmethod
    def parse(cls, text: str, source: object) -> Described:
        """From the metadata of the file `source`. Raises `BackboneError` that names it and what is wrong."""
        if len(text) > MAX_METADATA:
            raise BackboneError(
                f"the metadata of {source} has {len(text):,} characters; at most {MAX_METADATA:,} are read."
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise BackboneError(
                f"the metadata of {source} does not describe a backbone: {first_problem(error)}."
            ) from error
