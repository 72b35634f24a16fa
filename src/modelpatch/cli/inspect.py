"""modelpatch inspect: what a patch file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelpatch.cli.options import JsonOption, write_json
from modelpatch.patch import Patch
from modelpatch.report.plots import plot_inspection
from modelpatch.report.tables import inspection_table


def inspect(
    patch: Annotated[Path, typer.Argument(help="The patch file.")],
    plot: Annotated[Path | None, typer.Option(help="Draw bytes per part to this picture.")] = None,
    json: JsonOption = None,
) -> None:
    """Show what a patch holds: per span, bytes, hashes, settings and measured figures. Needs no backbone."""
    console = Console(stderr=str(json) == "-")
    inspection = Patch.load(patch).inspect()
    console.print(inspection_table(inspection))
    if plot is not None:
        plot_inspection(inspection, plot)
        console.print(f"drew {plot}", markup=False)
    write_json(json, inspection.as_dict())
