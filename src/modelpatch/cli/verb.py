"""Verbs: functions whose parameters are options, singly or in groups, shown in panels.

    @dataclass(frozen=True)
    class Network:
        panel: ClassVar = "Backbone"
        backbone: BackboneOption = "bundled:tiny"
        device: DeviceOption = "cpu"

    @verb(first="method", panel="Method")
    def fit(data: str, network: Network, method: MethodOption = "scale-bias"): ...    # DATA --method --backbone --device

A group checks its values when it is made, before the verb begins. Nothing here, and nothing in a declaration of options,
imports torch: the work's imports stand in the body of the verb.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from modelpatch.cli.console import JsonOption, Screen
from modelpatch.cli.runs import CURRENT, QUIET, load_run
from modelpatch.text import nearest

BACKBONE, DATA, FILES, OPTIONS, RAY, RUN = "Backbone", "Data", "Files", "Options", "Ray", "Run"
COMMON = {
    BACKBONE: "backbone argument device alpha",
    FILES: "out force dtype log json plot bytes_plot markdown html sheet overlay rounds",
    RAY: "ray ray_workers ray_address replicas",
    RUN: "config quiet restart",
}  # panels of options that have one name and one meaning in all verbs
LAST = (DATA, BACKBONE, FILES, RAY, RUN)  # panels below those of the verb itself
INFO = "typer"  # key of an option's description in the metadata of a group's field

QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and nothing else, besides what --json - prints.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="A YAML or TOML file of options, as every run writes; the command line overrides it.",
        is_eager=True,
        callback=load_run,
    ),
]


def option(default: Any, *names: str, **details: Any) -> Any:
    """A field of a group with its default and, as for `typer.Option`, its names and details."""
    return field(default=default, metadata={INFO: typer.Option(*names, **details)})


class Verb(TyperCommand):
    """A command that answers an unknown option with the option or setting that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as click does; an unknown option that is a setting is answered with --set or --fit."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and name:
                error.possibilities = None  # type: ignore[attr-defined]
                error.message = f"No such option: {name}.{_advice(self, str(name), given)}"  # type: ignore[attr-defined]
            raise


def verb(*, first: str = "", panel: str = OPTIONS, config: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Make a function a verb: fields of its dataclass parameters become options, and options get panels.

    `first` names the options that are listed first, separated by spaces; the others stand in the panel of their group, or
    in one of `COMMON`, or in `panel`. With `config` the verb takes --config, and `write_run` repeats it. A parameter of type
    `Screen` is made of the option --json, and of --plot and --bytes-plot if the verb has them.
    """

    def make(function: Callable[..., None]) -> Any:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
        screen = next((name for name, kind in hints.items() if kind is Screen), None)
        options: dict[str, tuple[Parameter, str]] = {}
        for name, parameter in signature(function).parameters.items():
            if name == screen:
                parameter, name = Parameter("json", Parameter.KEYWORD_ONLY, default=None), "json"
                hints["json"] = JsonOption
            own = _annotated(parameter, hints[name])
            for option, title in _members(groups[name], panel) if name in groups else [(own, panel)]:
                if option.name in options:
                    raise TypeError(f"{function.__name__}: two of its options are called {option.name!r}")
                options[option.name] = option, title
        if config:
            options["config"] = Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption), RUN
        options["quiet"] = Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption), RUN
        leading = first.split()
        if unknown := set(leading) - options.keys():
            raise TypeError(f"{function.__name__} has no options {sorted(unknown)}")
        placed = [
            (option, OPTIONS if option.name in leading else _common(option.name) or title)
            for option, title in options.values()
        ]
        order = [OPTIONS, *dict.fromkeys(title for _, title in placed if title not in LAST), *LAST]
        ranks = {name: rank for rank, name in enumerate(leading)}
        placed.sort(key=lambda one: (not _is_argument(one[0]), order.index(one[1]), ranks.get(one[0].name, len(ranks))))

        @wraps(function)
        def call(**values: Any) -> None:
            CURRENT.set((function.__name__, dict(values)))
            QUIET.set(bool(values.pop("quiet")))
            values.pop("config", None)
            for name, group in groups.items():
                own = {one.name: values.pop(one.name) for one in fields(group)}
                values[name] = group(**own)
            if screen:
                pictures = ("--plot", values.get("plot")), ("--bytes-plot", values.get("bytes_plot"))
                values[screen] = Screen(values.pop("json"), *pictures)
            function(**values)

        parameters = [_in_panel(option, title) for option, title in placed]
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {option.name: option.annotation for option in parameters}
        return call

    return make


def command(function: Callable[..., None], name: str) -> TyperCommand:
    """The command of a verb."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, cls=Verb)(function)
    made: Any = typer.main.get_command(app)
    return made


def _annotated(option: Parameter, hint: Any) -> Parameter:
    """The parameter with typer's description, which may be its default, in its annotation."""
    if not isinstance(info := copy.copy(option.default), typer.models.ParameterInfo):
        return option.replace(annotation=hint)
    default, info.default = info.default, ...
    return option.replace(annotation=Annotated[hint, info], default=Parameter.empty if default is ... else default)


def _members(group: Any, panel: str) -> list[tuple[Parameter, str]]:
    """The fields of a dataclass as parameters of its constructor, with the group's panel."""
    hints = get_type_hints(group, include_extras=True)
    title = getattr(group, "panel", panel)
    infos = {one.name: one.metadata.get(INFO) for one in fields(group)}
    members = []
    for name, one in signature(group).parameters.items():
        hint = Annotated[hints[name], infos[name]] if infos[name] else hints[name]
        members.append((one.replace(annotation=hint), title))
    return members


def _common(name: str) -> str | None:
    return next((title for title, names in COMMON.items() if name in names.split()), None)


def _is_argument(option: Parameter) -> bool:
    return not isinstance(_info(option), OptionInfo) and option.default is Parameter.empty


def _info(option: Parameter) -> Any:
    """Typer's description of an option or argument; None for a parameter without one."""
    parts = get_args(option.annotation) if get_origin(option.annotation) is Annotated else ()
    return next((part for part in parts[1:] if isinstance(part, typer.models.ParameterInfo)), None)


def _in_panel(option: Parameter, title: str) -> Parameter:
    """The parameter, keyword-only, with its option in that panel of the help."""
    option = option.replace(kind=Parameter.KEYWORD_ONLY)
    if (info := copy.copy(_info(option))) is None:
        return option
    if not isinstance(info, OptionInfo):
        info.metavar = info.metavar or option.name.upper()
    elif title != OPTIONS:
        info.rich_help_panel = title
    return option.replace(annotation=Annotated[get_args(option.annotation)[0], info])


def _advice(command: Verb, option: str, words: list[str]) -> str:
    """The nearest option, or the spelling of a setting that was given as an option; empty if there is neither."""
    from modelpatch.cli.settings import spell_setting

    if hint := nearest(
        option, [spelled for one in command.params for spelled in (*one.opts, *one.secondary_opts)], 0.8
    ):
        return hint
    names = {parameter.name for parameter in command.params}
    place = next((number for number, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    inline = words[place].partition("=")[2] if place < len(words) else ""
    after = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("-") else "VALUE"
    return spell_setting(option.strip("-"), inline or after, takes_set="set_" in names, takes_fit="option" in names)
