"""Verbs that train: `fit`, `compare` and `demo`; and `methods`, the list of what `fit` can do."""

import inspect
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from typer import Argument, Option

import modelpatch as mp
from modelpatch.cli import options as opt
from modelpatch.cli import reading as read
from modelpatch.cli.console import JsonOption, Screen, make_folder
from modelpatch.cli.selecting import Limits
from modelpatch.cli.verb import verb
from modelpatch.errors import MethodError, TrainingError, require
from modelpatch.report import plots, tables
from modelpatch.report.html import Report, write_comparison

AUTO = "auto"  # the method of `fit` that held-out images choose
SHOWN = "scale-bias"  # the method of the demo's pictures
FASTER = {"piggyback": "piggyback(lr=0.0003)"}  # at its own rate no bit flips in so few steps
NEXT = {  # purpose: command
    "The contents of a patch": "inspect {folder}/digits-scale-bias.safetensors",
    "Every byte of the patches, and that they fit the base": "verify {folder}/*.safetensors -b own",
    "A patch for your task: YOUR_FOLDERS/train/CLASS/*.jpg, .../test/CLASS/*.jpg": "fit YOUR_FOLDERS -m scale-bias",
    "All methods on your task and your backbone": "compare YOUR_FOLDERS -b timm:resnet50.a1_in1k",
}


