"""Verbs that use a patch: `predict`, `eval`, `inspect` and `verify`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, Option

import modelpatch as mp
from modelpatch.atomic import write_bytes
from modelpatch.cli import options as opt
from modelpatch.cli import reading as read
from modelpatch.cli.console import Screen, check_once, make_folder, read_names
from modelpatch.cli.signing import SignerOption, signers_of
from modelpatch.cli.verb import verb
from modelpatch.errors import BackboneError, CascadeError, DataError, MissingExtraError, ModelpatchError
from modelpatch.report import plots, tables
from modelpatch.text import count_of, file_name

if TYPE_CHECKING:
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.inputs import Answers
    from modelpatch.patch.signing import Signers

Row = dict[str, Any]
COLORS = {"intact": "green", "refused": "red", "unchecked": "yellow"}


@verb(first="patch top base labels overlay", panel="Answers")
def predict(
    console: Screen,
    network: opt.PatchNetwork,
    words: opt.Words,
    images: list[Path] = Argument(
        ..., help="Image files, folders that are searched for them, or tables that name them."
    ),
    patch: list[Path] = Option(..., "--patch", "-p", help="A patch file, or a cascade's; may be repeated."),
    base: bool = Option(False, "--base", help="Print the base's own answer too."),
    base_size: int | None = Option(None, help="Pixels of the base's images; by default the patches', if all have one."),
    top: int = Option(3, min=1, help="Classes per image and task. Of boxes and labels all that are sure are told."),
    batch_size: int = Option(16, min=1, help="Images in a batch."),
    workers: int = Option(0, min=0, help="Processes that decode images; 0: this one."),
    tuning: Path | None = Option(None, help="Settings that `modelpatch tune` measured, for hundreds of images."),
    backend: opt.BackendOption = "eager",
    explain: bool = Option(False, "--explain", help="Print what the patches share and the time of each step."),
    plot: Path | None = Option(None, help="A picture of the plan."),
    labels: str | None = Option(None, help="Other answers than the classes, comma-separated or a file of lines."),
    overlay: Path | None = Option(
        None, help="A folder for pictures of masks, boxes, labels and numbers with the images."
    ),
    image_column: read.ImageColumnOption = None,
    alpha: opt.AlphaOption = None,
    device: opt.DeviceOption = "cpu",
) -> None:
    """Answer for every image with every patch in one pass. All patches must belong to one backbone.

    An unreadable image gets an error in its row; the others are answered and the exit status is 1.
    """
    from modelpatch.backbone.tuning import Tuning
    from modelpatch.engine.engine import BASE
    from modelpatch.tasks.kind import KINDS, kind_of

    files = read.gather_images(images, image_column)
    labels_given = read_names("--labels", labels)
    check_once(patch)
    patches = {path: opt.read_answering(path, alpha) for path in patch}
    loaded = network.open(patches[patch[0]], patch[0], device)
    if labels_given:
        for path, one in patches.items():
            if not isinstance(one, mp.Patch):
                raise CascadeError(f"{path} is a cascade, bound to its own classes. Leave --labels out.")
            patches[path] = _relabel(loaded, one, labels_given, words)
    elif words != opt.Words():
        raise ModelpatchError("--text, --names and --template are for --labels. Give --labels as well.")
    if base_size is not None and not base:
        raise ModelpatchError(f"--base-size {base_size} is for the base's own answer. Give --base as well.")
    seen = _base_preprocessing(loaded, patches.values(), base_size, console) if base else None
    settings = opt.read_tuning(tuning) or (Tuning() if backend == "eager" else None)
    engine = mp.Engine(loaded, tuning=settings, backend=backend, preprocessing=seen)
    tasks = [BASE] * base + add_tasks(engine, patches)
    if overlay is not None:
        if not any(kind_of(engine.kind(name)).draws for name in tasks):
            drawn = ", ".join(kind for kind in sorted(KINDS) if kind_of(kind).draws)
            raise ModelpatchError(
                f"--overlay {overlay}: no answer of these patches is drawn, those of {drawn} tasks are. Leave it out."
            )
        make_folder("--overlay", overlay)
    rows: list[Row] = [{"image": str(file), "tasks": {}} for file in files]
    with console.progress("predict") as bar, bar.task("images", len(files)) as advance:
        for answers in engine.stream(files, only=tasks, batch_size=batch_size, workers=workers):
            _fill(rows, answers, engine, top, overlay)
            advance(len(answers.rows) + len(answers.errors))
    console.show(tables.prediction_table(rows, {name: engine.kind(name) for name in tasks}))
    if overlay is not None:
        console.tell(f"drew {count_of(sum(len(row.get('overlays', {})) for row in rows), 'overlay')} in {overlay}")
    readable = [file for file, row in zip(files, rows, strict=True) if "error" not in row]
    report = _explain(engine, readable[:batch_size], tasks, console, plot) if (explain or plot) and readable else None
    console.write_json({"images": rows, "plan": report} if explain else rows)
    if broken := len(files) - len(readable):
        others = "; the others are answered" if readable else ", so that nothing is answered or explained"
        raise DataError(f"{broken} of {len(files)} images cannot be read{others}.")


def _base_preprocessing(
    backbone: mp.Backbone, loaded: Iterable[mp.Patch | Cascade], pixels: int | None, console: Screen
) -> mp.Preprocessing:
    """The preprocessing of the base: of the size that was asked for, else the patches' if all have one, else its own."""
    own = backbone.preprocessing
    if pixels is not None:
        backbone.check_image_size(pixels)
        return own.with_image_size(pixels)
    asked = {patch.preprocessing for one in loaded for patch in ([one] if isinstance(one, mp.Patch) else one.patches)}
    if asked == {own}:
        return own
    if len(asked) == 1:
        (shared,) = asked
        console.tell(
            f"the base answers at {shared.image_size} px, in one pass with the patches (in a pass of its own: --base-size "
            f"{own.image_size}, the size it was loaded for)"
        )
        return shared
    sizes = ", ".join(f"{one.image_size}" for one in sorted(asked, key=lambda one: one.image_size))
    console.tell(f"the base answers at its own {own.image_size} px, in a pass of its own: the patches see {sizes} px")
    return own


