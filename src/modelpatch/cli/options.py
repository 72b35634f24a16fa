"""Options that several verbs share, and how they become backbones, tasks and methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modelpatch.backbone import Backbone, load_backbone
from modelpatch.errors import MethodError, ModelpatchError, UnknownBackboneError
from modelpatch.patch import Patch

BackboneOption = Annotated[
    str, typer.Option("--backbone", "-b", help="timm:NAME, torchvision:NAME, file:PATH or bundled:NAME.")
]
PatchBackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="The frozen network; by default the one the patch names."),
]
ArgumentOption = Annotated[
    list[str] | None, typer.Option("--argument", help="KEY=VALUE for the backbone's constructor; may be repeated.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file ('-': standard output).")
]
SeedOption = Annotated[int, typer.Option(help="Every random choice follows it.")]


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`KEY=VALUE` strings to a dict; values are read as JSON where they are JSON. Raises `MethodError`."""
    result: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise MethodError(f"{option} {pair!r} is not KEY=VALUE.")
        try:
            result[key.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            result[key.strip().replace("-", "_")] = value
    return result


def open_backbone(spec: str, arguments: list[str] | None = None) -> Backbone:
    """The backbone a command line names."""
    return load_backbone(spec, **parse_pairs(arguments, "--argument"))


def backbone_of(patch: Patch, patch_path: Path, spec: str | None) -> Backbone:
    """The backbone a patch belongs to: the one named, else the one its file names (a file is sought beside the patch)."""
    if spec is not None:
        return load_backbone(spec)
    record = patch.backbone
    kind, _, name = record.spec.partition(":")
    if kind == "module":
        raise UnknownBackboneError(
            f"{patch_path} was made for a module ({name}) that only your own code can build. Use Python: "
            "mp.load_backbone(module).patched(mp.Patch.load(path))."
        )
    if kind != "file":
        return load_backbone(record.spec, **record.arguments)
    for folder in (patch_path.parent, Path.cwd()):
        if (folder / name).is_file():
            return load_backbone(f"file:{folder / name}", **record.arguments)
    raise UnknownBackboneError(
        f"{patch_path} needs the backbone file {name}. Say where it is: --backbone file:PATH/{name}"
    )


def write_json(path: Path | None, value: Any) -> None:
    """Write figures as indented JSON; '-' is standard output and None nothing."""
    if path is None:
        return
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise ModelpatchError(f"cannot write {path}: {error.strerror}.") from error
