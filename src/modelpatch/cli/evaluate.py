"""`modelpatch eval`: measure a patch on a task's test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from modelpatch.cli.console import Screen
from modelpatch.cli.options import AlphaOption, DeviceOption, PatchNetwork
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from modelpatch.tasks.kind import Result


@verb(first="patch per_class plot base_data", panel="Data")
def evaluate(
    console: Screen,
    network: PatchNetwork,
    data: list[str] = Argument(..., help="The task's data, as for fit."),
    patch: Path = Option(..., "--patch", "-p", help="The patch file, or a cascade's."),
    base_data: str | None = Option(None, help="Data of the base's own classes, for the harmonic mean."),
    per_class: bool = Option(False, help="List every class."),
    plot: Path | None = Option(None, help="A picture of the confusion matrix."),
    seed: int | None = Option(None, help="Seed of the test split if the data has none; by default that of the fit."),
    alpha: AlphaOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure a patch or a cascade on the test images of its task, with the metrics of its kind of task."""
    from modelpatch.cli.loading import load_own, naming, read_answering
    from modelpatch.data.task import accuracy_by_task, load_task
    from modelpatch.engine.cascade import Cascade
    from modelpatch.recipes.cascading import evaluate_cascade
    from modelpatch.report.plots import plot_confusion
    from modelpatch.report.tables import evaluation_table
    from modelpatch.tasks.classification import Evaluation
    from modelpatch.tasks.kind import kind_of
    from modelpatch.train.evaluation import evaluate as run_evaluate
    from modelpatch.train.evaluation import evaluate_base, harmonic_mean

    loaded = read_answering(patch, alpha)
    first = loaded.patches[0] if isinstance(loaded, Cascade) else loaded
    base = network.open(first, patch, device)
    task = load_own(first, data, seed)
    own = None if base_data is None else load_task(base_data, hold_out=False)
    with naming(patch), console.progress("eval") as bar, bar.task(task.task.name, len(task.test)) as advance:
        result: Result
        figures: dict[str, Any] = {}
        if isinstance(loaded, Cascade):
            result, routed = evaluate_cascade(base, loaded, task, advance)
            figures = {"macs": routed.macs, "answered": list(routed.answered)}
        else:
            result = run_evaluate(base, loaded, task, advance)
    figures |= result.as_dict()
    if isinstance(result, Evaluation) and (by_task := accuracy_by_task(result, task)):
        figures["by_task"] = by_task
    if own is not None:
        figures["base_top1"] = evaluate_base(base, own).top1
        figures["harmonic_mean"] = harmonic_mean(result.score, figures["base_top1"])
    console.show(evaluation_table(loaded.task.name, figures, per_class))
    console.write_json(figures)
    if plot is not None:
        kind = kind_of(loaded.task.kind)
        if result.confusion is None:
            raise ModelpatchError(f"--plot {plot}: {kind.name} tasks have no confusion matrix. Leave it out.")
        console.draw(plot, plot_confusion, result, kind.metrics[kind.metric], loaded.task.classes)
