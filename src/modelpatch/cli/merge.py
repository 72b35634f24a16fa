"""`modelpatch merge` and `modelpatch diff`: combine patches of one backbone, and compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from typer import Argument, Option

from modelpatch.cli.console import ForceOption, Screen, check_out
from modelpatch.cli.options import AlphaOption, PatchNetwork, SeedOption
from modelpatch.cli.verb import verb
from modelpatch.errors import PatchError

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.patch.contents import Patch


@verb(first="out weights rule head", panel="Merging")
def merge(
    console: Screen,
    network: PatchNetwork,
    patches: list[Path] = Argument(..., help="Patch files of one backbone."),
    out: Path = Option(..., "--out", "-o", help="The merged patch file."),
    force: ForceOption = False,
    weights: str | None = Option(None, help="Comma-separated factors of the patches; by default 1 / n, for ties 1."),
    rule: str = Option("sum", help="The rule: sum, ties or dare."),
    density: float = Option(0.2, help="ties: share of the largest numbers to keep."),
    drop: float = Option(0.9, help="dare: share of numbers to drop."),
    head: str = Option("0", help="The head: a patch's by its number from 0, or 'all' for all classes side by side."),
    alpha: AlphaOption = None,
    seed: SeedOption = 0,
) -> None:
    """Combine the bodies of several patches of one backbone into one patch."""
    from modelpatch.cli.loading import at_alpha
    from modelpatch.convert.merging import merge as run_merge
    from modelpatch.patch.contents import Patch
    from modelpatch.report.tables import inspection_table

    check_out(out, force)
    loaded = [at_alpha(Patch.load(path), alpha) for path in patches]
    base = _common_backbone(patches, loaded, network)
    merged = run_merge(
        base, loaded, weights=_numbers(weights), rule=rule, density=density, drop=drop, seed=seed, head=_read_head(head)
    )
    merged.save(out)
    inspection = merged.inspect()
    console.show(inspection_table(inspection))
    console.tell(f"wrote {out} ({inspection.file_bytes:,} bytes)")
    console.write_json(inspection.as_dict())


@verb()
def diff(
    console: Screen,
    network: PatchNetwork,
    first: Path = Argument(..., help="A patch file."),
    second: Path = Argument(..., help="Another of the same backbone."),
) -> None:
    """Compare two patches: the sizes of their changes, their distance and cosine, one row per tensor."""
    from modelpatch.convert.merging import diff as run_diff
    from modelpatch.patch.contents import Patch
    from modelpatch.report.tables import difference_tables

    loaded = [Patch.load(path) for path in (first, second)]
    base = _common_backbone([first, second], loaded, network)
    difference = run_diff(base, *loaded)
    console.show(*difference_tables(difference, first.name, second.name))
    console.print()
    console.tell("the two compute the same" if difference.same else "the two compute different answers")
    console.write_json(difference.as_dict())


def _common_backbone(paths: list[Path], patches: list[Patch], network: PatchNetwork) -> Backbone:
    from modelpatch.cli.loading import naming
    from modelpatch.convert.merging import check_pair

    for path, patch in zip(paths[1:], patches[1:], strict=True):
        with naming(path):
            check_pair(patches[0], patch)
    return network.open(patches[0], paths[0])


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
