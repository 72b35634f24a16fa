"""`modelpatch search`: find the best patch within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelpatch.cli.console import JsonOption, check_pictures, open_console, tell, write_json
from modelpatch.cli.options import DataArgument, Network, PatchFile, Training
from modelpatch.cli.study import FoldsOption, HalvingOption, Limits, Study
from modelpatch.cli.verb import verb


@verb(first="methods max_bytes max_latency tries backbone epochs out", panel="Search", config=True)
def search(
    data: DataArgument,
    network: Network,
    training: Training,
    study: Study,
    file: PatchFile,
    limits: Limits,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods to choose among, with hyperparameters as in subset(blocks=last); by default "
            "those that suit a budget."
        ),
    ] = None,
    tries: Annotated[int, typer.Option(min=1, help="Proposals to train at most.")] = 48,
    halving: HalvingOption = 3,
    folds: FoldsOption = 1,
    plot: Annotated[Path | None, typer.Option(help="A picture of accuracy, bytes and time.")] = None,
    json: JsonOption = None,
) -> None:
    """Choose method, blocks and settings by validation, within limits, and train the best patch that keeps them.

    An interrupted search goes on when the same command is given again.
    """
    from modelpatch.methods.registry import split_outside
    from modelpatch.report.search import left_out_table, plot_search, search_table
    from modelpatch.report.tables import percent, show
    from modelpatch.select.budget import added_latency
    from modelpatch.select.searching import search as run_search

    console = open_console(json)
    check_pictures(plot=plot)
    limits.warn(console)
    opened = study.open(data, network, training, file)
    result = run_search(
        opened.backbone,
        opened.task,
        None if methods is None else split_outside(methods, ","),
        **limits.read(),
        tries=tries,
        folds=folds,
        halving=halving,
        **opened.options,
    )
    if result.left_out:
        show(console, left_out_table(result))
    show(console, search_table(result))
    patch = result.patch
    added = added_latency(opened.backbone, patch, limit=result.budget.latency)
    tell(
        console, f"{result.chosen.name}: {percent(patch.metrics['test_top1'])} % of the test images, +{added:.1%} time"
    )
    tell(console, opened.kept)
    write_json(json, {**result.as_dict(), "file_bytes": patch.inspect().file_bytes, "added_latency": added})
    if plot is not None:
        plot_search(result, plot)
        tell(console, f"drew {plot}")
