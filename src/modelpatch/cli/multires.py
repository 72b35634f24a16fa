"""modelpatch multires: one network at several resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modelpatch.cli.grouped import grouped
from modelpatch.cli.options import Network, SetOption, Training, parse_pairs
from modelpatch.cli.outputs import JsonOption, check_pictures, make_folder, open_console, read_names, tell, write_json
from modelpatch.data.task import load_task
from modelpatch.errors import TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.registry import make_method
from modelpatch.recipes.multires import SHARINGS
from modelpatch.recipes.sharing import compare_sharing
from modelpatch.report.resolutions import plot_sharing, sharing_table
from modelpatch.report.tables import show


@grouped
def multires(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    network: Network,
    training: Training,
    resolutions: Annotated[str, typer.Option(help="Pixels, comma-separated.")] = "96,128,160",
    sharing: Annotated[
        str,
        typer.Option(
            help="What a resolution has of its own: private (scale and bias), shared (nothing), independent (all); "
            "several, comma-separated, or 'all' to compare them."
        ),
    ] = "private",
    set_: SetOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with this many seeds; gives standard errors.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of all results; by default TASK-multires.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train anew, whatever the folder holds, instead of going on from it.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw top-1 against the resolution to this picture.")] = None,
    json: JsonOption = None,
) -> None:
    """Train one network for several resolutions: shared weights, a private scale and bias for each (K for the Price of 1).

    Writes a backbone's file and one patch a resolution. An interrupted run goes on when the same command is given again.
    """  # fmt: skip
    console = open_console(json)
    check_pictures(plot=plot)
    sharings = list(SHARINGS) if sharing == "all" else list(read_names("--sharing", sharing))
    if unknown := sorted(set(sharings) - set(SHARINGS)):
        raise TrainingError(f"--sharing {unknown[0]!r} is unknown. Expected some of: {', '.join(SHARINGS)}, or 'all'.")
    pixels = _read_pixels(resolutions)
    if training.image_size is not None:
        raise TrainingError("--image-size is given beside --resolutions. Give the latter alone.")
    method = make_method(FullFinetune.name, **{"statistics": "learned", **parse_pairs(set_, "--set")})
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
        progress=True,
        **settings,
    )
    show(console, sharing_table(result))
    for runs in result.runs.values():
        patches = ", ".join(f"{size} px" for size in runs[0].patches)
        tell(console, f"{runs[0].sharing}: patches at {patches} over {runs[0].backbone.spec} in {folder}")
    write_json(json, result.as_dict())
    if plot is not None:
        plot_sharing(result, plot)
        tell(console, f"drew {plot}")


def _read_pixels(text: str) -> list[int]:
    """The pixels of --resolutions. Raises `TrainingError` for what is no number."""
    names = read_names("--resolutions", text)
    if wrong := [name for name in names if not name.isascii() or not name.isdigit()]:
        raise TrainingError(f"--resolutions {wrong[0]!r} is no number of pixels. Write them as 96,128,160.")
    return [int(name) for name in names]
