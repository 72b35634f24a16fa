"""modelpatch profile: which blocks are worth training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelpatch.cli.grouped import grouped
from modelpatch.cli.options import Network, SetOption, Training, parse_pairs
from modelpatch.cli.outputs import JsonOption, check_pictures, open_console, tell, write_json
from modelpatch.cli.selecting import FoldsOption, HalvingOption, MethodOption, Study
from modelpatch.methods import make_method
from modelpatch.report.selection import plot_profile, profile_table
from modelpatch.report.tables import show
from modelpatch.select import profile as run_profile


@grouped
def profile(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
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
    plot: Annotated[Path | None, typer.Option(help="Draw the bars, or the heat map of pairs, to this picture.")] = None,
    json: JsonOption = None,
) -> None:
    """Train each block (or run, pair or stage) alone with the head and show what it gains on held-out training images.

    The test images are not read. An interrupted profile goes on when the same command is given again.
    """
    console = open_console(json)
    check_pictures(plot=plot)
    made = make_method(method, **parse_pairs(set_, "--set"))
    opened = study.open(data, network, training)
    result = run_profile(
        opened.backbone,
        opened.task,
        made,
        consecutive=consecutive,
        pairs=pairs,
        stages=stages,
        folds=folds,
        halving=halving,
        **opened.options,
    )
    show(console, profile_table(result))
    tell(console, opened.kept)
    write_json(json, result.as_dict())
    if plot is not None:
        plot_profile(result, plot)
        tell(console, f"drew {plot}")
