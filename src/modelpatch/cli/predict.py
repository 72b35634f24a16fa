"""`modelpatch predict`: answer for images with one or several patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import (
    JsonOption,
    check_pictures,
    make_folder,
    open_console,
    progress_of,
    read_names,
    tell,
    write_json,
)
from modelpatch.cli.options import (
    AlphaOption,
    ArgumentOption,
    DeviceOption,
    NamesOption,
    PatchBackboneOption,
    TemplateOption,
    TextOption,
)
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import CascadeError, DataError, ModelpatchError
from modelpatch.text import count_of, file_name

if TYPE_CHECKING:
    from rich.console import Console

    from modelpatch.backbone.backbone import Backbone
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.engine import Engine
    from modelpatch.engine.stream import Answers
    from modelpatch.patch.contents import Patch

Row = dict[str, Any]


@verb(first="patch top base labels overlay", panel="Answers")
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders that are searched for them.")],
    patch: Annotated[list[Path], typer.Option("--patch", "-p", help="A patch file, or a cascade's; may be repeated.")],
    backbone: PatchBackboneOption = None,
    base: Annotated[bool, typer.Option("--base", help="Print the base's own answer too.")] = False,
    top: Annotated[
        int,
        typer.Option(
            min=1, help="Answers per image and task. Boxes are counted by class from 50 % on; --json has each."
        ),
    ] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: this one.")] = 0,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Measure the fastest way to run first: some seconds, worth it for hundreds of images."
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print the shared parts of the patches and the time of each step for a batch."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture of the plan.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Any answers, comma-separated or a file with one a line, in place of the patch's classes."),
    ] = None,
    text: TextOption = None,
    names: NamesOption = None,
    template: TemplateOption = None,
    overlay: Annotated[
        Path | None, typer.Option(help="A folder for pictures of masks and boxes, drawn over the images.")
    ] = None,
    alpha: AlphaOption = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Answer for every image with every patch in one pass. All patches must belong to one backbone.

    An unreadable image gets an error in its row; the others are answered and the exit status is 1.
    """
    from modelpatch.backbone.tuning import Tuning
    from modelpatch.cli.loading import backbone_of, find_device, naming, read_answering
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.engine import BASE, Engine
    from modelpatch.patch.contents import Patch
    from modelpatch.report.tables import prediction_table, show
    from modelpatch.tasks.kind import kind_of

    console = open_console(json)
    check_pictures(plot=plot)
    files = gather_images(images)
    labels_given = read_names("--labels", labels)
    patches = {path: read_answering(path, alpha) for path in patch}
    if len(patches) < len(patch):
        raise ModelpatchError("a patch file is given twice. Give each --patch once.")
    leading = patches[patch[0]]
    first = leading.patches[0] if isinstance(leading, Cascade) else leading
    loaded = backbone_of(first, patch[0], backbone, parse_arguments(argument), find_device(device))
    if labels_given:
        if cascades := [path for path, one in patches.items() if isinstance(one, Cascade)]:
            raise CascadeError(
                f"{cascades[0]} is a cascade, whose thresholds hold for its own classes. Leave --labels out."
            )
        relabelled = {path: one for path, one in patches.items() if isinstance(one, Patch)}
        patches = {path: _relabel(loaded, one, labels_given, text, names, template) for path, one in relabelled.items()}
    elif text or names or template:
        raise ModelpatchError("--text, --names and --template are for --labels. Give --labels as well.")
    engine = Engine(loaded, tuning=None if tune else Tuning())
    for name, path in _names(patches).items():
        with naming(path):
            engine.add(name, patches[path])
    tasks = [name for name in engine if base or name != BASE]
    if overlay is not None:
        if not any(kind_of(engine.kind(name)).draws for name in tasks):
            raise ModelpatchError(f"--overlay {overlay}: none of the patches answers for pixels.")
        make_folder("--overlay", overlay)
    rows: list[Row] = [{"image": str(file), "tasks": {}} for file in files]
    with progress_of(console, "predict") as bar, bar.task("images", len(files)) as advance:
        for answers in engine.stream(files, only=tasks, batch_size=batch_size, workers=workers):
            _fill(rows, answers, engine, top, overlay)
            advance(len(answers.rows) + len(answers.errors))
    show(console, prediction_table(rows, {name: engine.kind(name) for name in tasks}))
    if overlay is not None:
        tell(console, f"drew {count_of(sum(len(row.get('overlays', {})) for row in rows), 'overlay')} in {overlay}")
    readable = [file for file, row in zip(files, rows, strict=True) if "error" not in row]
    report = _explain(engine, readable[:batch_size], tasks, console, plot) if (explain or plot) and readable else None
    write_json(json, {"images": rows, "plan": report} if explain else rows)
    if broken := len(files) - len(readable):
        others = "; the others are answered" if readable else ", so that nothing is answered or explained"
        raise DataError(f"{broken} of {len(files)} images cannot be read{others}.")


