"""`modelpatch paint`: patch a model on new tasks while it keeps supporting others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import (
    JsonOption,
    check_file,
    check_pictures,
    open_console,
    resumable,
    tell,
    tell_run,
    write_json,
)
from modelpatch.cli.options import (
    NamesOption,
    Network,
    PatchFile,
    RestartOption,
    SetOption,
    TemplateOption,
    TextOption,
    Training,
)
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import TrainingError
from modelpatch.text import nearest

if TYPE_CHECKING:
    pass


@verb(first="supported rule steps set_ backbone epochs out", panel="Mixing", config=True)
def paint(
    data: Annotated[list[str], typer.Argument(help="The data of the tasks to patch, as for fit.")],
    supported: Annotated[list[str], typer.Option(help="Data of a task whose accuracy must stay; may be repeated.")],
    network: Network,
    training: Training,
    file: PatchFile,
    rule: Annotated[
        str,
        typer.Option(
            help="Choice of alpha on held-out images: mean, harmonic, or drop=POINTS that supported tasks may lose."
        ),
    ] = "mean",
    steps: Annotated[int, typer.Option(help="Values of alpha from 0 to 1.")] = 11,
    mode: Annotated[str, typer.Option(help="Several tasks: joint, sequential or parallel.")] = "joint",
    mixing: Annotated[
        str, typer.Option(help="parallel: one scalar, a search, or exhaustive (up to 3 tasks).")
    ] = "scalar",
    trials: Annotated[int, typer.Option(help="Mixtures that --mixing search tries.")] = 40,
    orders: Annotated[int, typer.Option(help="sequential: orders of the tasks that are tried.")] = 1,
    naive: Annotated[
        bool, typer.Option("--naive", help="Train the head too instead of freezing it: the baseline.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Fit closed heads anew at every alpha.")] = False,
    norms: Annotated[
        str,
        typer.Option(help="BatchNorm statistics after mixing: kept, or measured again (shared, or own for each task)."),
    ] = "kept",
    interpolate: Annotated[bool, typer.Option(help="Mix with the base; without, plain fine-tuning.")] = True,
    text: TextOption = None,
    names: NamesOption = None,
    template: TemplateOption = None,
    baselines: Annotated[
        str | None, typer.Option(help="Compare with baselines such as ema, l2 or ewc, comma-separated, or 'all'.")
    ] = None,
    set_: SetOption = None,
    validation: Annotated[float, typer.Option(help="Share of training images held out to choose alpha.")] = 0.2,
    plot: Annotated[Path | None, typer.Option(help="A picture of patched against supported accuracy.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="A file for the table as Markdown.")] = None,
    restart: RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Fine-tune, mix the result with the base at many alphas, and choose one on held-out images of both (PAINT).

    The patch keeps the whole change; alpha is its strength, which can be set later without training. An interrupted run
    continues when the same command is given again.
    """
    from modelpatch.cli.loading import open_vocabulary
    from modelpatch.data.joining import joint_task
    from modelpatch.data.task import load_task
    from modelpatch.methods.paint import Paint
    from modelpatch.methods.registry import make_method
    from modelpatch.recipes.frontier import frontier
    from modelpatch.recipes.painting import PaintSettings
    from modelpatch.recipes.painting import paint as run_paint
    from modelpatch.report.paint import (
        frontier_table,
        orders_table,
        painting_markdown,
        painting_summary,
        painting_table,
        plot_tradeoff,
    )
    from modelpatch.report.tables import show

    console = open_console(json)
    check_file("--markdown", markdown)
    check_pictures(plot=plot)
    exploration = PaintSettings(
        mode=mode,  # type: ignore[arg-type]
        mixing=mixing,  # type: ignore[arg-type]
        rule=rule,
        steps=steps,
        trials=trials,
        naive=naive,
        refit=refit,
        norms=norms,  # type: ignore[arg-type]
        orders=orders,
        validation=validation,
        interpolate=interpolate,
    )
    rivals = _baselines(baselines, len(data))
    method = cast(Paint, make_method(Paint.name, **parse_pairs(set_, "--set")))
    settings = training.settings()
    tasks = [load_task(one, seed=training.seed) for one in data]
    kept = [load_task(one, seed=training.seed) for one in supported]
    target = file.path(joint_task([task.task for task in tasks]).name)
    opened = network.open()
    vocabulary = open_vocabulary(opened, text, names, template)
    common: dict[str, Any] = {
        "method": method,
        "heads": vocabulary and vocabulary.head,
        "progress": not console.quiet,
        "exploration": exploration,
        **settings,
    }
    checkpoint = target.with_name(target.name + ".training")
    with resumable(console, checkpoint, restart):
        painting = run_paint(opened, tasks, kept, checkpoint=checkpoint, **common)
    patch = painting.patch if vocabulary is None else vocabulary.mark(painting.patch)
    patch.save(target)
    shutil.rmtree(checkpoint)
    show(console, painting_table(painting))
    tell(console, painting_summary(painting))
    if painting.orders:
        console.print()
        show(console, orders_table(painting))
    figures = painting.as_dict()
    curves = {"paint": painting.curve}
    if rivals:
        other = frontier(opened, tasks[0], kept, rivals, **common)
        console.print()
        show(console, frontier_table(other))
        figures["frontier"] = other.as_dict()
        curves |= {name: points for name, points in other.curves.items() if name != "paint"}
    tell(
        console, f"wrote {target} ({target.stat().st_size:,} bytes, strength {patch.strength:g}); the base is unchanged"
    )
    if markdown is not None:
        write_bytes(markdown, painting_markdown(painting).encode())
        tell(console, f"wrote {markdown}")
    if plot is not None:
        plot_tradeoff(curves, painting.base, painting.chosen, f"{patch.task.name} on {opened.spec}"[:80], plot)
        tell(console, f"drew {plot}")
    tell_run(console, target)
    write_json(json, figures)


def _baselines(text: str | None, tasks: int) -> list[str]:
    """The requested baselines. Raises `TrainingError` for unknown ones and for several tasks."""
    from modelpatch.recipes.frontier import BASELINES

    if text is None:
        return []
    chosen = list(BASELINES) if text == "all" else [name.strip() for name in text.split(",")]
    if unknown := sorted(set(chosen) - set(BASELINES)):
        raise TrainingError(
            f"there is no baseline {unknown[0]!r}.{nearest(unknown[0], BASELINES)} Expected some of: {', '.join(BASELINES)}."
        )
    if tasks > 1:
        raise TrainingError("baselines are measured with one task to patch. Give one, or leave --baselines out.")
    return chosen
