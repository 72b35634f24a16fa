"""modelpatch fit: train a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelpatch.cli.options import (
    ArgumentOption,
    BackboneOption,
    JsonOption,
    SeedOption,
    open_backbone,
    parse_pairs,
    write_json,
)
from modelpatch.errors import ModelpatchError, PatchError
from modelpatch.methods import METHODS, make_method
from modelpatch.patch.codec import STORAGE
from modelpatch.report.tables import inspection_table
from modelpatch.train import fit as run_fit
from modelpatch.train import load_task, store_as


def fit(
    data: Annotated[str, typer.Argument(help="Class folders, a CSV or parquet manifest, hf:NAME or bundled:digits.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The patch file; by default TASK.safetensors.")
    ] = None,
    backbone: BackboneOption = "bundled:tiny",
    method: Annotated[
        str, typer.Option("--method", "-m", help=f"{', '.join(METHODS)}; joined by + for several in one patch.")
    ] = "scale-bias",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, a hyperparameter of the method (lr=0.003); may be repeated."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    image_size: Annotated[int | None, typer.Option(help="Pixels; by default the backbone's.")] = None,
    seed: SeedOption = 0,
    augment: Annotated[
        str, typer.Option(help="auto, none, light (no flip, for digits and signs) or standard.")
    ] = "auto",
    views: Annotated[int, typer.Option(help="Augmented views an image that are cached after the frozen prefix.")] = 4,
    cache: Annotated[bool, typer.Option(help="Compute the frozen prefix once.")] = True,
    option: Annotated[
        list[str] | None,
        typer.Option("--fit", help="KEY=VALUE, any other setting of fit (label_smoothing=0.1, early_stopping=3, ...)."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="How the file stores numbers: float32, float16, bfloat16 or int8.")
    ] = "float32",
    log: Annotated[Path | None, typer.Option(help="A folder for metrics.csv and TensorBoard events.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an interrupted run instead of resuming it.")
    ] = False,
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Train a patch for a task and measure it on the task's test images.

    An interrupted run resumes exactly when the same command is given again.
    """
    console = Console(stderr=str(json) == "-")
    task = load_task(data, seed=seed)
    path = out or Path(f"{task.task.name}.safetensors")
    if not path.parent.is_dir():
        raise ModelpatchError(f"the folder of --out {path} does not exist. Make it first: mkdir -p {path.parent}")
    if path.is_dir():
        raise ModelpatchError(f"--out {path} is a folder. Name a file: --out {path / task.task.name}.safetensors")
    if dtype not in STORAGE:
        raise PatchError(f"cannot store tensors as --dtype {dtype!r}. Expected one of: {', '.join(STORAGE)}.")
    made = make_method(method, **parse_pairs(set_, "--set"))
    base = open_backbone(backbone, argument)
    checkpoint = path.with_name(path.name + ".training")
    state = checkpoint / "state.pt"
    if restart:
        state.unlink(missing_ok=True)
    if state.exists():
        console.print(f"resuming the interrupted run in {checkpoint}", markup=False)
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": image_size,
        "seed": seed,
        "augment": augment,
        "views": views,
        "cache": cache,
        **parse_pairs(option, "--fit"),
    }
    patch = run_fit(base, task, made, checkpoint=checkpoint, log=log, progress=True, **settings)
    if dtype != "float32":
        patch = store_as(base, patch, task, dtype)
    patch.save(path)
    inspection = patch.inspect()
    console.print(inspection_table(inspection, spans=False))
    console.print(
        f"wrote {path} ({inspection.file_bytes:,} bytes); the base is unchanged (fingerprint {base.fingerprint[:12]})",
        markup=False,
    )
    write_json(json, inspection.as_dict())
