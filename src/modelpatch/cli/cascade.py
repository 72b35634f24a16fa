"""`modelpatch cascade`: build an early-exit cascade of patches of one task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.console import (
    ForceOption,
    JsonOption,
    check_file,
    check_free,
    check_pictures,
    open_console,
    tell,
    write_json,
)
from modelpatch.cli.options import ArgumentOption, DeviceOption, PatchBackboneOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import CascadeError
from modelpatch.text import count_of

if TYPE_CHECKING:
    pass


@verb(first="data accuracy confidence caution out", panel="Cascade")
def cascade(
    patches: Annotated[list[Path], typer.Argument(help="Patch files of one task, all in one folder.")],
    data: Annotated[
        str,
        typer.Option(
            help="The task's data; thresholds are set on its validation images, or on those that the fits held out."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The cascade's file; by default TASK.cascade.json beside the patches."),
    ] = None,
    force: ForceOption = False,
    accuracy: Annotated[
        float | None, typer.Option(help="Top-1 to keep on held-out images, 0 to 1; by default the best patch's.")
    ] = None,
    confidence: Annotated[
        str, typer.Option(help="Measure of confidence: probability, or fitted (from probability, entropy and gap).")
    ] = "probability",
    caution: Annotated[
        float,
        typer.Option(
            min=0, help="Standard errors of safety by which a stage must keep the accuracy; 0 is the paper's rule."
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed of splits that the data does not have; by default that of the fits.")
    ] = None,
    backbone: PatchBackboneOption = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of top-1 against multiply-adds.")] = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Build an early-exit cascade: as accurate as the best patch on held-out images, with the fewest multiply-adds on average.

    Writes a small file beside the patches that eval and predict take like a patch (Streeter, 2018).
    """
    from modelpatch.cli.loading import backbone_of, find_device, fitted_seed
    from modelpatch.data.task import load_task
    from modelpatch.engine.cascade import is_cascade
    from modelpatch.patch.contents import Patch
    from modelpatch.recipes.cascading import cascade as build_cascade
    from modelpatch.report.cascades import cascade_table, plot_cascade, stages_table
    from modelpatch.report.tables import show

    console = open_console(json)
    check_pictures(plot=plot)
    check_file("--out", out)
    if len(set(patches)) < len(patches):
        raise CascadeError("a patch file is given twice. Give each once.")
    loaded = {path: Patch.load(path) for path in patches}
    first = patches[0]
    target = out or first.parent / f"{loaded[first].task.name}.cascade.json"
    if not is_cascade(target):
        raise CascadeError(f"--out {target} is not the name of a cascade. Expected one that ends in .json.")
    check_file("--out", target)
    check_free("--out", [target], force)
    if away := [path for path in patches if path.resolve().parent != target.resolve().parent]:
        raise CascadeError(f"{away[0]} does not lie beside {target}. Write the cascade into the folder of its patches.")
    base = backbone_of(loaded[first], first, backbone, parse_arguments(argument), find_device(device))
    chosen = fitted_seed(loaded[first]) if seed is None else seed
    task = load_task(data, seed=chosen)
    named = {path.stem: patch for path, patch in loaded.items()}
    rules: Any = {"accuracy": accuracy, "confidence": confidence, "caution": caution, "seed": chosen}
    result = build_cascade(base, named, task, **rules, progress=not console.quiet)
    files = {path.stem: path for path in patches}
    result.cascade.save(target, [files[name] for name in result.order])
    show(console, cascade_table(result))
    show(console, stages_table(result))
    tell(console, f"wrote {target} ({target.stat().st_size:,} bytes) with {count_of(len(result.order), 'stage')}")
    if len(result.order) == 1:
        tell(
            console,
            "no cascade of these patches keeps that accuracy for less work: the file holds the best single patch",
        )
    write_json(json, result.as_dict())
    if plot is not None:
        plot_cascade(result, plot)
        tell(console, f"drew {plot}")
