"""`modelpatch paint`: patch a model on new tasks while it keeps supporting others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from typer import Argument, Option

from modelpatch.cli.console import Screen, check_file
from modelpatch.cli.options import Network, PatchFile, RestartOption, SetOption, Training, Words
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb


@verb(first="supported rule steps set_ backbone epochs out", panel="Mixing", config=True)
def paint(
    console: Screen,
    network: Network,
    training: Training,
    file: PatchFile,
    words: Words,
    data: list[str] = Argument(..., help="The data of the tasks to patch, as for fit."),
    supported: list[str] = Option(..., help="Data of a task whose accuracy must stay; may be repeated."),
    rule: str = Option("mean", help="Choice of alpha: mean, harmonic, or drop=POINTS of supported tasks."),
    steps: int = Option(11, help="Values of alpha from 0 to 1."),
    mode: str = Option("joint", help="Several tasks: joint, sequential or parallel."),
    mixing: str = Option("scalar", help="parallel: one scalar, a search, or exhaustive (up to 3 tasks)."),
    trials: int = Option(40, help="Mixtures that --mixing search tries."),
    orders: int = Option(1, help="sequential: orders of the tasks that are tried."),
    naive: bool = Option(False, "--naive", help="Train the head too instead of freezing it: the baseline."),
    refit: bool = Option(False, "--refit", help="Fit closed heads anew at every alpha."),
    norms: str = Option("kept", help="BatchNorm statistics of a mixture: kept, or measured (shared, or own)."),
    interpolate: bool = Option(True, help="Mix with the base; without, plain fine-tuning."),
    set_: SetOption = None,
    validation: float = Option(0.2, help="Share of training images held out to choose alpha."),
    plot: Path | None = Option(None, help="A picture of patched against supported accuracy."),
    markdown: Path | None = Option(None, help="A file for the table as Markdown."),
    restart: RestartOption = False,
) -> None:
    """Fine-tune, mix the result with the base at many alphas, and choose one on held-out images of both (PAINT).

    The patch keeps the whole change; alpha is its strength, which can be set later without training. An interrupted run
    continues when the same command is given again.
    """
    from modelpatch.data.task import joint_task, load_task
    from modelpatch.methods.paint import Paint
    from modelpatch.methods.registry import make_method
    from modelpatch.recipes.painting import PaintSettings
    from modelpatch.recipes.painting import paint as run_paint
    from modelpatch.report.paint import orders_table, painting_cells, painting_summary, painting_table, plot_tradeoff
    from modelpatch.report.tables import cells_markdown

    check_file("--markdown", markdown)
    mixture: dict[str, Any] = {"mode": mode, "mixing": mixing, "rule": rule, "norms": norms, "naive": naive}
    mixture |= {"steps": steps, "trials": trials, "refit": refit, "orders": orders, "interpolate": interpolate}
    common: dict[str, Any] = {"exploration": PaintSettings(**mixture, validation=validation)}
    common |= {"method": make_method(Paint.name, **parse_pairs(set_, "--set")), **training.settings()}
    tasks = [load_task(one, seed=training.seed) for one in data]
    kept = [load_task(one, seed=training.seed) for one in supported]
    target = file.path(joint_task([task.task for task in tasks]).name)
    opened = network.open()
    vocabulary = words.open(opened)
    common |= {"heads": vocabulary and vocabulary.head, "progress": not console.quiet}
    checkpoint = target.with_name(target.name + ".training")
    with console.resumable(checkpoint, restart):
        painting = run_paint(opened, tasks, kept, checkpoint=checkpoint, **common)
    patch = painting.patch if vocabulary is None else vocabulary.mark(painting.patch)
    patch.save(target)
    shutil.rmtree(checkpoint)
    console.show(painting_table(painting))
    console.tell(painting_summary(painting))
    if painting.orders:
        console.print()
        console.show(orders_table(painting))
    size, strength = f"{target.stat().st_size:,} bytes", f"strength {patch.strength:g}"
    console.tell(f"wrote {target} ({size}, {strength}); the base is unchanged")
    console.write(markdown, cells_markdown(*painting_cells(painting)))
    title = f"{patch.task.name} on {opened.spec}"[:80]
    console.draw(plot, plot_tradeoff, painting, title)
    console.tell_run(target)
    console.write_json(painting.as_dict())
