"""`modelpatch merge` and `modelpatch diff`: combine patches of one backbone, and compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modelpatch.cli.console import ForceOption, JsonOption, check_file, check_free, open_console, tell, write_json
from modelpatch.cli.options import AlphaOption, ArgumentOption, PatchBackboneOption, SeedOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import PatchError

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.patch.contents import Patch


@verb(first="out weights rule head", panel="Merging")
def merge(
    patches: Annotated[list[Path], typer.Argument(help="Patch files of one backbone.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The merged patch file.")],
    force: ForceOption = False,
    weights: Annotated[
        str | None, typer.Option(help="Comma-separated factors of the patches; by default 1 / n, for ties 1.")
    ] = None,
    rule: Annotated[str, typer.Option(help="The rule: sum, ties or dare.")] = "sum",
    density: Annotated[float, typer.Option(help="ties: share of the largest numbers to keep.")] = 0.2,
    drop: Annotated[float, typer.Option(help="dare: share of numbers to drop.")] = 0.9,
    head: Annotated[
        str, typer.Option(help="The head: that of a patch by its number from 0, or 'all' for all classes side by side.")
    ] = "0",
    alpha: AlphaOption = None,
    seed: SeedOption = 0,
    backbone: PatchBackboneOption = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Combine the bodies of several patches of one backbone into one patch."""
    from modelpatch.cli.loading import at_alpha
    from modelpatch.convert.merging import merge as run_merge
    from modelpatch.patch.contents import Patch
    from modelpatch.report.tables import inspection_table, show

    console = open_console(json)
    check_file("--out", out)
    check_free("--out", [out], force)
    loaded = [at_alpha(Patch.load(path), alpha) for path in patches]
    base = _common_backbone(patches, loaded, backbone, argument)
    merged = run_merge(
        base,
        loaded,
        weights=_numbers(weights),
        rule=rule,
        density=density,
        drop=drop,
        seed=seed,
        head=_read_head(head),
    )
    merged.save(out)
    inspection = merged.inspect()
    show(console, inspection_table(inspection))
    tell(console, f"wrote {out} ({inspection.file_bytes:,} bytes)")
    write_json(json, inspection.as_dict())


@verb()
def diff(
    first: Annotated[Path, typer.Argument(help="A patch file.")],
    second: Annotated[Path, typer.Argument(help="Another of the same backbone.")],
    backbone: PatchBackboneOption = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Compare two patches: the sizes of their changes, their distance and cosine, one row per tensor."""
    from modelpatch.convert.difference import diff as run_diff
    from modelpatch.patch.contents import Patch
    from modelpatch.report.tables import difference_tables, show

    console = open_console(json)
    loaded = [Patch.load(path) for path in (first, second)]
    base = _common_backbone([first, second], loaded, backbone, argument)
    difference = run_diff(base, *loaded)
    for table in difference_tables(difference, first.name, second.name):
        show(console, table)
        console.print()
    tell(console, "the two compute the same" if difference.same else "the two compute different answers")
    write_json(json, difference.as_dict())


def _common_backbone(paths: list[Path], patches: list[Patch], spec: str | None, argument: list[str] | None) -> Backbone:
    from modelpatch.cli.loading import backbone_of, find_device, naming
    from modelpatch.convert.difference import check_pair

    for path, patch in zip(paths[1:], patches[1:], strict=True):
        with naming(path):
            check_pair(patches[0], patch)
    return backbone_of(patches[0], paths[0], spec, parse_arguments(argument), find_device("cpu"))


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise PatchError(f"--weights {text!r} is not numbers separated by commas.") from None


def _read_head(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise PatchError(f"--head {text!r} is neither 'all' nor the number of a patch from 0.")
    return int(text)
