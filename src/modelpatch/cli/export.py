"""`modelpatch export`: write a patched model for any runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from typer import Argument, Option

from modelpatch.cli.console import ForceOption, Screen, check_out
from modelpatch.cli.options import AlphaOption, PatchNetwork
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError


@verb(first="form out data")
def export(
    console: Screen,
    network: PatchNetwork,
    patch: Path = Argument(..., help="The patch file."),
    form: str = Option("safetensors", "--format", "-f", help="safetensors, torch-export or onnx."),
    out: Path | None = Option(None, "--out", "-o", help="The file; by default PATCH-model with its suffix."),
    force: ForceOption = False,
    data: str | None = Option(None, help="onnx: data on whose test images to compare onnxruntime and PyTorch."),
    images: int = Option(500, min=1, help="Number of these images, at most."),
    alpha: AlphaOption = None,
) -> None:
    """Write the patched model as an ordinary model: weights for timm, a program for PyTorch, or an ONNX graph."""
    import torch

    from modelpatch.cli.loading import at_alpha, naming
    from modelpatch.convert.exporting import SUFFIXES, check_onnx
    from modelpatch.convert.exporting import export as run_export
    from modelpatch.data.task import load_task
    from modelpatch.patch.contents import Patch

    if data is not None and form != "onnx":
        raise ModelpatchError("--data checks the format onnx. Leave it out, or give --format onnx.")
    path = out or patch.with_name(f"{patch.stem}-model{SUFFIXES.get(form, '')}")
    check_out(path, force)
    loaded = at_alpha(Patch.load(patch), alpha)
    base = network.open(loaded, patch)
    task = None if data is None else load_task(data, hold_out=False)
    with naming(patch):
        run_export(base, loaded, path, form)
    figures: dict[str, Any] = {"out": str(path), "format": form, "bytes": path.stat().st_size}
    console.tell(f"wrote {path} ({figures['bytes']:,} bytes, {form})")
    if task is not None:
        chosen = torch.linspace(0, len(task.test) - 1, min(images, len(task.test))).long().tolist()
        batch = loaded.preprocessing(*(task.test.images[row] for row in chosen))
        agreement = check_onnx(path, base.patched(loaded), batch)
        figures |= asdict(agreement)
        console.tell(
            f"onnxruntime and PyTorch: {agreement.equal_answers} of {agreement.images} answers equal, "
            f"logits differ by at most {agreement.max_difference:.2g}"
        )
        if not agreement.holds:
            console.write_json(figures)
            raise ModelpatchError(f"{path} does not answer as the patched model does; do not use it.")
    console.write_json(figures)