def _relabel(backbone: mp.Backbone, patch: mp.Patch, labels: tuple[str, ...], words: opt.Words) -> mp.Patch:
    """The patch with a head for `labels`, made as recorded in its file except for the options given."""
    from modelpatch.backbone.text_tower import PACKAGES

    recorded = patch.method.hyperparameters
    told = next((name for name in PACKAGES if recorded.get("text") == name), None)  # files name packages, never folders
    if words.text is None and backbone.text is None and told is None:
        raise ModelpatchError(f"the patch of {patch.task.name} names no text tower for labels. Give --text minilm.")
    kept = recorded.get("templates")
    written = [one for one in kept if isinstance(one, str)] if isinstance(kept, list) else []
    vocabulary = replace(words, text=words.text or told, template=words.template or written).open(backbone)
    if vocabulary is None:
        raise ModelpatchError("--text none makes no head for --labels. Name a text tower.")
    return vocabulary.relabel(patch, labels)


def add_tasks(engine: mp.Engine, patches: Mapping[Path, mp.Patch | Cascade]) -> list[str]:
    """Add the patches of files to an engine; return their names there. Errors name the file of the patch that fails."""
    named = _name_tasks(patches)
    for name, path in named.items():
        with opt.naming(path):
            engine.add(name, patches[path])
    return list(named)


def _name_tasks(patches: Mapping[Path, mp.Patch | Cascade]) -> dict[str, Path]:
    """Files by task name, by file name if two tasks have the same name, and by path if these are equal too."""
    from modelpatch.engine.engine import BASE

    tasks = [patch.task.name for patch in patches.values()]
    stems = [path.stem for path in patches]
    named: dict[str, Path] = {}
    for path, patch in patches.items():
        name = patch.task.name if tasks.count(patch.task.name) == 1 else path.stem
        name = str(path) if name == path.stem and stems.count(name) > 1 else name
        named[f"{name} (patch)" if name == BASE else name] = path
    return named


def _fill(rows: list[Row], answers: Answers, engine: mp.Engine, top: int, folder: Path | None) -> None:
    """Write a batch's answers and errors into the rows of its images, and draw answers into a folder if there is one."""
    from modelpatch.tasks.drawing import encode_png
    from modelpatch.tasks.kind import kind_of

    for place, error in answers.errors.items():
        rows[place]["error"] = error
    for name, found in answers.logits.items():
        kind = kind_of(engine.kind(name))
        for place, answer in zip(answers.rows, kind.reduce(found, top), strict=True):
            row = rows[place]
            view = engine.view(name, Path(row["image"]))
            row["tasks"][name] = kind.describe(answer, view, top)
            if folder is not None and kind.draws:
                path = folder / f"{place:05}-{Path(row['image']).stem}-{file_name(name)}.png"
                write_bytes(path, encode_png(kind.draw(answer, view)))
                row.setdefault("overlays", {})[name] = str(path)


