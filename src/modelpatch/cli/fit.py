"""modelpatch fit: train a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelpatch.cli.options import (
    ArgumentOption,
    BackboneOption,
    DeviceOption,
    SeedOption,
    find_device,
    fit_settings,
    open_backbone,
    parse_arguments,
    parse_pairs,
)
from modelpatch.cli.outputs import (
    ForceOption,
    JsonOption,
    check_file,
    check_free,
    make_folder,
    open_console,
    tell,
    write_json,
)
from modelpatch.methods import METHODS, make_method
from modelpatch.report.tables import inspection_table, show
from modelpatch.train import fit as run_fit
from modelpatch.train import load_task


def fit(
    data: Annotated[str, typer.Argument(help="Class folders, a CSV or parquet manifest, hf:NAME or bundled:digits.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The patch file; by default TASK.safetensors.")
    ] = None,
    force: ForceOption = False,
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
        str,
        typer.Option(
            help="How the file stores numbers: float32, float16, bfloat16, or int8 (matrices only; vectors stay float32)."
        ),
    ] = "float32",
    log: Annotated[Path | None, typer.Option(help="A folder for metrics.csv and TensorBoard events.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an interrupted run instead of resuming it.")
    ] = False,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Train a patch for a task and measure it on the task's test images.

    An interrupted run resumes exactly when the same command is given again.
    """
    console = open_console(json)
    check_file("--json", json)
    if out is not None:
        check_file("--out", out)
    if log is not None:
        make_folder("--log", log)
    made = make_method(method, **parse_pairs(set_, "--set"))
    settings = fit_settings(
        option,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        seed=seed,
        augment=augment,
        views=views,
        cache=cache,
        dtype=dtype,
    )
    arguments, place = parse_arguments(argument), find_device(device)
    task = load_task(data, seed=seed)
    path = out or Path(f"{task.task.name}.safetensors")
    check_file("--out", path)
    check_free("--out", [path], force)
    base = open_backbone(backbone, arguments, place)
    checkpoint = path.with_name(path.name + ".training")
    state = checkpoint / "state.pt"
    if restart:
        state.unlink(missing_ok=True)
    if state.exists():
        tell(console, f"resuming the interrupted run in {checkpoint}")
    try:
        patch = run_fit(base, task, made, out=path, checkpoint=checkpoint, log=log, progress=True, **settings)
    except KeyboardInterrupt:
        if not state.exists():
            raise
        raise KeyboardInterrupt("the run resumes when the same command is given again") from None
    inspection = patch.inspect()
    show(console, inspection_table(inspection))
    tell(
        console,
        f"wrote {path} ({inspection.file_bytes:,} bytes); the base is unchanged (fingerprint {base.fingerprint[:12]})",
    )
    write_json(json, inspection.as_dict())
