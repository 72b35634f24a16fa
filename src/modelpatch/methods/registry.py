"""Methods by name, as a command line or a patch file spells them.

scale-bias                                   a method at its defaults
delta(modules=4,batch_norm=true)             with hyperparameters
scale-bias + subset(blocks=[layer4,head])    several methods in one patch
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from modelpatch.errors import MethodError
from modelpatch.methods.composite import Composite
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        LinearProbe,
        Head2Toe,
        ScaleBias,
        Depthwise,
        DeltaNetwork,
        Subset,
        LoRA,
        Piggyback,
        PackNet,
        FullFinetune,
    )
}

COMPARED = (
    "linear-probe",
    "head2toe",
    "scale-bias",
    "depthwise",
    "scale-bias+depthwise",
    "delta",
    "delta(modules=all,batch_norm=true)",
    "subset",
    "lora",
    "piggyback",
    "piggyback(norms=trained)",
    "packnet",
    "full-finetune",
)  # what `compare` tries if it is not told


def make_method(spec: str, **hyperparameters: Any) -> Method:
    """A method by its name, or several joined by `+`, with hyperparameters in brackets or as keywords.

    Values may be strings, as a command line gives them. Keywords of several methods say whose they are:
    `{"subset.blocks": "layer4"}`. Raises `MethodError` for an unknown name, hyperparameter or value.
    """
    if not isinstance(spec, str):
        raise MethodError(f"{spec!r} is not a method's name. Methods: {', '.join(METHODS)}.")
    parts = [_parse(part) for part in split_outside(spec, "+")]
    for key, value in hyperparameters.items():
        owner, _, name = key.rpartition(".")
        chosen = [values for part, values in parts if part == owner or (not owner and len(parts) == 1)]
        if not chosen:
            raise MethodError(
                f"{key!r} names no method of {spec!r}. Write METHOD.HYPERPARAMETER with a method of these."
            )
        chosen[0][name] = value
    methods = [_make(name, values) for name, values in parts]
    return methods[0] if len(methods) == 1 else Composite.of(*methods)


def split_outside(text: str, separator: str) -> list[str]:
    """`text` split where the separator stands outside all brackets: `a(b,c),d` at `,` gives `a(b,c)` and `d`."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"([^()]*)(?:\((.*)\))?", text)
    if match is None:
        raise MethodError(f"{text!r} is not a method. Write NAME or NAME(KEY=VALUE, ...).")
    return match[1].strip(), dict(_pairs(split_outside(match[2], ",") if match[2] else [], text))


def _pairs(items: Iterable[str], text: str) -> Iterable[tuple[str, Any]]:
    for item in items:
        key, separator, value = item.partition("=")
        if not separator:
            raise MethodError(f"{item!r} in {text!r} is not KEY=VALUE.")
        try:
            yield key.strip(), json.loads(value)
        except ValueError:
            yield key.strip(), value.strip().removeprefix("[").removesuffix("]")


def _make(name: str, hyperparameters: dict[str, Any]) -> Method:
    if name not in METHODS:
        raise MethodError(f"there is no method {name!r}. Methods: {', '.join(METHODS)}.")
    kind = METHODS[name]
    known = [field.name for field in fields(kind) if field.init]
    if unknown := sorted(hyperparameters.keys() - set(known)):
        raise MethodError(f"{name} has no hyperparameter {unknown[0]!r}. It has: {', '.join(known)}.")
    values = {key: _split(value) if key in kind.lists else value for key, value in hyperparameters.items()}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MethodError(f"{name}: {where} = {first['input']!r} is not valid: {first['msg']}.") from error


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