def _explain(engine: mp.Engine, files: list[Path], tasks: list[str], console: Screen, plot: Path | None) -> Row:
    """Print the plan for one batch and what its steps took; the same as facts for JSON."""
    from modelpatch.engine.plan import describe_step

    plan, timings = engine.explain(engine.read(files, tasks), only=tasks)
    console.tell(f"{plan}\n{engine.tuning}")
    console.show(tables.timing_table(timings))
    if plot is not None:
        plan.draw(str(plot))
    steps = [{"step": describe_step(timing.step), "milliseconds": 1000 * timing.seconds} for timing in timings]
    facts = {"flops": plan.flops, "separate_flops": plan.separate_flops, "bytes": plan.bytes}
    return {**facts, "memory": engine.memory, "steps": steps}


@verb(first="patch per_class confusion plot base_data", panel="Data")
def evaluate(
    console: Screen,
    network: opt.PatchNetwork,
    reading: read.Source,
    data: list[str] = Argument(..., help="The task's data, as for fit; by default it is read as for the fit."),
    patch: Path = Option(..., "--patch", "-p", help="The patch file, or a cascade's."),
    base_data: str | None = Option(None, help="Data of the base's own classes, for the harmonic mean."),
    per_class: bool = Option(False, help="List every class: precision, recall and F1, or its own figure."),
    confusion: bool = Option(False, "--confusion", help="Print the confusion matrix with its counts."),
    plot: Path | None = Option(None, help="A picture of the confusion matrix."),
    seed: int | None = Option(None, help="Seed of the test split if the data has none; by default that of the fit."),
    alpha: opt.AlphaOption = None,
    device: opt.DeviceOption = "cpu",
) -> None:
    """Measure a patch or a cascade on the test images of its task, with the metrics of its kind of task."""
    from modelpatch.data.task import accuracy_by_task
    from modelpatch.recipes.cascading import evaluate_cascade
    from modelpatch.report.scores import class_table, confusion_table
    from modelpatch.tasks.classification import Evaluation
    from modelpatch.tasks.kind import kind_of
    from modelpatch.tasks.scores import score_classes
    from modelpatch.train.evaluation import evaluate_base, harmonic_mean

    loaded = opt.read_answering(patch, alpha)
    base = network.open(loaded, patch, device)
    task = reading.load_own(loaded, data, seed)
    own = None if base_data is None else mp.load_task(base_data, hold_out=False)
    with opt.naming(patch), console.progress("eval") as bar, bar.task(task.task.name, len(task.test)) as advance:
        figures: dict[str, Any] = {}
        if isinstance(loaded, mp.Patch):
            result = mp.evaluate(base, loaded, task, advance)
        else:
            result, routed = evaluate_cascade(base, loaded, task, advance)
            figures = {"macs": routed.macs, "answered": list(routed.answered)}
    figures |= result.as_dict()
    if isinstance(result, Evaluation) and (by_task := accuracy_by_task(result, task)):
        figures["by_task"] = by_task
    if own is not None:
        figures["base_top1"] = evaluate_base(base, own).top1
        figures["harmonic_mean"] = harmonic_mean(result.score, figures["base_top1"])
    kind, counts, classes = kind_of(loaded.task.kind), result.confusion, loaded.task.classes
    console.show(tables.evaluation_table(loaded.task, figures, per_class and counts is None))
    if counts is not None:
        figures["by_class"] = [asdict(one) for one in score_classes(counts, classes)]
        more = {} if kind.classifies else {kind.per_class: result.per_class}  # top-1 of a class is its recall
        found = [class_table(counts, classes, kind.counted, more)] * per_class
        for table in found + [confusion_table(counts, classes, kind.counted)] * confusion:
            console.print()
            console.show(table)
    console.write_json(figures)
    if counts is None and (confusion or plot is not None):
        option = "--confusion" if confusion else f"--plot {plot}"
        raise ModelpatchError(f"{option}: {kind.name} tasks have no confusion matrix. Leave it out.")
    console.draw(plot, plots.plot_confusion, result, kind.metrics[kind.metric], loaded.task.classes)


