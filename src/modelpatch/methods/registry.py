"""Methods by name, as a command line or a patch file spells them.

scale-bias                                   a method at its defaults
delta(modules=4,batch_norm=true)             with hyperparameters
scale-bias + subset(blocks=[layer4,head])    several methods in one patch
scale-bias(blocks=[layer4])                  a method confined to some blocks
"""

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from modelpatch.errors import MethodError
from modelpatch.methods.method import METHODS, Composite, Method
from modelpatch.text import nearest

__all__ = ["METHODS", "make_method", "spellings", "split_outside", "sweep"]


def spellings(attribute: str) -> tuple[str, ...]:
    """The spellings that methods list in `compared` or `searched`: single ones from small patches to large, then others."""
    kinds = sorted(METHODS.values(), key=lambda kind: kind.order)
    listed = [spelled for kind in kinds for spelled in vars(kind).get(attribute, ())]
    return tuple(sorted(listed, key=lambda spelled: len(split_outside(spelled, "+"))))


def __getattr__(name: str) -> tuple[str, ...]:
    if name == "COMPARED":  # the methods that `compare` tries by default
        return spellings("compared")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_method(spec: str, **hyperparameters: Any) -> Method:
    """A method by its name, or several joined by `+`, with hyperparameters in parentheses or as keywords.

    Values may be strings, as a command line gives them. Keywords of several methods say whose they are:
    `{"subset.blocks": "layer4"}`. Raises `MethodError` for an unknown name, hyperparameter or value.
    """
    if not isinstance(spec, str):
        raise MethodError(f"{spec!r} is not a method's name. Methods: {', '.join(METHODS.names())}.")
    parts = [_parse(part) for part in split_outside(spec, "+")]
    for key, value in hyperparameters.items():
        number, name = _owner(key, [part for part, _ in parts])
        parts[number][1][name] = value
    methods = []
    for name, values in parts:
        known = _hyperparameters(name)
        if unknown := sorted(values.keys() - {*known, "blocks"}):
            near = nearest(unknown[0], [*known, "blocks"])
            raise MethodError(f"{name} has no hyperparameter {unknown[0]!r}.{near} It has: {', '.join(known)}.")
        methods.append(METHODS[name](**values))
    return methods[0] if len(methods) == 1 else Composite.of(*methods)


def sweep(spec: str, key: str, values: Iterable[str]) -> dict[str, str]:
    """The spellings of a method with a hyperparameter at each of several values, by the values: for `compare`.

    `sweep("scale-bias", "lr", ["0.001", "0.01"])` gives `scale-bias(lr=0.001)` and `scale-bias(lr=0.01)`. Raises
    `MethodError` for what cannot be made.
    """
    parts = split_outside(spec, "+")
    number, name = _owner(key, [_parse(part)[0] for part in parts])
    before, part, after = parts[:number], parts[number], parts[number + 1 :]
    start = f"{part[:-1]}," if part.endswith(")") else f"{part}("
    spelled = {value: "+".join([*before, f"{start}{name}={value})", *after]) for value in values}
    for one in spelled.values():
        make_method(one)
    return spelled


def _owner(key: str, methods: list[str]) -> tuple[int, str]:
    """The position of the method that a key such as `subset.blocks` means, and its hyperparameter. Raises `MethodError`."""
    owner, _, name = key.rpartition(".")
    if not owner and len(methods) == 1:
        return 0, name
    if owner in methods:
        return methods.index(owner), name
    takers = [method for method in methods if name == "blocks" or name in _hyperparameters(method)] or methods
    spelled = " or ".join(f"{method}.{name}=..." for method in takers)
    raise MethodError(f"{key!r} names no method of {'+'.join(methods)}. Say whose it is: {spelled}")


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
    values: dict[str, Any] = {}
    for item in split_outside(match[2], ",") if match[2] else []:
        key, separator, value = item.partition("=")
        if not separator:
            raise MethodError(f"{item!r} in {text!r} is not KEY=VALUE.")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip().removeprefix("[").removesuffix("]")
    return match[1].strip(), values


def _hyperparameters(name: str) -> list[str]:
    """The hyperparameters of the method of that name. Raises `MethodError` for an unknown one."""
    kind = METHODS.find(name)
    hidden = {"losses"} if kind.names_blocks else {"losses", "blocks"}
    return [field.name for field in fields(kind) if field.init and field.name not in hidden]
