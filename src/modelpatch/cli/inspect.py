"""`modelpatch inspect`: show the contents of a patch file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from modelpatch.cli.console import Screen
from modelpatch.cli.options import ArgumentOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from modelpatch.backbone.chain import Chain
    from modelpatch.patch.contents import Patch


@verb(first="backbone data plot")
def inspect(
    console: Screen,
    patch: Path = Argument(..., help="The patch file."),
    plot: Path | None = Option(None, help="A picture of the bytes per part, or with --data of the weights of skips."),
    data: str | None = Option(None, help="The task's data, as for eval: measure the weights of skips, and variances."),
    backbone: str | None = Option(None, "--backbone", "-b", help="The network, to name segments; own: the patch's."),
    argument: ArgumentOption = None,
) -> None:
    """Show the contents of a patch: hashes, settings, measured figures, and the bytes of every part.

    With `--backbone own` parts are grouped by the segments of the patch's network, which is built without its weights.
    """
    from modelpatch.cli.loading import OWN, backbone_of, find_device
    from modelpatch.patch.contents import Patch
    from modelpatch.report.plots import plot_inspection
    from modelpatch.report.tables import inspection_table, parts_table

    loaded = Patch.load(patch)
    arguments = parse_arguments(argument)
    if data is not None:
        import modelpatch.report.skips as skips
        from modelpatch.data.task import load_task

        skips.check_skips(loaded)
    chain: Chain | None = None
    if backbone == OWN and data is None:
        chain = _structure(loaded, patch, arguments)
    elif backbone is not None or data is not None:
        base = backbone_of(loaded, patch, backbone, arguments, find_device("cpu"))
        chain = base.chain
    inspection = loaded.inspect(chain)
    console.show(inspection_table(inspection), parts_table(inspection))
    if chain is None:
        name = "cannot be built here: name another with --backbone" if backbone else f"names segments: --backbone {OWN}"
        console.tell(f"the backbone {loaded.backbone.spec} {name}")
    figures = inspection.as_dict()
    if data is not None:
        task = load_task(data, hold_out=False)
        with console.progress("skips") as bar, bar.task("images", len(task.test)) as advance:
            records = skips.measure_skips(base, loaded, task.test, advance)
        names = skips.stage_names(base, records)
        console.print()
        console.show(skips.skips_table(records, names), skips.variances_table(records, names))
        figures["skips"] = [{"stage": name, **one.as_dict()} for name, one in zip(names, records, strict=True)]
        title = f"{loaded.task.name}: weights of the skips over {len(task.test)} images"
    console.write_json(figures)
    console.draw(
        plot, *((plot_inspection, inspection) if data is None else (skips.plot_skip_weights, records, names, title))
    )


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