@verb(first="backbone data plot")
def inspect(
    console: Screen,
    network: opt.CheckedNetwork,
    reading: read.Source,
    patch: Path = Argument(..., help="The patch file."),
    plot: Path | None = Option(None, help="A picture of the bytes per part, or with --data of the weights of skips."),
    data: str | None = Option(None, help="The task's data, as for eval: measure the weights of skips, and variances."),
    signer: SignerOption = None,
) -> None:
    """Show the contents of a patch: hashes, settings, measured figures, signers, and the bytes of every part.

    With `--backbone own` parts are grouped by the segments of the patch's network, which is built without its weights.
    """
    from modelpatch.patch.signing import describe_signature

    signers = signers_of(signer)
    loaded = mp.Patch.load(patch, signers=signers)
    reading.check_data(data)
    if data is not None:
        import modelpatch.report.measures as measures

        measures.check_skips(loaded)
    base = chain = None
    if network.backbone == opt.OWN and data is None:
        chain = opt.chain_of(loaded, patch, opt.parse_arguments(network.argument))
    elif network.backbone is not None or data is not None:
        base = network.open(loaded, patch)
        chain = base.chain
    inspection = loaded.inspect(chain)
    console.show(tables.inspection_table(inspection), tables.parts_table(inspection))
    if chain is None:
        why = "cannot be built here: name another with" if network.backbone else f"names segments: --backbone {opt.OWN}"
        console.tell(f"the backbone {loaded.backbone.spec} {why}")
    line, signature = describe_signature(patch, signers)
    console.tell(line)
    figures = {**inspection.as_dict(), "signature": signature}
    picture: tuple[Any, ...] = plots.plot_inspection, inspection
    if data is not None and base is not None:
        task = reading.load_own(loaded, [data], hold_out=False)
        with console.progress("skips") as bar, bar.task("images", len(task.test)) as advance:
            records = measures.measure_skips(base, loaded, task.test, advance)
        names = measures.stage_names(base, records)
        console.print()
        console.show(measures.skips_table(records, names), measures.variances_table(records, names))
        figures["skips"] = [{"stage": name, **one.as_dict()} for name, one in zip(names, records, strict=True)]
        title = f"{loaded.task.name}: weights of the skips over {len(task.test)} images"
        picture = measures.plot_skip_weights, records, names, title
    console.write_json(figures)
    console.draw(plot, *picture)


@verb(first="backbone signer json")
def verify(
    console: Screen,
    network: opt.CheckedNetwork,
    patch: list[Path] = Argument(..., help="Patch files."),
    signer: SignerOption = None,
    file_only: bool = Option(False, "--file-only", hidden=True),
) -> None:
    """Check patch files: every byte, name and number; with --backbone also that they fit the frozen network, with --signer
    that one of the signers has signed them.

    A file is intact, refused, or unchecked if its backbone cannot be loaded. Exit status 1 unless all are intact.
    """
    from rich.markup import escape

    signers = signers_of(signer)
    results = []
    for path in patch:
        result, line = _check(path, None if network.backbone is None or file_only else network, signers)
        results.append(result)
        status, color = result["status"], COLORS[result["status"]]
        console.print(f"[{color}]{status:<9}[/{color}] {escape(line)}", soft_wrap=True, highlight=False)
    console.write_json(results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def _check(path: Path, network: opt.PatchNetwork | None, signers: Signers | None) -> tuple[Row, str]:
    """The result of one file, as written to the JSON, and the line about it."""
    from modelpatch.patch.contents import decode_patch, read_patch_file
    from modelpatch.patch.signing import check_file_signer

    row: Row = {"patch": str(path), "ok": True, "status": "intact", "checked": "nothing"}
    try:
        data = read_patch_file(path)
        patch = decode_patch(data, str(path))
        row["checked"] = "file"
        if signers is not None:
            row["signer"] = check_file_signer(path, data, signers).name
        if network is not None:
            mp.PatchedModel(network.open(patch, path), patch)
            row["checked"] = f"file and backbone {patch.backbone.spec}"
    except ModelpatchError as error:
        name, unchecked = type(error).__name__, isinstance(error, BackboneError | MissingExtraError)
        row |= {"ok": False, "status": "unchecked" if unchecked else "refused", "error": name, "message": str(error)}
        why = "the file is intact, its backbone was not checked" if unchecked and row["checked"] == "file" else name
        return row, f"{path}: {why}: {str(error).removeprefix(f'{path}: ')}"
    by = f", signed by {row['signer']}" if signers else ""
    more = "; -b own checks that it fits its backbone too" if network is None else ""
    return row, f"{path}: {row['checked']}{by}{more}"
