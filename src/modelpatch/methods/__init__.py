"""How patches are made: one file per method, each with its paper and formula at the top."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from modelpatch.errors import MethodError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.peft_folder import export_peft, import_peft
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (LinearProbe, ScaleBias, Subset, LoRA, FullFinetune)}


def make_method(name: str, **hyperparameters: Any) -> Method:
    """A method by its registered name; values may be strings, as a command line gives them.

    Raises `MethodError` for an unknown name, hyperparameter or value.
    """
    if name not in METHODS:
        raise MethodError(f"there is no method {name!r}. Methods: {', '.join(METHODS)}.")
    kind = METHODS[name]
    known = kind.__dataclass_fields__
    if unknown := sorted(hyperparameters.keys() - known.keys()):
        raise MethodError(f"{name} has no hyperparameter {unknown[0]!r}. It has: {', '.join(known)}.")
    values = {key: _split(value) if key in kind.lists else value for key, value in hyperparameters.items()}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MethodError(f"{name}: {where} = {first['input']!r} is not valid: {first['msg']}.") from error


def describe(method: Method) -> dict[str, Any]:
    """Every hyperparameter of a method, as plain values."""
    return asdict(method)


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


__all__ = [
    "METHODS",
    "FullFinetune",
    "LinearProbe",
    "LoRA",
    "Method",
    "ScaleBias",
    "Subset",
    "describe",
    "export_peft",
    "import_peft",
    "make_method",
]
