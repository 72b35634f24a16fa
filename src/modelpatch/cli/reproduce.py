"""modelpatch reproduce: the papers' tables, at a small scale or at their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from modelpatch.cli.options import DeviceOption, SeedOption, find_device
from modelpatch.cli.outputs import make_folder, open_console, tell
from modelpatch.errors import TrainingError
from modelpatch.report.plots import check_matplotlib
from modelpatch.report.tables import NAME_WIDTH, new_table, show
from modelpatch.reproduce.bench import Bench
from modelpatch.reproduce.data import Sources
from modelpatch.reproduce.pages import settings_line, terminal_tables, write_outcome, write_page
from modelpatch.reproduce.registry import RECIPES, choose


def reproduce(
    paper: Annotated[str, typer.Argument(help="The paper whose tables to make, or all; --list names them.")] = "all",
    table: Annotated[str | None, typer.Option(help="One of the paper's tables, as --list names it.")] = None,
    scale: Annotated[
        str, typer.Option(help="small (minutes on 2 cores) or paper (the paper's own settings).")
    ] = "small",
    data: Annotated[Path, typer.Option(help="The folder with the data sets, as NAME/ or NAME.tar.")] = Path("data"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of all results.")] = Path("reproduced"),
    seed: SeedOption = 0,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each figure; by default the scale's.")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="A backbone in place of the scale's.")
    ] = None,
    device: DeviceOption = "cpu",
    list_: Annotated[bool, typer.Option("--list", help="Name all recipes with what they need, and stop.")] = False,
) -> None:
    """Make tables of the papers behind the methods: our figures, what the paper claims, and whether it holds here.

    Writes a folder a table (JSON, Markdown, a picture) and one page. An interrupted run goes on when the same command is
    given again: figures that are in the folder are not made anew.
    """
    console = open_console()
    if list_:
        show(console, _listing())
        return
    recipes = choose(paper, table)
    check_matplotlib("modelpatch reproduce")
    sources = Sources(data, out / "data")
    options: dict[str, Any] = {"seed": seed, "seeds": seeds, "backbone": backbone, "device": find_device(device)}
    benches = [Bench(recipe, scale, sources, progress=True, **options) for recipe in recipes]
    if not data.is_dir():
        raise TrainingError(f"--data {data} is no folder. Name the one that holds the data sets, as NAME/ or NAME.tar.")
    sources.check({bench.recipe.name: bench.scale.data for bench in benches})
    make_folder("--out", out)
    outcomes = []
    for bench in benches:
        try:
            outcome = bench.run(out / bench.recipe.name)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the run goes on when the same command is given again") from None
        write_outcome(outcome, out / bench.recipe.name)
        outcomes.append(outcome)
        tell(console, f"{outcome.recipe.name}: {outcome.recipe.title}")
        for one in terminal_tables(outcome):
            show(console, one)
        tell(console, f"{settings_line(outcome)}\n")
    tell(console, f"wrote {write_page(outcomes, out)}")


def _listing() -> Any:
    """Every recipe with its claims and the data of its small scale."""
    listed = new_table("recipes")
    for column in ("paper", "table", "what", "claims", "data at small scale", "at the paper's"):
        listed.add_column(column, overflow="fold", min_width=NAME_WIDTH if column == "table" else None)
    for recipe in RECIPES:
        claims = ", ".join(dict.fromkeys(claim.name for claim in recipe.claims))
        needed = [", ".join(recipe.scales[scale].data) for scale in ("small", "paper")]
        listed.add_row(*map(escape, (recipe.paper, recipe.table, recipe.title, claims, *needed)))
    return listed
