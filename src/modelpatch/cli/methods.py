"""`modelpatch methods`: list methods, their hyperparameters and the settings of a fit."""

from __future__ import annotations

from typing import Annotated

import typer

from modelpatch.cli.console import JsonOption, open_console, tell, write_json
from modelpatch.cli.verb import verb


@verb(first="settings json")
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: list its hyperparameters, which --set takes.")] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="List the settings of a fit, which --fit and options take.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """List the methods; with NAME the hyperparameters of one; with --settings the settings of a fit."""
    from modelpatch.methods.registry import METHODS, make_method
    from modelpatch.report.settings import describe_fields, first_line, methods_table, settings_table
    from modelpatch.report.tables import show
    from modelpatch.train.settings import FitSettings

    console = open_console(json)
    if settings:
        rows = describe_fields(FitSettings)
        show(console, settings_table("settings of a fit: an option, or --fit KEY=VALUE", rows))
        write_json(json, [row.as_dict() for row in rows])
    elif name is None:
        lines = {spelled: first_line(kind) for spelled, kind in METHODS.items()}
        show(console, methods_table(lines))
        tell(console, "`modelpatch methods NAME` lists the hyperparameters of one; + joins several in one patch")
        write_json(json, lines)
    else:
        kind = type(make_method(name))
        rows = describe_fields(kind)
        tell(console, first_line(kind))
        show(console, settings_table(f"hyperparameters of {name}: --set KEY=VALUE", rows))
        write_json(json, [row.as_dict() for row in rows])
