"""`modelpatch predict`: answer for images with one or several patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import Screen, make_folder, read_names
from modelpatch.cli.options import AlphaOption, DeviceOption, PatchNetwork, Words
from modelpatch.cli.verb import verb
from modelpatch.errors import CascadeError, DataError, ModelpatchError
from modelpatch.text import count_of, file_name

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.engine import Engine
    from modelpatch.engine.inputs import Answers
    from modelpatch.patch.contents import Patch

Row = dict[str, Any]


@verb(first="patch top base labels overlay", panel="Answers")
def predict(
    console: Screen,
    network: PatchNetwork,
    words: Words,
    images: list[Path] = Argument(..., help="Image files, or folders that are searched for them."),
    patch: list[Path] = Option(..., "--patch", "-p", help="A patch file, or a cascade's; may be repeated."),
    base: bool = Option(False, "--base", help="Print the base's own answer too."),
    top: int = Option(3, min=1, help="Answers per image and task. Boxes from 50 % on are counted; --json has each."),
    batch_size: int = Option(16, min=1, help="Images in a batch."),
    workers: int = Option(0, min=0, help="Processes that decode images; 0: this one."),
    tune: bool = Option(False, "--tune", help="Measure the fastest way first: some seconds, for hundreds of images."),
    explain: bool = Option(False, "--explain", help="Print what the patches share and the time of each step."),
    plot: Path | None = Option(None, help="A picture of the plan."),
    labels: str | None = Option(None, help="Other answers than the classes, comma-separated or a file of lines."),
    overlay: Path | None = Option(None, help="A folder for pictures of masks and boxes, drawn over the images."),
    alpha: AlphaOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Answer for every image with every patch in one pass. All patches must belong to one backbone.

    An unreadable image gets an error in its row; the others are answered and the exit status is 1.
    """
    from modelpatch.backbone.tuning import Tuning
    from modelpatch.cli.loading import naming, read_answering
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.engine import BASE, Engine
    from modelpatch.patch.contents import Patch
    from modelpatch.report.tables import prediction_table
    from modelpatch.tasks.kind import kind_of

    files = gather_images(images)
    labels_given = read_names("--labels", labels)
    patches = {path: read_answering(path, alpha) for path in patch}
    if len(patches) < len(patch):
        raise ModelpatchError("a patch file is given twice. Give each --patch once.")
    leading = patches[patch[0]]
    first = leading.patches[0] if isinstance(leading, Cascade) else leading
    loaded = network.open(first, patch[0], device)
    if labels_given:
        if cascades := [path for path, one in patches.items() if isinstance(one, Cascade)]:
            raise CascadeError(f"{cascades[0]} is a cascade, bound to its own classes. Leave --labels out.")
        relabelled = {path: one for path, one in patches.items() if isinstance(one, Patch)}
        patches = {path: _relabel(loaded, one, labels_given, words) for path, one in relabelled.items()}
    elif words != Words():
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
    with console.progress("predict") as bar, bar.task("images", len(files)) as advance:
        for answers in engine.stream(files, only=tasks, batch_size=batch_size, workers=workers):
            _fill(rows, answers, engine, top, overlay)
            advance(len(answers.rows) + len(answers.errors))
    console.show(prediction_table(rows, {name: engine.kind(name) for name in tasks}))
    if overlay is not None:
        console.tell(f"drew {count_of(sum(len(row.get('overlays', {})) for row in rows), 'overlay')} in {overlay}")
    readable = [file for file, row in zip(files, rows, strict=True) if "error" not in row]
    report = _explain(engine, readable[:batch_size], tasks, console, plot) if (explain or plot) and readable else None
    console.write_json({"images": rows, "plan": report} if explain else rows)
    if broken := len(files) - len(readable):
        others = "; the others are answered" if readable else ", so that nothing is answered or explained"
        raise DataError(f"{broken} of {len(files)} images cannot be read{others}.")


def _relabel(backbone: Backbone, patch: Patch, labels: tuple[str, ...], words: Words) -> Patch:
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


def _explain(engine: Engine, files: list[Path], tasks: list[str], console: Screen, plot: Path | None) -> Row:
    """Print the plan for one batch and what its steps took; the same as facts for JSON."""
    from modelpatch.engine.plan import describe_step
    from modelpatch.report.tables import timing_table

    plan, timings = engine.explain(engine.read(files, tasks), only=tasks)
    console.tell(f"{plan}\n{engine.tuning}")
    console.show(timing_table(timings))
    if plot is not None:
        plan.draw(str(plot))
    steps = [{"step": describe_step(timing.step), "milliseconds": 1000 * timing.seconds} for timing in timings]
    facts = {"flops": plan.flops, "separate_flops": plan.separate_flops, "bytes": plan.bytes}
    return {**facts, "memory": engine.memory, "steps": steps}
