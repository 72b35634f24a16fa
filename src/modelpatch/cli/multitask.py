"""`modelpatch multitask`: train several tasks together, over shared weights, each with a private patch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from typer import Argument, Option

from modelpatch.cli.console import ForceOption, JsonOption, LogOption, Screen, check_out, is_resumed, make_folder
from modelpatch.cli.options import Cluster, Network, RestartOption, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import TrainingError
from modelpatch.text import count_of


@verb(first="private set_ shared backbone epochs out", panel="Training", config=True)
def multitask(
    network: Network,
    training: Training,
    cluster: Cluster,
    data: list[str] = Argument(..., help="The tasks' data, each as for fit."),
    out: Path = Option(..., "--out", "-o", help="The folder for backbone.safetensors and one patch per task."),
    private: str | None = Option(None, "--private", "-m", help="The patches' method; by default scale and bias."),
    set_: SetOption = None,
    shared: str | None = Option(None, help="The shared weights, as a method: subset(blocks=layer4); default: all."),
    sampling: str = Option("equal", help="Images per task in a round: equal, or proportional to its training images."),
    weight: list[str] | None = Option(None, help="TASK=NUMBER, weight of its loss on shared weights; may be repeated."),
    augment: str = Option("auto", help="auto, none, light (no flip, for digits and signs) or standard."),
    dtype: str = Option("float32", help="Type of the numbers in the patches, as for fit."),
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
    from modelpatch.report.tables import multitask_table
    from modelpatch.train.distributed import joined

    with joined() as team:
        console = Screen(json, quiet=not team.leads)
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
            check_out([out / BACKBONE, *files.values()], force)
        base = network.open()
        check_writable(base)
        with console.resumable(checkpoint, restart):
            settings |= {"shared": common, "sampling": sampling, "weights": _weights(weight), "out": out}
            settings |= {"checkpoint": checkpoint, "log": log, "progress": not console.quiet}
            result = cluster.run(partial(fit_multitask, base, tasks, method, **settings))
        if not team.leads:
            return
        sizes = {name: path.stat().st_size for name, path in files.items()}
        console.show(multitask_table(result, sizes))
        written = count_of(len(files), "patch", "patches")
        console.tell(
            f"wrote {out / BACKBONE} (fingerprint {result.backbone.fingerprint[:12]}) and {written} of it; "
            f"{base.spec} is unchanged (fingerprint {base.fingerprint[:12]})"
        )
        console.tell_run(out)
        console.write_json(result.as_dict())


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
