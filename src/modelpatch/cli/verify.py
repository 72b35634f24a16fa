"""`modelpatch verify`: check patch files, and that they fit a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer import Argument, Option

from modelpatch.cli.console import Screen
from modelpatch.cli.options import ArgumentOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import BackboneError, MissingExtraError, ModelpatchError

COLORS = {"intact": "green", "refused": "red", "unchecked": "yellow"}


@verb(first="backbone json")
def verify(
    console: Screen,
    patch: list[Path] = Argument(..., help="Patch files."),
    backbone: str | None = Option(None, "--backbone", "-b", help="A network it must fit too; own: the patch's."),
    file_only: bool = Option(False, "--file-only", hidden=True),
    argument: ArgumentOption = None,
) -> None:
    """Check patch files: every byte, name and number; with --backbone also that they fit the frozen network.

    A file is intact, refused, or unchecked if its backbone cannot be loaded. Exit status 1 unless all are intact.
    """
    from rich.markup import escape

    arguments = parse_arguments(argument)
    results = []
    for path in patch:
        results.append(result := _check(path, None if file_only else backbone, arguments))
        status, color = result["status"], COLORS[result["status"]]
        console.print(f"[{color}]{status:<9}[/{color}] {escape(_line(result))}", soft_wrap=True, highlight=False)
    console.write_json(results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def _check(path: Path, spec: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The result of one file, as written to the JSON."""
    from modelpatch.cli.loading import backbone_of, find_device
    from modelpatch.patch.contents import Patch

    result: dict[str, Any] = {"patch": str(path), "ok": False}
    checked = "nothing"
    try:
        patch = Patch.load(path)
        checked = "file"
        if spec is not None:
            from modelpatch.patch.model import PatchedModel

            PatchedModel(backbone_of(patch, path, spec, arguments, find_device("cpu")), patch)
            checked = f"file and backbone {patch.backbone.spec}"
    except ModelpatchError as error:
        status = "unchecked" if isinstance(error, BackboneError | MissingExtraError) else "refused"
        return {**result, "status": status, "checked": checked, "error": type(error).__name__, "message": str(error)}
    return {**result, "ok": True, "status": "intact", "checked": checked}


def _line(result: dict[str, Any]) -> str:
    path = result["patch"]
    if result["ok"]:
        more = "; -b own checks that it fits its backbone too" if result["checked"] == "file" else ""
        return f"{path}: {result['checked']}{more}"
    message = result["message"].removeprefix(f"{path}: ")
    if result["status"] == "unchecked" and result["checked"] == "file":
        return f"{path}: the file is intact, its backbone was not checked: {message}"
    return f"{path}: {result['error']}: {message}"
