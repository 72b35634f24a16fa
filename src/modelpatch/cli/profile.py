"""`modelpatch profile`: measure the gain of training each block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelpatch.cli.console import JsonOption, check_pictures, open_console, tell, write_json
from modelpatch.cli.options import DataArgument, MethodOption, Network, SetOption, Training
from modelpatch.cli.settings import parse_counts, parse_pairs
from modelpatch.cli.study import FoldsOption, HalvingOption, Study
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError


@verb(first="method set_ backbone epochs stages plot", panel="Profile", config=True)
def profile(
    data: DataArgument,
    network: Network,
    training: Training,
    study: Study,
    method: MethodOption = "subset",
    set_: SetOption = None,
    consecutive: Annotated[int, typer.Option(min=1, help="Train runs of this many blocks.")] = 1,
    pairs: Annotated[bool, typer.Option("--pairs", help="Train every pair of blocks.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Train whole stages.")] = False,
    folds: FoldsOption = 1,
    halving: HalvingOption = 0,
    sizes: Annotated[
        str | None,
        typer.Option(help="N1,N2,...: profiles with these numbers of training images, side by side."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture: bars, or a heat map of --pairs or --sizes.")] = None,
    json: JsonOption = None,
) -> None:
    """Train each block (or run, pair or stage) alone with the head and show its gain on held-out training images.

    The test images are not read. An interrupted profile goes on when the same command is given again.
    """
    from modelpatch.methods.registry import make_method
    from modelpatch.report.selection import plot_profile, plot_sizes, profile_table, sizes_table
    from modelpatch.report.tables import show
    from modelpatch.select.profiling import profile as run_profile

    console = open_console(json)
    check_pictures(plot=plot)
    made = make_method(method, **parse_pairs(set_, "--set"))
    counts = [] if sizes is None else parse_counts("--sizes", sizes)
    if counts and (study.images is not None or pairs):
        raise ModelpatchError("--sizes sets the number of images, and draws no pairs. Leave --images and --pairs out.")
    opened = study.open(data, network, training)
    parts = [opened.task.subsample(count, training.seed) for count in counts] or [opened.task]
    results = [
        run_profile(
            opened.backbone,
            part,
            made,
            consecutive=consecutive,
            pairs=pairs,
            stages=stages,
            folds=folds,
            halving=halving,
            **opened.options,
        )
        for part in parts
    ]
    show(console, sizes_table(results) if counts else profile_table(results[0]))
    tell(console, opened.kept)
    write_json(json, [result.as_dict() for result in results] if counts else results[0].as_dict())
    if plot is not None:
        plot_sizes(results, plot) if counts else plot_profile(results[0], plot)
        tell(console, f"drew {plot}")
