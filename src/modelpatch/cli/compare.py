"""`modelpatch compare`: train methods side by side."""

from __future__ import annotations

from pathlib import Path

from typer import Option

from modelpatch.cli.console import ForceOption, Screen, check_file, make_folder
from modelpatch.cli.options import DataArgument, Network, Training
from modelpatch.cli.verb import verb
from modelpatch.errors import MethodError


@verb(first="methods sweep backbone epochs seeds out", panel="Comparison", config=True)
def compare(
    console: Screen,
    data: DataArgument,
    network: Network,
    training: Training,
    methods: str = Option("all", help="Comma-separated, such as scale-bias+depthwise or subset(blocks=last); or all."),
    sweep: str | None = Option(None, help="KEY=V1,V2,...: train each method at each of a hyperparameter's values."),
    base_data: str | None = Option(None, help="Data of the base's classes: measure its accuracy before and after."),
    seeds: int = Option(1, min=1, help="Seeds of each method; several give standard errors."),
    out: Path | None = Option(None, help="A folder for the patches; a repeated command reuses them."),
    force: ForceOption = False,
    plot: Path | None = Option(None, help="A picture of the bars, or with --sweep the lines."),
    bytes_plot: Path | None = Option(None, help="A picture of accuracy against file bytes."),
    markdown: Path | None = Option(None, help="A file for the table as Markdown."),
    html: Path | None = Option(None, help="A file for table and pictures as one HTML page."),
) -> None:
    """Train several methods on one task with the same budget and show one table.

    With --out, an interrupted comparison continues when the same command is given again.
    """
    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import COMPARED, make_method, split_outside
    from modelpatch.recipes.comparison import compare as run_compare
    from modelpatch.report.html import write_comparison
    from modelpatch.report.plots import check_matplotlib, plot_bytes, plot_comparison, plot_sweep
    from modelpatch.report.tables import comparison_markdown, comparison_table

    check_file("--markdown", markdown)
    check_file("--html", html)
    if html is not None:
        check_matplotlib("--html")
    names = list(COMPARED) if methods == "all" else split_outside(methods, ",")
    key, values = _read_sweep(sweep)
    sweeps = _sweeps(names, key, values, console) if values else {}
    names = [spelled for name in names for spelled in sweeps.get(name, {name: name}).values()]
    for name in names:
        make_method(name)
    settings = training.settings(seeds=seeds)
    task = load_task(data, seed=training.seed)
    base = None if base_data is None else load_task(base_data, hold_out=False)
    make_folder("--out", out)
    result = run_compare(
        network.open(), task, names, base=base, out=out, reuse=not force, progress=not console.quiet, **settings
    )
    console.show(comparison_table(result))
    console.write_json(result.as_dict())
    if (beside := out or html or markdown or console.json) is not None and str(beside) != "-":
        console.tell_run(beside)
    console.write(markdown, comparison_markdown(result))
    console.draw(plot, *((plot_sweep, result, key, sweeps) if sweeps else (plot_comparison, result)))
    console.draw(bytes_plot, plot_bytes, result)
    if html is not None:
        write_comparison(result, html)
        console.tell(f"wrote {html}")


def _sweeps(names: list[str], key: str, values: list[str], console: Screen) -> dict[str, dict[str, str]]:
    """The spellings of every method that has the key, at each value. Raises `MethodError` if none has it."""
    from modelpatch.methods.registry import sweep as make_sweep

    sweeps: dict[str, dict[str, str]] = {}
    refused: dict[str, MethodError] = {}
    for name in names:
        try:
            sweeps[name] = make_sweep(name, key, values)
        except MethodError as error:
            refused[name] = error
    if not sweeps:
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        console.tell(f"{name} is compared as it is: {reason}")
    return sweeps


def _read_sweep(text: str | None) -> tuple[str, list[str]]:
    """The key and the values of --sweep; none of either without it. Raises `MethodError`."""
    from modelpatch.methods.registry import split_outside

    if text is None:
        return "", []
    key, _, values = text.partition("=")
    split = [value.strip() for value in split_outside(values, ",") if value.strip()]
    if not key.strip() or len(split) < 2 or len(set(split)) < len(split):
        raise MethodError(f"--sweep {text!r} is not KEY=V1,V2,... with at least two values that differ.")
    return key.strip(), split
