"""KEY=VALUE on the command line: hyperparameters of methods (--set), settings of a fit (--fit), arguments of backbones."""

from __future__ import annotations

import json
from typing import Any

from modelpatch.errors import BackboneError, MethodError, TrainingError
from modelpatch.text import nearest

RESERVED = {"spec", "preprocessing"}  # parameters of `load_backbone` that no text can give


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`KEY=VALUE` strings as a dict; values are read as JSON where they are JSON. Raises `MethodError`."""
    result: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key:
            raise MethodError(f"{option} {pair!r} is not KEY=VALUE.")
        if key in result:
            raise MethodError(f"{option} {key}=... is given twice. Give it once.")
        try:
            result[key] = json.loads(value)
        except ValueError:
            result[key] = value
    return result


def fit_settings(pairs: list[str] | None, **own: Any) -> dict[str, Any]:
    """The settings of a fit: those with an option of their `own`, and --fit KEY=VALUE for the others.

    Raises `TrainingError` for a key that has an option of its own, with that option, and for an unknown one, with the
    nearest.
    """
    from modelpatch.train.settings import FitSettings

    given = parse_pairs(pairs, "--fit")
    others = [name for name in FitSettings.__dataclass_fields__ if name not in own]
    for key, value in given.items():
        if key in own:
            option = key.replace("_", "-")
            right = f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}"
            raise TrainingError(f"--fit {key}=... is not taken, since {key} has an option of its own: {right}")
        if key not in others:
            hint = nearest(key, others)
            raise TrainingError(f"fit has no setting {key!r}.{hint} --fit takes: {', '.join(others)}.")
    return {**own, **given}


def parse_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """--argument KEY=VALUE. Raises `BackboneError` for arguments that a command line cannot give."""
    arguments = parse_pairs(pairs, "--argument")
    for key in arguments.keys() & RESERVED:
        advice = "Name the backbone with --backbone." if key == "spec" else "Use Python: mp.load_backbone(...)."
        raise BackboneError(f"--argument {key}=... is not an argument of the network's constructor. {advice}")
    return arguments


def parse_counts(option: str, text: str) -> list[int]:
    """`N1,N2,...` of an option as numbers above 0. Raises `MethodError`."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise TrainingError(f"{option} {text!r} is not N1,N2,...: whole numbers above 0.")
    return counts


def spell_setting(name: str, value: str, *, takes_set: bool, takes_fit: bool) -> str:
    """Advice for a setting that was given as an option: ` Write --set lr=0.1`; empty for a name of no setting."""
    from dataclasses import fields

    from modelpatch.methods.registry import METHODS
    from modelpatch.train.settings import FitSettings

    key = name.replace("-", "_")
    owners = sorted(spelled for spelled, kind in METHODS.items() if key in {field.name for field in fields(kind)})
    if takes_set and owners:
        known = ", ".join(owners[:3]) + (", ..." if len(owners) > 3 else "")
        return f" Write --set {key}={value}: it is a hyperparameter of methods ({known})."
    if takes_fit and key in FitSettings.__dataclass_fields__:
        return f" Write --fit {key}={value}: it is a setting of fit."
    return ""
