"""modelpatch inspect: what a patch file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modelpatch.cli.options import JsonOption, PatchBackboneOption, backbone_of, write_json
from modelpatch.errors import ModelpatchError
from modelpatch.patch import Patch
from modelpatch.report.plots import plot_inspection
from modelpatch.report.skips import check_skips, measure_skips, plot_skip_weights, skips_table, stage_names
from modelpatch.report.tables import inspection_table
from modelpatch.train import load_task
from modelpatch.train.progress import Progress


def inspect(
    patch: Annotated[Path, typer.Argument(help="The patch file.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw bytes per part, or with --data the weights of skips, to this picture.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data of the task, as for eval: measure what a `delta` patch weighs its skips.")
    ] = None,
    backbone: PatchBackboneOption = None,
    json: JsonOption = None,
) -> None:
    """Show what a patch holds: per span, bytes, hashes, settings and measured figures. Needs no backbone without --data."""
    console = Console(stderr=str(json) == "-")
    if backbone is not None and data is None:
        raise ModelpatchError("--backbone is only used to measure skips: give --data too, or leave it out.")
    loaded = Patch.load(patch)
    if data is not None:
        check_skips(loaded)
    inspection = loaded.inspect()
    console.print(inspection_table(inspection))
    figures = inspection.as_dict()
    if data is not None:
        figures["skips"] = _show_skips(console, loaded, patch, data, backbone, plot)
    elif plot is not None:
        plot_inspection(inspection, plot)
    if plot is not None:
        console.print(f"drew {plot}", markup=False)
    write_json(json, figures)


def _show_skips(
    console: Console, patch: Patch, path: Path, data: str, spec: str | None, plot: Path | None
) -> list[dict[str, Any]]:
    """Measure the weights of the skips on the test images, print and draw them. Returns them for JSON."""
    backbone = backbone_of(patch, path, spec)
    task = load_task(data, hold_out=False)
    with Progress("skips") as bar, bar.task("images", len(task.test)) as advance:
        records = measure_skips(backbone, patch, task.test, advance)
    names = stage_names(backbone, records)
    console.print(skips_table(records, names))
    if plot is not None:
        title = f"{patch.task.name}: weights of the skips over {len(task.test)} images"
        plot_skip_weights(records, names, title, plot)
    return [{"stage": name, **record.as_dict()} for name, record in zip(names, records, strict=True)]
