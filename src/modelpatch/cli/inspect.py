"""`modelpatch inspect`: show the contents of a patch file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.console import JsonOption, check_pictures, open_console, tell, write_json
from modelpatch.cli.options import ArgumentOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.backbone.chain import Chain
    from modelpatch.methods.delta import SkipWeights
    from modelpatch.patch.contents import Patch


@verb(first="backbone data plot")
def inspect(
    patch: Annotated[Path, typer.Argument(help="The patch file.")],
    plot: Annotated[
        Path | None, typer.Option(help="A picture of the bytes per part, or with --data of the weights of skips.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data of the task, as for eval: measure the weights of a patch's skips, and variances."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            "-b",
            help="The frozen network, to name the segments of every part; own: the one the patch names.",
        ),
    ] = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Show the contents of a patch: hashes, settings, measured figures, and the bytes of every part.

    With `--backbone own` parts are grouped by the segments of the patch's network, which is built without its weights.
    """
    from modelpatch.cli.loading import OWN, backbone_of, find_device
    from modelpatch.patch.contents import Patch
    from modelpatch.report.plots import plot_inspection
    from modelpatch.report.tables import inspection_table, parts_table, show

    console = open_console(json)
    check_pictures(plot=plot)
    loaded = Patch.load(patch)
    arguments = parse_arguments(argument)
    if data is not None:
        from modelpatch.report.skips import check_skips

        check_skips(loaded)
    chain: Chain | None = None
    if backbone == OWN and data is None:
        chain = _structure(loaded, patch, arguments)
    elif backbone is not None or data is not None:
        base = backbone_of(loaded, patch, backbone, arguments, find_device("cpu"))
        chain = base.chain
    inspection = loaded.inspect(chain)
    show(console, inspection_table(inspection))
    console.print()
    show(console, parts_table(inspection))
    if chain is None:
        name = "cannot be built here: name another with --backbone" if backbone else f"names segments: --backbone {OWN}"
        tell(console, f"the backbone {loaded.backbone.spec} {name}")
    figures = inspection.as_dict()
    if data is not None:
        from modelpatch.report.skips import plot_skip_weights, skips_table, variances_table

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
    """The weights of the skips on the test images, the names of their stages, and the number of images."""
    from modelpatch.data.task import load_task
    from modelpatch.report.skips import measure_skips, stage_names
    from modelpatch.train.progress import Progress

    task = load_task(data, hold_out=False)
    with Progress("skips") as bar, bar.task("images", len(task.test)) as advance:
        records = measure_skips(backbone, patch, task.test, advance)
    return records, stage_names(backbone, records), len(task.test)


def _structure(patch: Patch, path: Path, arguments: dict[str, Any]) -> Chain | None:
    """The chain of the patch's own backbone, without downloading its weights; None if it cannot be built."""
    from modelpatch.cli.loading import find_device, locate, open_backbone

    try:
        spec = locate(patch, path)
        if spec.startswith(("timm:", "torchvision:")):
            arguments = {**arguments, "pretrained": False}
        chain = open_backbone(spec, {**patch.backbone.arguments, **arguments}, find_device("cpu")).chain
        patch.blueprint.spans(chain)
    except ModelpatchError:
        return None
    return chain
