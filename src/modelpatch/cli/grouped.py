"""Options that belong together as one parameter of a verb: a dataclass whose fields are the options.

    @dataclass(frozen=True)
    class Network:
        backbone: BackboneOption = "bundled:tiny"
        device: DeviceOption = "cpu"

    @grouped
    def fit(data: str, network: Network): ...    # takes DATA --backbone --device

What a group needs to be told to its verb early, such as a device that is not there, it raises when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the fields of its dataclass parameters in their place, as typer reads parameters."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: dict[str, Parameter] = {}
    for name, parameter in signature(verb).parameters.items():
        for option in _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]:
            if option.name in options:
                raise TypeError(f"{verb.__name__}: two of its options are called {option.name!r}")
            options[option.name] = option.replace(kind=Parameter.KEYWORD_ONLY)

    @wraps(verb)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            own = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**own)
        verb(**values)

    call.__signature__ = Signature(list(options.values()))  # type: ignore[attr-defined]
    call.__annotations__ = {name: option.annotation for name, option in options.items()}
    return call


def _options(group: Any) -> list[Parameter]:
    """The fields of a dataclass as parameters, which is how its constructor has them."""
    hints = get_type_hints(group, include_extras=True)
    return [one.replace(annotation=hints[name]) for name, one in signature(group).parameters.items()]
