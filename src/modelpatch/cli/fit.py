"""`modelpatch fit`: train a patch."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from modelpatch.cli.console import (
    JsonOption,
    LogOption,
    draw_log,
    make_folder,
    open_console,
    resumable,
    tell,
    tell_run,
    write_json,
)
from modelpatch.cli.options import Asked, Cluster, MethodOption, Network, PatchFile, RestartOption, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb


@verb(first="method set_ backbone epochs out", panel="Training", config=True)
def fit(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Class folders, a CSV or parquet manifest, hf:NAME or bundled:digits; images with masks or boxes: see the "
            "docs. Several: one task over all their classes."
        ),
    ],
    network: Network,
    training: Training,
    asked: Asked,
    file: PatchFile,
    cluster: Cluster,
    method: MethodOption = "scale-bias",
    set_: SetOption = None,
    augment: Annotated[
        str, typer.Option(help="auto, none, light (no flip, for digits and signs) or standard.")
    ] = "auto",
    views: Annotated[int, typer.Option(help="Augmented views of each image whose frozen prefix is cached.")] = 4,
    cache: Annotated[bool, typer.Option(help="Compute the frozen prefix of every view once.")] = True,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the numbers in the file: float32, float16, bfloat16, or int8 (matrices; vectors stay float32)."
        ),
    ] = "float32",
    log: LogOption = None,
    restart: RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Train a patch for a task and measure it on the task's test images.

    An interrupted run resumes exactly when the same command is given again. Under torchrun, processes share the batches.
    """
    from modelpatch.methods.registry import make_method
    from modelpatch.report.tables import fit_table, show
    from modelpatch.train.distributed import joined
    from modelpatch.train.fitting import fit as run_fit

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
            work = partial(
                run_fit, base, task, made, out=path, checkpoint=checkpoint, log=log, progress=not console.quiet
            )
            patch = cluster.run(partial(work, **settings))
        if not team.leads:
            return
        if log is not None:
            draw_log(console, log, patch.task.name)
        inspection = patch.inspect()
        show(console, fit_table(inspection))
        tell(
            console,
            f"wrote {path} ({inspection.file_bytes:,} bytes); the base is unchanged (fingerprint {base.fingerprint[:12]})",
        )
        tell_run(console, path)
        write_json(json, inspection.as_dict())
