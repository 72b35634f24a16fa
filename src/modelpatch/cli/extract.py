"""`modelpatch extract`: turn a fine-tuned checkpoint into a patch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.console import (
    ForceOption,
    JsonOption,
    check_file,
    check_free,
    open_console,
    progress_of,
    read_names,
    tell,
    write_json,
)
from modelpatch.cli.options import ArgumentOption, DeviceOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    pass


@verb(first="base finetuned out codec data", panel="Extraction")
def extract(
    base: Annotated[
        str,
        typer.Option(
            "--base", "--backbone", "-b", help="The network that was fine-tuned, with its weights before fine-tuning."
        ),
    ],
    finetuned: Annotated[
        Path,
        typer.Option(help="The fine-tuned checkpoint: safetensors, or a .pth of tensors; no other pickle is read."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The patch file; by default CHECKPOINT.patch.safetensors.")
    ] = None,
    force: ForceOption = False,
    codec: Annotated[
        str, typer.Option(help="Coding of the differences: exact, float16, bfloat16, int8, sign, two-bit or low-rank.")
    ] = "float16",
    rank: Annotated[int, typer.Option(help="Rank of low-rank differences.")] = 8,
    data: Annotated[
        str | None, typer.Option(help="The task's data, as for fit: measure every codec on its test images.")
    ] = None,
    calibrate: Annotated[
        int, typer.Option(min=0, help="With --data: steps in which the scales of sign are learned on training images.")
    ] = 200,
    classes: Annotated[
        str | None, typer.Option(help="Names of the head's outputs, comma-separated, or a file with one a line.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of the checkpoint's images; by default the backbone's.")
    ] = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Turn an existing fine-tuned checkpoint into a patch of the base it started from.

    With --data every codec is measured, and the patch of --codec written with its accuracy.
    """
    from modelpatch.cli.loading import find_device, open_backbone
    from modelpatch.convert.checkpoint import read_checkpoint
    from modelpatch.convert.extraction import DELTA_CODECS
    from modelpatch.convert.extraction import extract as run_extract
    from modelpatch.data.task import load_task
    from modelpatch.report.codecs import CALIBRATED, SIZED, codec_figures, codec_table, compare_codecs
    from modelpatch.report.tables import inspection_table, show

    console = open_console(json)
    path = out or finetuned.with_name(f"{finetuned.stem}.patch.safetensors")
    check_file("--out", path)
    check_free("--out", [path], force)
    names = read_names("--classes", classes)
    if names and data is not None:
        raise ModelpatchError("--classes and --data both name the head's outputs. Give one of them.")
    task = None if data is None else load_task(data)
    state = read_checkpoint(finetuned)
    backbone = open_backbone(base, parse_arguments(argument), find_device(device))
    options: dict[str, Any] = {"rank": rank, "image_size": image_size}
    figures = []
    if task is None:
        patch = run_extract(backbone, state, codec=codec, name=finetuned.stem, classes=names, **options)
    else:
        run_extract(
            backbone, state, codec=codec, classes=task.classes, **options
        )  # fails at once for a wrong checkpoint
        with (
            progress_of(console, "extract") as bar,
            bar.task("codecs", len(DELTA_CODECS) + len(SIZED) * bool(calibrate)) as advance,
        ):
            rows, patches = compare_codecs(backbone, state, task, advance=advance, calibration=calibrate, **options)
        patch = patches[f"{codec}{CALIBRATED}" if codec in SIZED and calibrate else codec]
        show(console, codec_table(f"{task.task.name}: {finetuned.name} over {backbone.spec}", rows))
        console.print()
        figures = codec_figures(rows)
    patch.save(path)
    inspection = patch.inspect()
    show(console, inspection_table(inspection))
    tell(console, f"wrote {path} ({inspection.file_bytes:,} bytes)")
    write_json(json, {**inspection.as_dict(), "codecs": figures})
