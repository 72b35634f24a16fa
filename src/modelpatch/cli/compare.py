"""modelpatch compare: methods side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

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
from modelpatch.methods import COMPARED
from modelpatch.methods.registry import split_outside
from modelpatch.report.html import write_comparison
from modelpatch.report.plots import plot_bytes, plot_comparison
from modelpatch.report.tables import comparison_markdown, comparison_table
from modelpatch.train import compare as run_compare
from modelpatch.train import load_task


def compare(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated names, with hyperparameters in brackets and + for combinations, or 'all'."),
    ] = "all",
    backbone: BackboneOption = "bundled:tiny",
    base_data: Annotated[
        str | None, typer.Option(help="Data of the base's own classes: its accuracy before and after.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images, equal for all methods.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    image_size: Annotated[int | None, typer.Option(help="Pixels; by default the backbone's.")] = None,
    seed: SeedOption = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Fits a method, with this many seeds; gives standard errors.")] = 1,
    option: Annotated[list[str] | None, typer.Option("--fit", help="KEY=VALUE, any other setting of fit.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder in which to keep the patches.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the bars to this picture.")] = None,
    bytes_plot: Annotated[Path | None, typer.Option(help="Draw accuracy against file bytes to this picture.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write table and pictures as one HTML page.")] = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Train several methods on one task with the same budget and show one table."""
    console = Console(stderr=str(json) == "-")
    names = COMPARED if methods == "all" else split_outside(methods, ",")
    task = load_task(data, seed=seed)
    base = None if base_data is None else load_task(base_data, hold_out=False)
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": image_size,
        "seed": seed,
        "seeds": seeds,
    }
    settings |= parse_pairs(option, "--fit")
    result = run_compare(open_backbone(backbone, argument), task, names, base=base, progress=True, **settings)
    console.print(comparison_table(result))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, patch in result.patches.items():
            patch.save(out / f"{task.task.name}-{re.sub(r'[^a-z0-9.+-]+', '-', name).strip('-')}.safetensors")
    for picture, draw in ((plot, plot_comparison), (bytes_plot, plot_bytes)):
        if picture is not None:
            draw(result, picture)
            console.print(f"drew {picture}", markup=False)
    if html is not None:
        write_comparison(result, html)
        console.print(f"wrote {html}", markup=False)
    if markdown is not None:
        write_bytes(markdown, comparison_markdown(result).encode())
    write_json(json, result.as_dict())
