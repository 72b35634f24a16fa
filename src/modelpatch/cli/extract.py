"""`modelpatch extract`: turn a fine-tuned checkpoint into a patch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from typer import Option

from modelpatch.cli.console import ForceOption, Screen, check_out, read_names
from modelpatch.cli.options import ArgumentOption, DeviceOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError


@verb(first="base finetuned out codec data", panel="Extraction")
def extract(
    console: Screen,
    base: str = Option(..., "--base", "--backbone", "-b", help="The network, with its weights before fine-tuning."),
    finetuned: Path = Option(..., help="The checkpoint: safetensors, or a .pth of tensors; no other pickle is read."),
    out: Path | None = Option(None, "--out", "-o", help="The patch file; by default CHECKPOINT.patch.safetensors."),
    force: ForceOption = False,
    codec: str = Option("float16", help="Coding: exact, float16, bfloat16, int8, sign, two-bit or low-rank."),
    rank: int = Option(8, help="Rank of low-rank differences."),
    data: str | None = Option(None, help="The task's data, as for fit: measure every codec on its test images."),
    calibrate: int = Option(200, min=0, help="With --data: steps that learn the scales of sign on training images."),
    classes: str | None = Option(None, help="Names of the head's outputs, comma-separated, or a file with one a line."),
    image_size: int | None = Option(None, help="Pixels of the checkpoint's images; by default the backbone's."),
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
) -> None:
    """Turn an existing fine-tuned checkpoint into a patch of the base it started from.

    With --data every codec is measured, and the patch of --codec written with its accuracy.
    """
    from modelpatch.cli.loading import find_device, open_backbone
    from modelpatch.convert.extraction import DELTA_CODECS, read_checkpoint
    from modelpatch.convert.extraction import extract as run_extract
    from modelpatch.data.task import load_task
    from modelpatch.report.codecs import CALIBRATED, SIZED, codec_table, compare_codecs
    from modelpatch.report.tables import inspection_table

    path = out or finetuned.with_name(f"{finetuned.stem}.patch.safetensors")
    check_out(path, force)
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
        run_extract(backbone, state, codec=codec, classes=task.classes, **options)  # refuses a wrong checkpoint at once
        total = len(DELTA_CODECS) + len(SIZED) * bool(calibrate)
        with console.progress("extract") as bar, bar.task("codecs", total) as advance:
            rows, patches = compare_codecs(backbone, state, task, advance=advance, calibration=calibrate, **options)
        patch = patches[f"{codec}{CALIBRATED}" if codec in SIZED and calibrate else codec]
        console.show(codec_table(f"{task.task.name}: {finetuned.name} over {backbone.spec}", rows))
        console.print()
        figures = [asdict(row) for row in rows]
    patch.save(path)
    inspection = patch.inspect()
    console.show(inspection_table(inspection))
    console.tell(f"wrote {path} ({inspection.file_bytes:,} bytes)")
    console.write_json({**inspection.as_dict(), "codecs": figures})
