"""`modelpatch multires`: one network at several resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modelpatch.cli.console import (
    JsonOption,
    check_pictures,
    make_folder,
    open_console,
    read_names,
    tell,
    tell_run,
    write_json,
)
from modelpatch.cli.options import DataArgument, Network, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import TrainingError


@verb(first="resolutions sharing set_ backbone epochs seeds out", panel="Resolutions", config=True)
def multires(
    data: DataArgument,
    network: Network,
    training: Training,
    resolutions: Annotated[str, typer.Option(help="Pixels, comma-separated.")] = "96,128,160",
    sharing: Annotated[
        str,
        typer.Option(
            help="Weights of a resolution alone: private (scale and bias), shared (none), independent (all); several, "
            "comma-separated, or 'all' to compare them."
        ),
    ] = "private",
    set_: SetOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each; several give standard errors.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder for all results; by default TASK-multires.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train anew instead of continuing from the folder.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture of top-1 against the resolution.")] = None,
    json: JsonOption = None,
) -> None:
    """Train one network for several resolutions: shared weights, a private scale and bias for each (K for the Price of 1).

    Writes a backbone file and one patch per resolution. An interrupted run continues when the same command is given again.
    """  # fmt: skip

    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import make_method
    from modelpatch.recipes.comparison import compare_sharing
    from modelpatch.recipes.multires import METHOD, SHARINGS
    from modelpatch.report.resolutions import plot_sharing, sharing_table
    from modelpatch.report.tables import show

    console = open_console(json)
    check_pictures(plot=plot)
    sharings = list(SHARINGS) if sharing == "all" else list(read_names("--sharing", sharing))
    if unknown := sorted(set(sharings) - set(SHARINGS)):
        raise TrainingError(f"--sharing {unknown[0]!r} is unknown. Expected some of: {', '.join(SHARINGS)}, or 'all'.")
    pixels = _read_pixels(resolutions)
    if training.image_size is not None:
        raise TrainingError("--image-size is given beside --resolutions. Give the latter alone.")
    method = make_method(METHOD.name, **{"statistics": METHOD.statistics, **parse_pairs(set_, "--set")})
    settings: dict[str, Any] = training.settings()
    task = load_task(data, seed=training.seed)
    base = network.open()
    folder = out or Path(f"{task.task.name}-multires")
    make_folder("--out", folder)
    result = compare_sharing(
        base,
        task,
        pixels,
        sharings,
        method=method,
        seeds=seeds,
        out=folder,
        reuse=not restart,
        progress=not console.quiet,
        **settings,
    )
    show(console, sharing_table(result))
    for runs in result.runs.values():
        patches = ", ".join(f"{size} px" for size in runs[0].patches)
        tell(console, f"{runs[0].sharing}: patches at {patches} over {runs[0].backbone.spec} in {folder}")
    tell_run(console, folder)
    write_json(json, result.as_dict())
    if plot is not None:
        plot_sharing(result, plot)
        tell(console, f"drew {plot}")


def _read_pixels(text: str) -> list[int]:
    """The pixels of --resolutions. Raises `TrainingError` for values that are not numbers."""
    names = read_names("--resolutions", text)
    if wrong := [name for name in names if not name.isascii() or not name.isdigit()]:
        raise TrainingError(f"--resolutions {wrong[0]!r} is not a number of pixels. Write them as 96,128,160.")
    return [int(name) for name in names]
