"""modelpatch inspect: what a patch file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain
from modelpatch.cli.options import (
    ArgumentOption,
    PatchBackboneOption,
    backbone_of,
    locate,
    open_backbone,
    parse_arguments,
)
from modelpatch.cli.outputs import JsonOption, check_pictures, open_console, tell, write_json
from modelpatch.data.task import load_task
from modelpatch.errors import ModelpatchError
from modelpatch.methods.delta import SkipWeights
from modelpatch.patch.contents import Patch
from modelpatch.patch.inspect import Inspection
from modelpatch.report.plots import plot_inspection
from modelpatch.report.skips import (
    check_skips,
    measure_skips,
    plot_skip_weights,
    skips_table,
    stage_names,
    variances_table,
)
from modelpatch.report.tables import inspection_table, parts_table, show
from modelpatch.train.progress import Progress

CPU = torch.device("cpu")


def inspect(
    patch: Annotated[Path, typer.Argument(help="The patch file.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw bytes per part, or with --data the weights of skips, to this picture.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data of the task, as for eval: measure the weights a `delta` patch gives its skips, and variances."
        ),
    ] = None,
    backbone: PatchBackboneOption = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Show what a patch holds: per span, bytes, hashes, settings and measured figures.

    Reads no backbone's weights without --backbone or --data: the spans follow from the network's structure alone.
    """
    console = open_console(json)
    check_pictures(plot=plot)
    loaded = Patch.load(patch)
    arguments = parse_arguments(argument)
    if data is not None:
        check_skips(loaded)
    if backbone is not None or data is not None:
        base = backbone_of(loaded, patch, backbone, arguments, CPU)
        chain: Chain | None = base.chain
    else:
        chain = _structure(loaded, patch, arguments)
    inspection = Inspection.of(loaded, chain)
    show(console, inspection_table(inspection))
    console.print()
    show(console, parts_table(inspection))
    if chain is None:
        tell(console, "which segments these are is known with the backbone: name it with --backbone")
    figures = inspection.as_dict()
    if data is not None:
        records, names, images = _measure_skips(loaded, base, data)
        console.print()
        show(console, skips_table(records, names))
        console.print()
        show(console, variances_table(records, names))
        figures["skips"] = [{"stage": name, **one.as_dict()} for name, one in zip(names, records, strict=True)]
    write_json(json, figures)
    if plot is not None:
        if data is not None:
            plot_skip_weights(records, names, f"{loaded.task.name}: weights of the skips over {images} images", plot)
        else:
            plot_inspection(inspection, plot)
        tell(console, f"drew {plot}")


def _measure_skips(patch: Patch, backbone: Backbone, data: str) -> tuple[list[SkipWeights], list[str], int]:
    """The weights of the skips on the test images, what the network calls their stages, and the number of images."""
    task = load_task(data, hold_out=False)
    with Progress("skips") as bar, bar.task("images", len(task.test)) as advance:
        records = measure_skips(backbone, patch, task.test, advance)
    return records, stage_names(backbone, records), len(task.test)


def _structure(patch: Patch, path: Path, arguments: dict[str, Any]) -> Chain | None:
    """The chain of the patch's own backbone, without downloading its weights; None where it cannot be built here."""
    try:
        spec = locate(patch, path)
        if spec.startswith(("timm:", "torchvision:")):
            arguments = {**arguments, "pretrained": False}
        chain = open_backbone(spec, {**patch.backbone.arguments, **arguments}, CPU).chain
        patch.blueprint.spans(chain)
    except ModelpatchError:
        return None
    return chain
