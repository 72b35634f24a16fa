"""modelpatch fit: train a patch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from modelpatch.cli.grouped import grouped
from modelpatch.cli.options import Asked, Cluster, Network, PatchFile, RestartOption, SetOption, Training, parse_pairs
from modelpatch.cli.outputs import JsonOption, make_folder, open_console, resumable, tell, write_json
from modelpatch.methods.registry import METHODS, make_method
from modelpatch.report.tables import inspection_table, show
from modelpatch.train import fit as run_fit
from modelpatch.train.distributed import joined


@grouped
def fit(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Class folders, a CSV or parquet manifest, hf:NAME or bundled:digits; images with masks or boxes, see docs. "
            "Several: one task over all their classes."
        ),
    ],
    network: Network,
    training: Training,
    asked: Asked,
    file: PatchFile,
    cluster: Cluster,
    method: Annotated[
        str, typer.Option("--method", "-m", help=f"{', '.join(METHODS)}; joined by + for several in one patch.")
    ] = "scale-bias",
    set_: SetOption = None,
    augment: Annotated[
        str, typer.Option(help="auto, none, light (no flip, for digits and signs) or standard.")
    ] = "auto",
    views: Annotated[int, typer.Option(help="Augmented views an image that are cached after the frozen prefix.")] = 4,
    cache: Annotated[bool, typer.Option(help="Compute the frozen prefix once.")] = True,
    dtype: Annotated[
        str,
        typer.Option(
            help="How the file stores numbers: float32, float16, bfloat16, or int8 (matrices only; vectors stay float32)."
        ),
    ] = "float32",
    log: Annotated[Path | None, typer.Option(help="A folder for metrics.csv and TensorBoard events.")] = None,
    restart: RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Train a patch for a task and measure it on the task's test images.

    An interrupted run resumes exactly when the same command is given again. Under torchrun processes share the batches.
    """
    with joined() as team:
        console = open_console(json, quiet=not team.leads)
        if log is not None:
            make_folder("--log", log)
        made = make_method(method, **parse_pairs(set_, "--set"))
        settings = training.settings(augment=augment, views=views, cache=cache, dtype=dtype)
        task = asked.load(data, training.seed)
        path = file.path(task.task.name)
        base = network.open()
        checkpoint = path.with_name(path.name + ".training")
        with resumable(console, checkpoint, restart):
            work = partial(run_fit, base, task, made, out=path, checkpoint=checkpoint, log=log, progress=True)
            patch = cluster.run(partial(work, **settings))
        if not team.leads:
            return
        inspection = patch.inspect()
        show(console, inspection_table(inspection))
        tell(
            console,
            f"wrote {path} ({inspection.file_bytes:,} bytes); the base is unchanged (fingerprint {base.fingerprint[:12]})",
        )
        write_json(json, inspection.as_dict())
