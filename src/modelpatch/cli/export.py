"""`modelpatch export`: write a patched model for any runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.console import ForceOption, JsonOption, check_file, check_free, open_console, tell, write_json
from modelpatch.cli.options import AlphaOption, ArgumentOption, PatchBackboneOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    pass


@verb(first="form out data")
def export(
    patch: Annotated[Path, typer.Argument(help="The patch file.")],
    form: Annotated[str, typer.Option("--format", "-f", help="safetensors, torch-export or onnx.")] = "safetensors",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; by default PATCH-model with its suffix.")
    ] = None,
    force: ForceOption = False,
    data: Annotated[
        str | None,
        typer.Option(help="onnx: data whose test images are answered by onnxruntime and PyTorch, to compare them."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of these images, at most.")] = 500,
    alpha: AlphaOption = None,
    backbone: PatchBackboneOption = None,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Write the patched model as an ordinary model: weights for timm, a program for PyTorch, or an ONNX graph."""
    import torch

    from modelpatch.cli.loading import at_alpha, backbone_of, naming
    from modelpatch.convert.exporting import SUFFIXES, check_onnx
    from modelpatch.convert.exporting import export as run_export
    from modelpatch.data.task import load_task
    from modelpatch.patch.contents import Patch

    console = open_console(json)
    if data is not None and form != "onnx":
        raise ModelpatchError("--data checks the format onnx. Leave it out, or give --format onnx.")
    path = out or patch.with_name(f"{patch.stem}-model{SUFFIXES.get(form, '')}")
    check_file("--out", path)
    check_free("--out", [path], force)
    loaded = at_alpha(Patch.load(patch), alpha)
    base = backbone_of(loaded, patch, backbone, parse_arguments(argument), torch.device("cpu"))
    task = None if data is None else load_task(data, hold_out=False)
    with naming(patch):
        run_export(base, loaded, path, form)
    size = path.stat().st_size
    tell(console, f"wrote {path} ({size:,} bytes, {form})")
    figures: dict[str, Any] = {"out": str(path), "format": form, "bytes": size}
    if task is not None:
        chosen = torch.linspace(0, len(task.test) - 1, min(images, len(task.test))).long().tolist()
        batch = loaded.preprocessing(*(task.test.images[row] for row in chosen))
        agreement = check_onnx(path, base.patched(loaded), batch)
        figures |= asdict(agreement)
        tell(
            console,
            f"onnxruntime and PyTorch: {agreement.equal_answers} of {agreement.images} answers equal, logits differ by at "
            f"most {agreement.max_difference:.2g}",
        )
        if not agreement.holds:
            write_json(json, figures)
            raise ModelpatchError(f"{path} does not answer as the patched model does; do not use it.")
    write_json(json, figures)
