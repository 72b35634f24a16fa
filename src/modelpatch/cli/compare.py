"""modelpatch compare: methods side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelpatch.atomic import write_bytes
from modelpatch.cli.grouped import grouped
from modelpatch.cli.options import Network, Training
from modelpatch.cli.outputs import (
    ForceOption,
    JsonOption,
    check_file,
    check_pictures,
    make_folder,
    open_console,
    tell,
    write_json,
)
from modelpatch.data.task import load_task
from modelpatch.errors import MethodError
from modelpatch.methods.registry import COMPARED, make_method, split_outside
from modelpatch.methods.registry import sweep as make_sweep
from modelpatch.recipes import compare as run_compare
from modelpatch.recipes.comparison import Comparison
from modelpatch.report.html import write_comparison
from modelpatch.report.plots import check_matplotlib, plot_bytes, plot_comparison, plot_sweep
from modelpatch.report.tables import comparison_markdown, comparison_table, show


@grouped
def compare(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    network: Network,
    training: Training,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated names, 'all', combinations with +, hyperparameters as in subset(blocks=last)."
        ),
    ] = "all",
    sweep: Annotated[
        str | None, typer.Option(help="KEY=V1,V2,...: every method with a hyperparameter at each of these values.")
    ] = None,
    base_data: Annotated[
        str | None, typer.Option(help="Data of the base's own classes: its accuracy before and after.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fits a method, with this many seeds; gives standard errors.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A folder in which to keep the patches.")] = None,
    force: ForceOption = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the bars, or with --sweep the lines, to this picture.")
    ] = None,
    bytes_plot: Annotated[Path | None, typer.Option(help="Draw accuracy against file bytes to this picture.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write table and pictures as one HTML page.")] = None,
    json: JsonOption = None,
) -> None:
    """Train several methods on one task with the same budget and show one table.

    With --out, an interrupted comparison goes on where it was when the same command is given again.
    """
    console = open_console(json)
    for name, path in (("--markdown", markdown), ("--html", html)):
        check_file(name, path)
    check_pictures(plot=plot, bytes_plot=bytes_plot)
    if html is not None:
        check_matplotlib("--html")
    names = list(COMPARED) if methods == "all" else split_outside(methods, ",")
    key, values = _read_sweep(sweep)
    sweeps = _sweeps(names, key, values, console) if values else {}
    names = [spelled for name in names for spelled in sweeps.get(name, {name: name}).values()]
    for name in names:
        make_method(name)
    settings = training.settings(seeds=seeds)
    task = load_task(data, seed=training.seed)
    base = None if base_data is None else load_task(base_data, hold_out=False)
    if out is not None:
        make_folder("--out", out)
    result = run_compare(network.open(), task, names, base=base, out=out, reuse=not force, progress=True, **settings)
    show(console, comparison_table(result))
    write_json(json, result.as_dict())
    if markdown is not None:
        write_bytes(markdown, comparison_markdown(result).encode())
        tell(console, f"wrote {markdown}")
    draw_plot = partial(_draw_sweep, key=key, sweeps=sweeps) if sweeps else plot_comparison
    for picture, draw in ((plot, draw_plot), (bytes_plot, plot_bytes)):
        if picture is not None:
            draw(result, picture)
            tell(console, f"drew {picture}")
    if html is not None:
        write_comparison(result, html)
        tell(console, f"wrote {html}")


def _sweeps(names: list[str], key: str, values: list[str], console: Console) -> dict[str, dict[str, str]]:
    """The spellings of every method that has the key, at each value. Raises `MethodError` where none has it."""
    sweeps: dict[str, dict[str, str]] = {}
    refused: dict[str, MethodError] = {}
    for name in names:
        try:
            sweeps[name] = make_sweep(name, key, values)
        except MethodError as error:
            refused[name] = error
    if not sweeps:
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        tell(console, f"{name} is compared as it is: {reason}")
    return sweeps


def _read_sweep(text: str | None) -> tuple[str, list[str]]:
    """The key and the values of --sweep; none of either without it. Raises `MethodError`."""
    if text is None:
        return "", []
    key, _, values = text.partition("=")
    split = [value.strip() for value in split_outside(values, ",") if value.strip()]
    if not key.strip() or len(split) < 2 or len(set(split)) < len(split):
        raise MethodError(f"--sweep {text!r} is not KEY=V1,V2,... with at least two values that differ.")
    return key.strip(), split


def _draw_sweep(result: Comparison, path: Path, key: str, sweeps: dict[str, dict[str, str]]) -> None:
    plot_sweep(result, key, sweeps, path)