def _relabel(
    backbone: Backbone,
    patch: Patch,
    labels: tuple[str, ...],
    text: str | None,
    names: Path | None,
    template: list[str] | None,
) -> Patch:
    """The patch with a head for `labels`, made as recorded in its file except for the options given."""
    from modelpatch.backbone.text_tower import PACKAGES
    from modelpatch.cli.loading import open_vocabulary

    recorded = patch.method.hyperparameters
    told = next((name for name in PACKAGES if recorded.get("text") == name), None)  # files name packages, never folders
    if text is None and backbone.text is None and told is None:
        raise ModelpatchError(
            f"the patch of {patch.task.name} names no text tower for labels. Name one with --text, such as minilm."
        )
    kept = recorded.get("templates")
    written = [one for one in kept if isinstance(one, str)] if isinstance(kept, list) else []
    vocabulary = open_vocabulary(backbone, text or told, names, template or written)
    if vocabulary is None:
        raise ModelpatchError("--text none makes no head for --labels. Name a text tower.")
    return vocabulary.relabel(patch, labels)


def gather_images(paths: list[Path]) -> list[Path]:
    """Image files in the given order; folders are searched. Raises `DataError` if there are none."""
    from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES, find_images

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += find_images(path)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no image or folder {path}.")
    if not files:
        raise DataError(f"no images in {', '.join(map(str, paths))}. Known kinds: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    return files


def _names(patches: Mapping[Path, Patch | Cascade]) -> dict[str, Path]:
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


def _fill(rows: list[Row], answers: Answers, engine: Engine, top: int, folder: Path | None) -> None:
    """Write a batch's answers and errors into the rows of its images, and draw answers into a folder if there is one."""
    from modelpatch.tasks.drawing import encode_png
    from modelpatch.tasks.kind import View, kind_of

    for place, error in answers.errors.items():
        rows[place]["error"] = error
    for name, found in answers.logits.items():
        kind, classes, seen = kind_of(engine.kind(name)), engine.classes(name), engine.preprocessing(name)
        for place, answer in zip(answers.rows, kind.reduce(found, top), strict=True):
            row = rows[place]
            view = View(classes, seen, Path(row["image"]))
            row["tasks"][name] = kind.describe(answer, view, top)
            if folder is not None and kind.draws:
                path = folder / f"{place:05}-{Path(row['image']).stem}-{file_name(name)}.png"
                write_bytes(path, encode_png(kind.draw(answer, view)))
                row.setdefault("overlays", {})[name] = str(path)


def _explain(engine: Engine, files: list[Path], tasks: list[str], console: Console, plot: Path | None) -> Row:
    """Print the plan for one batch and what its steps took; the same as facts for JSON."""
    from modelpatch.engine.describe import describe_step
    from modelpatch.report.tables import show, timing_table

    plan, timings = engine.explain(engine.read(files, tasks), only=tasks)
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    console.print(str(engine.tuning), markup=False, highlight=False, soft_wrap=True)
    show(console, timing_table(timings))
    if plot is not None:
        plan.draw(str(plot))
    steps = [{"step": describe_step(timing.step), "milliseconds": 1000 * timing.seconds} for timing in timings]
    return {
        "flops": plan.flops,
        "separate_flops": plan.separate_flops,
        "bytes": plan.bytes,
        "memory": engine.memory,
        "steps": steps,
    }
