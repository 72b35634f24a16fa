"""modelpatch compare: methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelpatch.atomic import write_bytes
from modelpatch.cli.options import (
    ArgumentOption,
    BackboneOption,
    JsonOption,
    SeedOption,
    open_backbone,
    parse_pairs,
    write_json,
)
from modelpatch.methods import METHODS
from modelpatch.report.plots import plot_comparison
from modelpatch.report.tables import comparison_markdown, comparison_table
from modelpatch.train import compare as run_compare
from modelpatch.train import load_task


def compare(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    methods: Annotated[str, typer.Option(help="Comma-separated names, or 'all'.")] = "all",
    backbone: BackboneOption = "bundled:tiny",
    base_data: Annotated[
        str | None, typer.Option(help="Data of the base's own classes: its accuracy before and after.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images, equal for all methods.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    image_size: Annotated[int | None, typer.Option(help="Pixels; by default the backbone's.")] = None,
    seed: SeedOption = 0,
    option: Annotated[list[str] | None, typer.Option("--fit", help="KEY=VALUE, any other setting of fit.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder in which to keep the patches.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the bars to this picture.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Train several methods on one task with the same budget and show one table."""
    console = Console(stderr=str(json) == "-")
    names = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    task = load_task(data, seed=seed)
    base = None if base_data is None else load_task(base_data, hold_out=False)
    settings = {"epochs": epochs, "batch_size": batch_size, "image_size": image_size, "seed": seed}
    settings |= parse_pairs(option, "--fit")
    result = run_compare(open_backbone(backbone, argument), task, names, base=base, progress=True, **settings)
    console.print(comparison_table(result))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, patch in result.patches.items():
            patch.save(out / f"{task.task.name}-{name}.safetensors")
    if plot is not None:
        plot_comparison(result, plot)
        console.print(f"drew {plot}", markup=False)
    if markdown is not None:
        write_bytes(markdown, comparison_markdown(result).encode())
    write_json(json, result.as_dict())
