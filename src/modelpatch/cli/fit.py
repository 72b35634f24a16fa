"""`modelpatch fit`: train a patch."""

from __future__ import annotations

from functools import partial

from typer import Argument, Option

from modelpatch.cli.console import JsonOption, LogOption, Screen, make_folder
from modelpatch.cli.options import Asked, Cluster, MethodOption, Network, PatchFile, RestartOption, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb


@verb(first="method set_ backbone epochs out", panel="Training", config=True)
def fit(
    network: Network,
    training: Training,
    asked: Asked,
    file: PatchFile,
    cluster: Cluster,
    data: list[str] = Argument(
        ...,
        help="Class folders, a CSV or parquet manifest, masks or boxes (see the docs), hf:NAME or bundled:digits; "
        "several: one task over all their classes.",
    ),
    method: MethodOption = "scale-bias",
    set_: SetOption = None,
    augment: str = Option("auto", help="auto, none, light (no flip, for digits and signs) or standard."),
    views: int = Option(4, help="Augmented views of each image whose frozen prefix is cached."),
    cache: bool = Option(True, help="Compute the frozen prefix of every view once."),
    dtype: str = Option("float32", help="Type of the numbers: float32, float16, bfloat16, or int8 (matrices)."),
    log: LogOption = None,
    restart: RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Train a patch for a task and measure it on the task's test images.

    An interrupted run resumes exactly when the same command is given again. Under torchrun, processes share the batches.
    """
    from modelpatch.methods.registry import make_method
    from modelpatch.report.tables import fit_table
    from modelpatch.train.distributed import joined
    from modelpatch.train.fitting import fit as run_fit

    with joined() as team:
        console = Screen(json, quiet=not team.leads)
        make_folder("--log", log)
        made = make_method(method, **parse_pairs(set_, "--set"))
        settings = training.settings(augment=augment, views=views, cache=cache, dtype=dtype)
        task = asked.load(data, training.seed)
        path = file.path(task.task.name)
        base = network.open()
        checkpoint = path.with_name(path.name + ".training")
        with console.resumable(checkpoint, restart):
            settings |= {"out": path, "checkpoint": checkpoint, "log": log, "progress": not console.quiet}
            patch = cluster.run(partial(run_fit, base, task, made, **settings))
        if not team.leads:
            return
        if log is not None:
            console.draw_log(log, patch.task.name)
        inspection = patch.inspect()
        console.show(fit_table(inspection))
        kept = f"the base is unchanged (fingerprint {base.fingerprint[:12]})"
        console.tell(f"wrote {path} ({inspection.file_bytes:,} bytes); {kept}")
        console.tell_run(path)
        console.write_json(inspection.as_dict())
