"""modelpatch verify: can this file be trusted, and does it fit this backbone?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from modelpatch.cli.options import JsonOption, PatchBackboneOption, backbone_of, write_json
from modelpatch.errors import ModelpatchError
from modelpatch.patch import Patch, PatchedModel


def verify(
    patch: Annotated[list[Path], typer.Argument(help="Patch files.")],
    backbone: PatchBackboneOption = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the files without loading a backbone.")] = False,
    json: JsonOption = None,
) -> None:
    """Check patch files: every byte, every name and number, and that they belong to the backbone.

    Exit status 1 if any check fails.
    """
    console = Console(stderr=str(json) == "-", soft_wrap=True, highlight=False)
    results = []
    for path in patch:
        try:
            loaded = Patch.load(path)
            if not file_only:
                PatchedModel(backbone_of(loaded, path, backbone), loaded)
        except ModelpatchError as error:
            results.append({"patch": str(path), "ok": False, "error": type(error).__name__, "message": str(error)})
            console.print(f"[red]refused[/red]  {escape(str(path))}: {type(error).__name__}", end=" ")
            console.print(str(error), markup=False)
        else:
            against = "file" if file_only else f"file and backbone {loaded.backbone.spec}"
            results.append({"patch": str(path), "ok": True, "checked": against})
            console.print(f"[green]intact[/green]   {escape(f'{path}: {against}')}")
    write_json(json, results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)
