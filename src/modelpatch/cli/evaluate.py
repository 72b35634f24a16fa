"""`modelpatch eval`: measure a patch on a task's test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.console import JsonOption, check_pictures, open_console, progress_of, tell, write_json
from modelpatch.cli.options import AlphaOption, ArgumentOption, DeviceOption, PatchBackboneOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from modelpatch.tasks.kind import Result


@verb(first="patch per_class plot base_data", panel="Data")
def evaluate(
    data: Annotated[list[str], typer.Argument(help="The task's data, as for fit.")],
    patch: Annotated[Path, typer.Option("--patch", "-p", help="The patch file, or a cascade's.")],
    backbone: PatchBackboneOption = None,
    base_data: Annotated[
        str | None, typer.Option(help="Data of the base's own classes, for the harmonic mean.")
    ] = None,
    per_class: Annotated[bool, typer.Option(help="List every class.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture of the confusion matrix.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the test split if the data has none; by default that of the fit."),
    ] = None,
    alpha: AlphaOption = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Measure a patch or a cascade on the test images of its task, with the metrics of its kind of task."""
    from modelpatch.cli.loading import backbone_of, find_device, load_own, naming, read_answering
    from modelpatch.data.joining import accuracy_by_task
    from modelpatch.data.task import load_task
    from modelpatch.engine.cascade import Cascade
    from modelpatch.recipes.cascading import evaluate_cascade
    from modelpatch.report.plots import plot_confusion
    from modelpatch.report.tables import evaluation_table, show
    from modelpatch.tasks.classification import Evaluation
    from modelpatch.tasks.kind import kind_of
    from modelpatch.train.evaluation import evaluate as run_evaluate
    from modelpatch.train.evaluation import evaluate_base, harmonic_mean

    console = open_console(json)
    check_pictures(plot=plot)
    loaded = read_answering(patch, alpha)
    first = loaded.patches[0] if isinstance(loaded, Cascade) else loaded
    base = backbone_of(first, patch, backbone, parse_arguments(argument), find_device(device))
    task = load_own(first, data, seed)
    own = None if base_data is None else load_task(base_data, hold_out=False)
    with naming(patch), progress_of(console, "eval") as bar, bar.task(task.task.name, len(task.test)) as advance:
        if isinstance(loaded, Cascade):
            cascaded, routed = evaluate_cascade(base, loaded, task, advance)
            result: Result = cascaded
            extra: dict[str, Any] = {"macs": routed.macs, "answered": list(routed.answered)}
        else:
            result, extra = run_evaluate(base, loaded, task, advance), {}
    figures = {**result.as_dict(), **extra}
    if isinstance(result, Evaluation) and (by_task := accuracy_by_task(result, task)):
        figures["by_task"] = by_task
    if own is not None:
        figures["base_top1"] = evaluate_base(base, own).top1
        figures["harmonic_mean"] = harmonic_mean(result.score, figures["base_top1"])
    show(console, evaluation_table(loaded.task.name, figures, per_class))
    write_json(json, figures)
    if plot is not None:
        kind = kind_of(loaded.task.kind)
        if result.confusion is None:
            raise ModelpatchError(f"--plot {plot}: {kind.name} tasks have no confusion matrix. Leave it out.")
        plot_confusion(result, kind.metrics[kind.metric], loaded.task.classes, plot)
        tell(console, f"drew {plot}")
