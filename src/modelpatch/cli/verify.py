"""modelpatch verify: can this file be trusted, and does it fit this backbone?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from modelpatch.cli.options import ArgumentOption, PatchBackboneOption, backbone_of, parse_arguments
from modelpatch.cli.outputs import JsonOption, open_console, write_json
from modelpatch.errors import BackboneError, MissingExtraError, ModelpatchError
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel

COLORS = {"intact": "green", "refused": "red", "unchecked": "yellow"}


def verify(
    patch: Annotated[list[Path], typer.Argument(help="Patch files.")],
    backbone: PatchBackboneOption = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the files without loading a backbone.")] = False,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Check patch files: every byte, every name and number, and that they belong to the backbone.

    A file is `intact`, `refused`, or `unchecked` where its backbone cannot be loaded. Exit status 1 unless all are intact.
    """
    console = open_console(json, soft_wrap=True, highlight=False)
    arguments = parse_arguments(argument)
    results = []
    for path in patch:
        results.append(result := _check(path, file_only, backbone, arguments))
        status, color = result["status"], COLORS[result["status"]]
        console.print(f"[{color}]{status:<9}[/{color}] {escape(_line(result))}")
    write_json(json, results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def _check(path: Path, file_only: bool, spec: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What is known about one file, as it stands in the JSON."""
    result: dict[str, Any] = {"patch": str(path), "ok": False}
    checked = "nothing"
    try:
        patch = Patch.load(path)
        checked = "file"
        if not file_only:
            PatchedModel(backbone_of(patch, path, spec, arguments, torch.device("cpu")), patch)
            checked = f"file and backbone {patch.backbone.spec}"
    except ModelpatchError as error:
        status = "unchecked" if isinstance(error, BackboneError | MissingExtraError) else "refused"
        return {**result, "status": status, "checked": checked, "error": type(error).__name__, "message": str(error)}
    return {**result, "ok": True, "status": "intact", "checked": checked}


def _line(result: dict[str, Any]) -> str:
    path = result["patch"]
    if result["ok"]:
        return f"{path}: {result['checked']}"
    message = result["message"].removeprefix(f"{path}: ")
    if result["status"] == "unchecked" and result["checked"] == "file":
        return f"{path}: the file is intact, its backbone was not checked: {message}"
    return f"{path}: {result['error']}: {message}"
