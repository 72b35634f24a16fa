"""`modelpatch multitask`: train several tasks together, over shared weights, each with a private patch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from modelpatch.cli.console import (
    ForceOption,
    JsonOption,
    LogOption,
    check_free,
    is_resumed,
    make_folder,
    open_console,
    resumable,
    tell,
    tell_run,
    write_json,
)
from modelpatch.cli.options import Cluster, Network, RestartOption, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import TrainingError
from modelpatch.text import count_of


@verb(first="private set_ shared backbone epochs out", panel="Training", config=True)
def multitask(
    data: Annotated[list[str], typer.Argument(help="The tasks' data, each as for fit.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for backbone.safetensors and one patch per task.")
    ],
    network: Network,
    training: Training,
    cluster: Cluster,
    private: Annotated[
        str | None,
        typer.Option(
            "--private", "-m", help="The method of the patches, trained for each task alone; by default scale and bias."
        ),
    ] = None,
    set_: SetOption = None,
    shared: Annotated[
        str | None,
        typer.Option(
            help="The shared weights, as a method that trains them: subset(blocks=layer4); by default all weights."
        ),
    ] = None,
    sampling: Annotated[
        str, typer.Option(help="Images per task in a round: equal, or proportional to its training images.")
    ] = "equal",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=NUMBER, the weight of a task's loss on shared weights (1 by default); may be repeated."
        ),
    ] = None,
    augment: Annotated[
        str, typer.Option(help="auto, none, light (no flip, for digits and signs) or standard.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Type of the numbers in the patches, as for fit.")] = "float32",
    log: LogOption = None,
    force: ForceOption = False,
    restart: RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Train a copy of the backbone on several tasks together, with a private patch for each.

    The tasks share the weights that --shared names; each task trains the weights of --private alone. An interrupted run
    resumes exactly when the same command is given again. Under torchrun, processes share the tasks.
    """
    from modelpatch.backbone.files import check_writable
    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import make_method
    from modelpatch.recipes.multitask import (
        BACKBONE,
        PRIVATE,
        SHARED,
        check_joint_settings,
        check_tasks,
        fit_multitask,
        task_files,
    )
    from modelpatch.report.tables import multitask_table, show
    from modelpatch.train.distributed import joined

    with joined() as team:
        console = open_console(json, quiet=not team.leads)
        if log is not None:
            make_folder("--log", log)
        method, common = make_method(private or PRIVATE, **parse_pairs(set_, "--set")), make_method(shared or SHARED)
        settings = training.settings(augment=augment, dtype=dtype)
        check_joint_settings(settings)
        tasks = [load_task(one, seed=training.seed) for one in data]
        check_tasks(tasks)
        make_folder("--out", out)
        files = task_files(out, [task.task.name for task in tasks])
        checkpoint = out / f"{BACKBONE}.training"
        if not is_resumed(checkpoint, restart):
            check_free("--out", [out / BACKBONE, *files.values()], force)
        base = network.open()
        check_writable(base)
        with resumable(console, checkpoint, restart):
            work = partial(
                fit_multitask,
                base,
                tasks,
                method,
                shared=common,
                sampling=sampling,  # type: ignore[arg-type]
                weights=_weights(weight),
                out=out,
                checkpoint=checkpoint,
                log=log,
                progress=not console.quiet,
                **settings,
            )
            result = cluster.run(work)
        if not team.leads:
            return
        sizes = {name: path.stat().st_size for name, path in files.items()}
        show(console, multitask_table(result, sizes))
        written = count_of(len(files), "patch", "patches")
        tell(
            console,
            f"wrote {out / BACKBONE} (fingerprint {result.backbone.fingerprint[:12]}) and {written} of it; "
            f"{base.spec} is unchanged (fingerprint {base.fingerprint[:12]})",
        )
        tell_run(console, out)
        write_json(json, result.as_dict())


def _weights(pairs: list[str] | None) -> dict[str, float]:
    """TASK=NUMBER pairs by task. Raises `TrainingError` for others, and for a task that is given twice."""
    weights: dict[str, float] = {}
    for pair in pairs or []:
        name, _, number = pair.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise TrainingError(f"--weight {pair!r} is not TASK=NUMBER with a number above 0.")
        if name in weights:
            raise TrainingError(f"--weight {name}=... is given twice. Give it once.")
        weights[name] = value
    return weights
