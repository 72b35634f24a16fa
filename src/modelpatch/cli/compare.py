"""`modelpatch compare`: train methods side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import (
    ForceOption,
    JsonOption,
    check_file,
    check_pictures,
    make_folder,
    open_console,
    tell,
    tell_run,
    write_json,
)
from modelpatch.cli.options import DataArgument, Network, Training
from modelpatch.cli.verb import verb
from modelpatch.errors import MethodError

if TYPE_CHECKING:
    from rich.console import Console

    from modelpatch.recipes.comparison import Comparison


@verb(first="methods sweep backbone epochs seeds out", panel="Comparison", config=True)
def compare(
    data: DataArgument,
    network: Network,
    training: Training,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated methods, with + for combinations and hyperparameters as in subset(blocks=last); or all."
        ),
    ] = "all",
    sweep: Annotated[
        str | None,
        typer.Option(help="KEY=V1,V2,...: a hyperparameter and its values; each method is trained at each of them."),
    ] = None,
    base_data: Annotated[
        str | None, typer.Option(help="Data of the base's own classes, to measure its accuracy before and after.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each method; several give standard errors.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A folder for the patches; a repeated command reuses them.")] = None,
    force: ForceOption = False,
    plot: Annotated[Path | None, typer.Option(help="A picture of the bars, or with --sweep the lines.")] = None,
    bytes_plot: Annotated[Path | None, typer.Option(help="A picture of accuracy against file bytes.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="A file for the table as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="A file for table and pictures as one HTML page.")] = None,
    json: JsonOption = None,
) -> None:
    """Train several methods on one task with the same budget and show one table.

    With --out, an interrupted comparison continues when the same command is given again.
    """
    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import COMPARED, make_method, split_outside
    from modelpatch.recipes.comparison import compare as run_compare
    from modelpatch.report.html import write_comparison
    from modelpatch.report.plots import check_matplotlib, plot_bytes, plot_comparison
    from modelpatch.report.tables import comparison_markdown, comparison_table, show

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
    result = run_compare(
        network.open(), task, names, base=base, out=out, reuse=not force, progress=not console.quiet, **settings
    )
    show(console, comparison_table(result))
    write_json(json, result.as_dict())
    if (beside := out or html or markdown or json) is not None and str(beside) != "-":
        tell_run(console, beside)
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
    """The spellings of every method that has the key, at each value. Raises `MethodError` if none has it."""
    from modelpatch.methods.registry import sweep as make_sweep

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
    from modelpatch.methods.registry import split_outside

    if text is None:
        return "", []
    key, _, values = text.partition("=")
    split = [value.strip() for value in split_outside(values, ",") if value.strip()]
    if not key.strip() or len(split) < 2 or len(set(split)) < len(split):
        raise MethodError(f"--sweep {text!r} is not KEY=V1,V2,... with at least two values that differ.")
    return key.strip(), split


def _draw_sweep(result: Comparison, path: Path, key: str, sweeps: dict[str, dict[str, str]]) -> None:
    from modelpatch.report.plots import plot_sweep

    plot_sweep(result, key, sweeps, path)
