"""`modelpatch methods`: list methods, their hyperparameters and the settings of a fit."""

from __future__ import annotations

from dataclasses import asdict

from typer import Argument, Option

from modelpatch.cli.console import Screen
from modelpatch.cli.verb import verb


@verb(first="settings json")
def methods(
    console: Screen,
    name: str | None = Argument(None, help="A method: list its hyperparameters, which --set takes."),
    settings: bool = Option(False, "--settings", help="List the settings of a fit, which --fit and options take."),
) -> None:
    """List the methods; with NAME the hyperparameters of one; with --settings the settings of a fit."""
    from modelpatch.methods.registry import METHODS, make_method
    from modelpatch.report.settings import describe_fields, first_line, methods_table, settings_table
    from modelpatch.train.settings import FitSettings

    if settings:
        rows = describe_fields(FitSettings)
        console.show(settings_table("settings of a fit: an option, or --fit KEY=VALUE", rows))
        console.write_json([asdict(row) for row in rows])
    elif name is None:
        lines = {spelled: first_line(kind) for spelled, kind in METHODS.items()}
        console.show(methods_table(lines))
        console.tell("`modelpatch methods NAME` lists the hyperparameters of one; + joins several in one patch")
        console.write_json(lines)
    else:
        kind = type(make_method(name))
        rows = describe_fields(kind)
        console.tell(first_line(kind))
        console.show(settings_table(f"hyperparameters of {name}: --set KEY=VALUE", rows))
        console.write_json([asdict(row) for row in rows])
