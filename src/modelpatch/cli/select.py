"""`modelpatch select`: choose the blocks to patch, and train a patch of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from modelpatch.cli.console import JsonOption, check_pictures, open_console, tell, write_json
from modelpatch.cli.options import DataArgument, MethodOption, Network, PatchFile, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.study import FoldsOption, HalvingOption, Limits, Study
from modelpatch.cli.verb import verb


@verb(first="method set_ backbone epochs max_blocks max_bytes max_latency out", panel="Selection", config=True)
def select(
    data: DataArgument,
    network: Network,
    training: Training,
    study: Study,
    file: PatchFile,
    limits: Limits,
    method: MethodOption = "subset",
    set_: SetOption = None,
    folds: FoldsOption = 5,
    epsilon: Annotated[float, typer.Option(help="Accuracy that a block must add to be taken.")] = 0.01,
    rule: Annotated[str, typer.Option(help="paper: Algorithm 1; code: the authors' program.")] = "paper",
    start: Annotated[str, typer.Option(help="With --rule code: none, all (blocks are removed) or better.")] = "none",
    among: Annotated[
        str | None, typer.Option(help="Comma-separated blocks to choose among, named as in a profile; by default all.")
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Choose whole stages instead of blocks.")] = False,
    ends: Annotated[
        bool,
        typer.Option(help="Compare the choice with no blocks and with all of them on the same folds; train the best."),
    ] = True,
    max_blocks: Annotated[int | None, typer.Option(min=1, help="At most this many blocks, with --stages too.")] = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Start candidates from the blocks trained in the round before.")
    ] = False,
    halving: HalvingOption = 0,
    plot: Annotated[Path | None, typer.Option(help="A picture of the order of the blocks.")] = None,
    json: JsonOption = None,
) -> None:
    """Choose blocks greedily by cross-validation, then train a patch of them on all training images and test it once.

    An interrupted selection goes on when the same command is given again.
    """
    from modelpatch.methods.registry import make_method
    from modelpatch.report.selection import plot_order, round_table, selection_table
    from modelpatch.report.tables import show
    from modelpatch.select.greedy import Greedy, Rule, Start
    from modelpatch.select.greedy import select as run_select

    console = open_console(json)
    check_pictures(plot=plot)
    limits.warn(console)
    made = make_method(method, **parse_pairs(set_, "--set"))
    greedy = Greedy(
        rule=cast(Rule, rule),
        start=cast(Start, start),
        epsilon=epsilon,
        warm_start=warm_start,
        halving=halving,
        candidates=tuple(name.strip() for name in among.split(",")) if among else (),
        stages=stages,
        ends=ends,
    )
    opened = study.open(data, network, training, file)
    result = run_select(
        opened.backbone,
        opened.task,
        made,
        greedy=greedy,
        folds=folds,
        each_round=lambda one: show(console, round_table(one, opened.task.task.name)),
        max_blocks=max_blocks,
        **limits.read(),
        **opened.options,
    )
    show(console, selection_table(result))
    tell(console, opened.kept)
    write_json(json, result.as_dict())
    if plot is not None:
        plot_order(result, plot)
        tell(console, f"drew {plot}")
