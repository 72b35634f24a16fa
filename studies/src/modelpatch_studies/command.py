"""The command `modelpatch-studies`: list the recipes, run some of them, and write their tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from modelpatch.errors import ModelpatchError, TrainingError
from modelpatch_studies.bench import Workbench
from modelpatch_studies.data import Sources
from modelpatch_studies.pages import listing, print_outcome, write_outcome, write_page
from modelpatch_studies.pictures import check_matplotlib
from modelpatch_studies.registry import choose

PIPED_WIDTH = 200  # characters of a line where the output is no terminal
app = typer.Typer(
    name="modelpatch-studies",
    help="Run the tables of the papers behind modelpatch's methods, and check what the papers claim of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("list")
def list_recipes() -> None:
    """List every recipe with its claims and the data sets that each scale needs."""
    _console().print(listing())


@app.command()
def run(
    paper: Annotated[str, typer.Argument(help="A paper by the name that `list` shows, or all.")] = "all",
    table: Annotated[str | None, typer.Option(help="One table of the paper, by the name that `list` shows.")] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="small (minutes on 2 cores), paper (the paper's own settings), or another that `list` shows."
        ),
    ] = "small",
    data: Annotated[Path, typer.Option(help="The folder of data sets, each NAME/ or NAME.tar.")] = Path("data"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write all results to.")] = Path("reproduced"),
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seeds: Annotated[int | None, typer.Option(min=1, help="The number of seeds; by default the scale's.")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="A backbone in place of the scale's.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device to compute on: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Run recipes: print figures, the paper's claims and verdicts; write a folder per table and one page.

    The same command continues an interrupted run: figures in the output folder are not measured again.
    """
    console, recipes = _console(), choose(paper, table, scale)
    check_matplotlib()
    sources = Sources(data, out / "data")
    options: dict[str, Any] = {"seed": seed, "seeds": seeds, "backbone": backbone, "device": _device(device)}
    benches = [Workbench(recipe, scale, sources, progress=True, **options) for recipe in recipes]
    if not data.is_dir():
        raise TrainingError(
            f"--data {data} is not a folder. Expected one that holds the data sets as NAME/ or NAME.tar."
        )
    sources.check({bench.recipe.name: bench.scale.data for bench in benches})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--out {out} cannot be made: {error.strerror}. Name another folder.") from error
    outcomes = []
    for bench in benches:
        try:
            outcome = bench.run(out / bench.recipe.name)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command continues the run", err=True)
            raise typer.Exit(130) from None
        write_outcome(outcome, out / bench.recipe.name)
        print_outcome(console, outcome)
        outcomes.append(outcome)
    console.print(f"wrote {write_page(outcomes, out)}", markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    """Standard output, wide where it is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def _device(name: str) -> torch.device:
    """The device of that name. Raises `TrainingError` for one that this machine lacks."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise TrainingError(
            f"--device {name} is not a device of this machine: {str(error).splitlines()[0]}."
        ) from error
    return device


def main() -> None:
    """Run the command line; end with one line on standard error where modelpatch raised an error of its own."""
    try:
        app()
    except ModelpatchError as error:
        sys.exit(f"error: {error}")
