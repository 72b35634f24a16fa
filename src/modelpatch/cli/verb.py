"""Verbs: functions whose parameters are options, singly or in groups (frozen dataclasses), shown in panels.

A group checks its values when it is made, before the verb begins. Nothing here, and nothing in a declaration of options,
imports torch: the work's imports stand in the body of the verb.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer import Option
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from modelpatch.cli.console import JsonOption, Screen, check_file, check_picture, check_sheet
from modelpatch.cli.runs import CURRENT, QUIET, load_run
from modelpatch.provenance import COMMAND
from modelpatch.text import nearest

BACKBONE, DATA, FILES, OPTIONS, RAY, RUN = "Backbone", "Data", "Files", "Options", "Ray", "Run"
COMMON = {
    DATA: "kind classes separator ignore image_column label_column split_column skip_unreadable",
    BACKBONE: "backbone weights argument device alpha",
    FILES: "out force dtype log json plot bytes_plot markdown html sheet overlay rounds",
    RAY: "ray ray_workers ray_address replicas",
    RUN: "config quiet restart",
}  # panels of options that have one name and one meaning in all verbs
PANELS = {name: panel for panel, names in COMMON.items() for name in names.split()}
LAST = (DATA, BACKBONE, FILES, RAY, RUN)  # panels below those of the verb itself
CHECKS = {
    **dict.fromkeys(("markdown", "html", "rounds"), check_file),
    "sheet": check_sheet,
    **dict.fromkeys(("plot", "bytes_plot"), check_picture),
}  # files that a verb writes, checked before it begins
INFO = "typer"  # key of an option's description in the metadata of a group's field

QuietOption = Annotated[bool, Option("--quiet", "-q", help="Print errors and what --json - prints, nothing else.")]
CONFIG = "A YAML or TOML file of options, as every run writes; the command line overrides it."
ConfigOption = Annotated[Path | None, Option(help=CONFIG, is_eager=True, callback=load_run)]


def option(default: Any, *names: str, **details: Any) -> Any:
    """A field of a group with its default and, as for `typer.Option`, its names and details."""
    return field(default=default, metadata={INFO: Option(*names, **details)})


class Verb(TyperCommand):
    """A command that answers an unknown option with the option or setting that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as click does; an unknown option that is a setting is answered with --set or --fit."""
        given = list(args)
        COMMAND.set((str(ctx.info_name), *given))
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
    `Screen` is made of the option --json.
    """

    def make(function: Callable[..., None]) -> Any:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
        screen = next((name for name, kind in hints.items() if kind is Screen), None)
        given: list[tuple[str, Any, Any, str]] = []  # name, type, default, panel
        for name, parameter in signature(function).parameters.items():
            if name in groups:
                given += _members(groups[name], panel)
            elif name == screen:
                given.append(("json", JsonOption, None, panel))
            else:
                given.append((name, hints[name], parameter.default, panel))
        given += [("config", ConfigOption, None, RUN)] if config else []
        given.append(("quiet", QuietOption, False, RUN))
        names, leading = [name for name, *_ in given], first.split()
        if len(set(names)) < len(names):
            raise TypeError(f"{function.__name__}: two of its options are called {max(names, key=names.count)!r}")
        if unknown := set(leading) - set(names):
            raise TypeError(f"{function.__name__} has no options {sorted(unknown)}")
        titles = {name: OPTIONS if name in leading else PANELS.get(name, title) for name, _, _, title in given}
        order = [OPTIONS, *dict.fromkeys(title for title in titles.values() if title not in LAST), *LAST]

        def place(option: Parameter) -> tuple[bool, int, int]:
            """Sort arguments before options, and these by panel and rank."""
            described = any(isinstance(part, OptionInfo) for part in get_args(option.annotation))
            rank = leading.index(option.name) if option.name in leading else len(leading)
            return described or option.default is not Parameter.empty, order.index(titles[option.name]), rank

        @wraps(function)
        def call(**values: Any) -> None:
            CURRENT.set((function.__name__, dict(values)))
            QUIET.set(bool(values.pop("quiet")))
            values.pop("config", None)
            for name, check in CHECKS.items():
                check(f"--{name.replace('_', '-')}", values.get(name))
            for name, group in groups.items():
                values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
            if screen:
                values[screen] = Screen(values.pop("json"))
            function(**values)

        parameters = sorted((_parameter(n, hint, default, titles[n]) for n, hint, default, _ in given), key=place)
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {option.name: option.annotation for option in parameters}
        return call

    return make


def command(function: Callable[..., None], name: str) -> Any:
    """The command of a verb."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, cls=Verb)(function)
    return typer.main.get_command(app)


def _members(group: Any, panel: str) -> list[tuple[str, Any, Any, str]]:
    """The fields of a dataclass: name, type, default and the group's panel."""
    hints = get_type_hints(group, include_extras=True)
    title = getattr(group, "panel", panel)
    hints |= {one.name: Annotated[hints[one.name], one.metadata[INFO]] for one in fields(group) if INFO in one.metadata}
    return [(name, hints[name], one.default, title) for name, one in signature(group).parameters.items()]


def _parameter(name: str, hint: Any, default: Any, title: str) -> Parameter:
    """The option as a keyword, with typer's description, which may be its default, in its annotation, and in a panel."""
    kind, *details = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    info: Any = next((copy.copy(part) for part in (default, *details) if isinstance(part, ParameterInfo)), None)
    if isinstance(default, ParameterInfo):
        default, info.default = default.default, ...
    if isinstance(info, OptionInfo):
        info.rich_help_panel = info.rich_help_panel if title == OPTIONS else title
    elif info is not None:
        info.metavar = info.metavar or name.upper()
    default = Parameter.empty if default is ... else default
    annotation = hint if info is None else Annotated[kind, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def spell_option(name: str, value: Any) -> str:
    """An option with a value as a command line gives it: `--batch-size 8`, `--no-cache`."""
    name = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}"


def spell_setting(key: str, value: Any, taken: Collection[str]) -> str:
    """Advice for a setting that was given in the wrong way; empty if no parameter that the verb has `taken` sets it."""
    from modelpatch.methods.registry import METHODS
    from modelpatch.train.settings import FitSettings

    if owners := sorted(name for name, kind in METHODS.items() if key in kind.__dataclass_fields__):
        known = ", ".join(owners[:3]) + (", ..." if len(owners) > 3 else "")
        return f" Write --set {key}={value}: it is a hyperparameter of methods ({known})." if "set_" in taken else ""
    if key not in FitSettings.__dataclass_fields__:
        return ""
    if key in taken:
        return f" Write {spell_option(key, value)}: it is a setting of fit."
    return f" Write --fit {key}={value}: it is a setting of fit." if "option" in taken else ""


def _advice(command: Verb, option: str, words: list[str]) -> str:
    """The nearest option, or the spelling of a setting that was given as an option; empty if there is neither."""
    if hint := nearest(option, [known for one in command.params for known in (*one.opts, *one.secondary_opts)], 0.8):
        return hint
    taken = {parameter.name for parameter in command.params}
    place = next((number for number, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    inline = "".join(words[place : place + 1]).partition("=")[2]
    after = [word for word in words[place + 1 : place + 2] if not word.startswith("-")]
    key = option.strip("-").replace("-", "_")
    return spell_setting(key, inline or "".join(after) or "VALUE", taken)