@verb(first="method set_ backbone epochs max_bytes max_latency budget out", panel="Training", config=True)
def fit(
    network: opt.Network,
    training: opt.Training,
    file: opt.PatchFile,
    cluster: opt.Cluster,
    limits: Limits,
    reading: read.Source,
    data: list[str] = Argument(
        ...,
        help="Class folders, a CSV or parquet manifest, masks or boxes, hf:NAME or bundled:digits; several: one task.",
    ),
    method: opt.MethodOption = AUTO,
    set_: opt.SetOption = None,
    budget: str | None = Option(
        None, help="Trials or time (8, 90s, 5min) for the choice of a method; with a time, all."
    ),
    augment: opt.AugmentOption = "auto",
    views: int = Option(4, help="Augmented views of each image whose frozen prefix is cached."),
    cache: bool = Option(True, help="Compute the frozen prefix of every view once."),
    dtype: str | None = Option(None, help="float32 (default), float16 (where a method is chosen), bfloat16, int8."),
    log: opt.LogOption = None,
    restart: opt.RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Train a patch for a task and measure it on the task's test images.

    Without --method, held-out images choose method, blocks, rate and augmentation within the limits, in the time of about two
    more fits; --set alone is for scale-bias. An interrupted run resumes exactly when the same command is given again. Under
    torchrun, processes share the batches.
    """
    from modelpatch.data.task import join_tasks
    from modelpatch.train.distributed import joined
    from modelpatch.train.settings import PLAIN_OPTIONS

    with joined() as team:
        console = Screen(json, quiet=not team.leads)
        make_folder("--log", log)
        chooses = method == AUTO and set_ is None
        made = None if chooses else opt.make_method(SHOWN if method == AUTO else method, set_)
        bounds = {name: value for name, value in {**limits.read(), "budget": budget}.items() if value is not None}
        if bounds and not chooses:
            raise TrainingError("--max-bytes, --max-latency and --budget limit a choice. Leave --method and --set out.")
        limits.warn(console)
        stored = dtype or ("float16" if chooses else "float32")
        settings = bounds | training.settings(PLAIN_OPTIONS, augment=augment, views=views, cache=cache, dtype=stored)
        tasks = [reading.load(one, training.seed) for one in data]
        console.tell_data(tasks)
        task = join_tasks(tasks)
        path = file.path(task.task.name)
        base = network.open()
        checkpoint = path.with_name(path.name + ".training")
        with console.resumable(checkpoint, restart):
            settings |= {"out": path, "checkpoint": checkpoint, "log": log, "progress": not console.quiet}
            patch = cluster.run(partial(mp.fit, base, task, made, **settings))
        if not team.leads:
            return
        if log is not None:
            console.draw_curves(log, patch.task.name)
        inspection = patch.inspect()
        if chooses:
            console.show(tables.choice_table(patch.created["choice"]))
            console.tell(f"chosen: {patch.created['choice']['why']}")
        console.show(tables.fit_table(inspection))
        kept = f"the base is unchanged (fingerprint {base.fingerprint[:12]})"
        console.tell(f"wrote {path} ({inspection.file_bytes:,} bytes); {kept}")
        console.tell_run(path)
        console.write_json(inspection.as_dict())


@verb(first="methods sweep backbone epochs seeds out", panel="Comparison", config=True)
def compare(
    console: Screen,
    data: read.DataArgument,
    network: opt.Network,
    training: opt.Training,
    reading: read.Source,
    methods: str = Option("all", help="Comma-separated, such as scale-bias+depthwise or subset(blocks=last); or all."),
    sweep: str | None = Option(None, help="KEY=V1,V2,...: train each method at each of a hyperparameter's values."),
    base_data: str | None = Option(None, help="Data of the base's classes: measure its accuracy before and after."),
    seeds: int = Option(1, min=1, help="Seeds of each method; several give standard errors."),
    out: Path | None = Option(None, help="A folder for the patches; a repeated command reuses them."),
    force: opt.ForceOption = False,
    plot: Path | None = Option(None, help="A picture of the bars, or with --sweep the lines."),
    bytes_plot: Path | None = Option(None, help="A picture of accuracy against file bytes."),
    markdown: Path | None = Option(None, help="A file for the table as Markdown."),
    html: Path | None = Option(None, help="A file for table and pictures as one HTML page."),
) -> None:
    """Train several methods on one task with the same budget and show one table.

    With --out, an interrupted comparison continues when the same command is given again.
    """
    from modelpatch.methods.registry import COMPARED, split_outside

    if html is not None:
        require("matplotlib", "plots", "--html")
    names = list(COMPARED) if methods == "all" else split_outside(methods, ",")
    key, sweeps = _sweeps(names, sweep, console)
    names = [spelled for name in names for spelled in sweeps.get(name, {name: name}).values()]
    for name in names:
        mp.methods.make_method(name)
    settings = training.settings(seeds=seeds)
    task = reading.load(data, training.seed)
    console.tell_data([task])
    base = None if base_data is None else mp.load_task(base_data, hold_out=False)
    make_folder("--out", out)
    settings |= {"base": base, "out": out, "reuse": not force, "progress": not console.quiet}
    result = mp.compare(network.open(), task, names, **settings)
    console.show(tables.comparison_table(result))
    console.write_json(result.as_dict())
    if (beside := out or html or markdown or console.json) is not None and str(beside) != "-":
        console.tell_run(beside)
    console.write(markdown, tables.cells_markdown(*tables.comparison_cells(result)))
    console.draw(plot, *((plots.plot_sweep, result, key, sweeps) if sweeps else (plots.plot_comparison, result)))
    console.draw(bytes_plot, plots.plot_bytes, result)
    if html is not None:
        write_comparison(result, html)
        console.tell(f"wrote {html}")


def _sweeps(names: list[str], text: str | None, console: Screen) -> tuple[str, dict[str, dict[str, str]]]:
    """The key of --sweep, and the spellings of every method that has it by value. Raises `MethodError` if none has."""
    from modelpatch.methods.registry import split_outside
    from modelpatch.methods.registry import sweep as make_sweep

    if text is None:
        return "", {}
    key, _, listed = text.partition("=")
    values = [value.strip() for value in split_outside(listed, ",") if value.strip()]
    if not key.strip() or len(values) < 2 or len(set(values)) < len(values):
        raise MethodError(f"--sweep {text!r} is not KEY=V1,V2,... with at least two values that differ.")
    sweeps: dict[str, dict[str, str]] = {}
    refused: dict[str, MethodError] = {}
    for name in names:
        try:
            sweeps[name] = make_sweep(name, key.strip(), values)
        except MethodError as error:
            refused[name] = error
    if not sweeps:
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        console.tell(f"{name} is compared as it is: {reason}")
    return key.strip(), sweeps


@verb(first="settings json")
def methods(
    console: Screen,
    name: str | None = Argument(None, help="A method: list its hyperparameters, which --set takes."),
    settings: bool = Option(False, "--settings", help="List the settings of a fit, which --fit and options take."),
) -> None:
    """List the methods; with NAME the hyperparameters of one; with --settings the settings of a fit."""
    from modelpatch.train.settings import FitSettings

    if name is None and not settings:
        lines = {spelled: tables.first_line(kind) for spelled, kind in mp.methods.METHODS.items()}
        console.show(tables.new_table("methods", texts=("name", "about"), rows=lines.items()))
        console.tell("`modelpatch methods NAME` lists the hyperparameters of one; + joins several in one patch")
        console.write_json(lines)
        return
    kind: type
    if name is None or settings:
        kind, title = FitSettings, "settings of a fit: an option, or --fit KEY=VALUE"
    else:
        kind, title = type(mp.methods.make_method(name)), f"hyperparameters of {name}: --set KEY=VALUE"
        console.tell(f"{inspect.getdoc(kind)}\n")
    rows = tables.describe_fields(kind)
    console.show(tables.new_table(title, texts=tuple(rows[0]), rows=[list(row.values()) for row in rows]))
    console.write_json(rows)


@verb()
def demo(
    out: Path = Option(Path("demo"), help="The folder for patches, pictures and the report."),
    epochs: int = Option(3, help="Passes over the training images."),
    seed: opt.SeedOption = 0,
) -> None:
    """Train patches with every method on real handwritten digits, show that the base is unchanged, write a report."""
    from PIL import Image

    from modelpatch.engine.resident import BoundPatch
    from modelpatch.tasks.drawing import encode_png

    make_folder("--out", out)
    console = Screen(out / "comparison.json")
    require("matplotlib", "plots", "The demo's report")
    begin = time.perf_counter()
    backbone = mp.load_backbone("bundled:tiny")
    task = mp.load_task("bundled:digits", seed=seed)
    accuracy = tables.percent(backbone.about["cifar10_test_top1"])
    console.print(
        f"One frozen backbone, [b]bundled:tiny[/b]: {sum(p.numel() for p in backbone.module.parameters()):,} parameters, "
        f"trained on CIFAR-10 photos ({accuracy} % there).\n"
        f"A task it has never seen: {len(task.train):,} real images of handwritten digits. Training one patch a method ..."
    )
    chosen = [mp.methods.make_method(FASTER.get(name, name)) for name in mp.methods.METHODS]
    result = mp.compare(backbone, task, chosen, epochs=epochs, seed=seed, batch_size=64, progress=not console.quiet)
    console.show(tables.comparison_table(result))
    backbone.verify_tensors()
    console.print(f"The base after all of it, hashed again: [b]unchanged[/b] ({backbone.fingerprint[:16]}).")
    for name, patch in result.patches.items():
        patch.save(out / f"digits-{name}.safetensors")
    seconds = time.perf_counter() - begin
    console.write_json(result.as_dict())
    best = max(result.rows, key=lambda row: row.top1).method
    small = result.patches[SHOWN]
    plots.plot_comparison(result, out / "comparison.png")
    plots.plot_confusion(mp.evaluate(backbone, small, task), "top-1", task.classes, out / "confusion.png")
    plots.plot_inspection(small.inspect(), out / f"{SHOWN}.png")
    images = task.test.images[:16]
    pictures = [encode_png(Image.fromarray(image)) for image in images]  # type: ignore[arg-type]
    answers = BoundPatch(backbone, small)(small.preprocessing(*images)).argmax(1).tolist()
    labels = task.test.labels[: len(images)]
    report = Report(
        "One backbone, one more task",
        f"bundled:tiny was trained on photos (CIFAR-10, {accuracy} % top-1) and then frozen. Each row below taught it to "
        f"read {len(task.train):,} handwritten digits through a patch file; {len(task.test):,} other digits measured it.",
    )
    report.section("Methods side by side", f"The most accurate is {best}.")
    report.table(*tables.comparison_cells(result))
    report.picture(out / "comparison.png", "Accuracy and file size of every method")
    report.section(
        "The base is unchanged",
        f"SHA-256 over every parameter and buffer, before and after all training: {backbone.fingerprint}.",
    )
    report.section(f"Answers of the {SHOWN} patch", "Test images and the patch's answers: ✓ right, ✗ wrong.")
    named = ([task.classes[number] for number in numbers] for numbers in (answers, labels))
    report.samples(list(zip(pictures, *named, strict=True)))
    report.section("Confused digits")
    report.picture(out / "confusion.png", "Confusion matrix")
    report.section("Contents of the patch file", "Bytes of every normalisation layer it replaces, and of its head.")
    report.picture(out / f"{SHOWN}.png", "Bytes per part")
    report.section("Try next")
    report.code(suggestions(out))
    report.write(out / "report.html")
    console.print(f"Wrote the patches and [b]{out / 'report.html'}[/b] in {seconds:.0f} s. Try next:\n")
    console.tell(suggestions(out))


def suggestions(folder: Path) -> str:
    """Commands to try next, each below its purpose, as they can be run from here."""
    program = "modelpatch"
    if not shutil.which(program):
        started = Path(sys.argv[0]).stem == program
        program = shlex.quote(sys.argv[0]) if started else "python -m modelpatch"
    pairs = [(comment, command.format(folder=shlex.quote(str(folder)))) for comment, command in NEXT.items()]
    return "\n".join(f"# {comment}\n{program} {command}" for comment, command in pairs)
