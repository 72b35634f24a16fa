"""modelpatch predict: answer for images with one or several patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from modelpatch.backbone import Backbone, Preprocessing
from modelpatch.backbone.preprocess import IMAGE_SUFFIXES
from modelpatch.backbone.text import PACKAGES
from modelpatch.cli.options import (
    AlphaOption,
    ArgumentOption,
    DeviceOption,
    NamesOption,
    PatchBackboneOption,
    TemplateOption,
    TextOption,
    at_alpha,
    backbone_of,
    find_device,
    naming,
    open_vocabulary,
    parse_arguments,
)
from modelpatch.cli.outputs import JsonOption, check_file, open_console, read_names, write_json
from modelpatch.errors import DataError, ModelpatchError
from modelpatch.patch import BoundPatch, Patch
from modelpatch.report.tables import prediction_table, show
from modelpatch.train.progress import Progress

Row = dict[str, Any]


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders that are searched for them.")],
    patch: Annotated[list[Path], typer.Option("--patch", "-p", help="A patch file; may be repeated.")],
    backbone: PatchBackboneOption = None,
    base: Annotated[bool, typer.Option("--base", help="Also give the base's own answer.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Answers an image and task.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    labels: Annotated[
        str | None,
        typer.Option(help="Any answers, comma-separated or a file with one a line, in place of the patch's classes."),
    ] = None,
    text: TextOption = None,
    names: NamesOption = None,
    template: TemplateOption = None,
    alpha: AlphaOption = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Answer for every image with every patch. All patches must belong to one backbone.

    An image that cannot be read gets an error in its row; the others are answered and the exit status is 1.
    """
    console = open_console(json)
    check_file("--json", json)
    files = find_images(images)
    labels_given = read_names("--labels", labels)
    patches = {path: at_alpha(Patch.load(path), alpha) for path in patch}
    if len(patches) < len(patch):
        raise ModelpatchError("a patch file is named twice; give each --patch once.")
    loaded = backbone_of(patches[patch[0]], patch[0], backbone, parse_arguments(argument), find_device(device))
    if labels_given:
        patches = {path: _relabel(loaded, one, labels_given, text, names, template) for path, one in patches.items()}
    elif text or names or template:
        raise ModelpatchError("--text, --names and --template say how --labels are read. Give --labels as well.")
    bound = {name: _bind(loaded, path, patches[path]) for name, path in _names(patches).items()}
    answers: list[Row] = []
    with Progress("predict") as bar, bar.task("images", len(files)) as advance:
        for at in range(0, len(files), batch_size):
            chunk = files[at : at + batch_size]
            answers += _answer(loaded, bound, base, chunk, top)
            advance(len(chunk))
    show(console, prediction_table(answers))
    write_json(json, answers)
    if broken := sum("error" in answer for answer in answers):
        raise DataError(f"{broken} of {len(files)} images cannot be read; the others are answered.")


def _relabel(
    backbone: Backbone,
    patch: Patch,
    labels: tuple[str, ...],
    text: str | None,
    names: Path | None,
    template: list[str] | None,
) -> Patch:
    """The patch with a head for `labels`, made as its file says unless the options say otherwise."""
    recorded = patch.method.hyperparameters
    told = next((name for name in PACKAGES if recorded.get("text") == name), None)  # files name packages, never folders
    if text is None and backbone.text is None and told is None:
        raise ModelpatchError(
            f"the patch of {patch.task.name} does not say which text tower reads labels. Name one with --text, such as minilm."
        )
    kept = recorded.get("templates")
    written = [one for one in kept if isinstance(one, str)] if isinstance(kept, list) else []
    vocabulary = open_vocabulary(backbone, text or told, names, template or written)
    if vocabulary is None:
        raise ModelpatchError("--text none makes no head for --labels. Name a text tower.")
    return vocabulary.relabel(patch, labels)


def find_images(paths: list[Path]) -> list[Path]:
    """Image files in the order given; folders are searched through. Raises `DataError` where there are none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no image or folder {path}.")
    if not files:
        raise DataError(f"no images in {', '.join(map(str, paths))}. Known kinds: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    return files


def _names(patches: dict[Path, Patch]) -> dict[str, Path]:
    """Files by task name, or by file name where two answer tasks of the same name."""
    tasks = [patch.task.name for patch in patches.values()]
    named = {
        patch.task.name if tasks.count(patch.task.name) == 1 else path.stem: path for path, patch in patches.items()
    }
    if len(named) < len(patches):
        raise ModelpatchError("two patches have the same task and file name; give each --patch once.")
    return named


def _bind(backbone: Backbone, path: Path, patch: Patch) -> BoundPatch:
    with naming(path):
        return BoundPatch(backbone, patch)


def _answer(backbone: Backbone, bound: dict[str, BoundPatch], base: bool, files: list[Path], top: int) -> list[Row]:
    """A row an image, with its tasks' answers or the error of an image that cannot be read."""
    kinds = {patch.preprocessing for patch in bound.values()} | ({backbone.preprocessing} if base else set())
    rows: list[Row] = [{"image": str(file), "tasks": {}} for file in files]
    pixels = [_decode(row, file, kinds) for row, file in zip(rows, files, strict=True)]
    readable = [row for row in rows if "error" not in row]
    if not readable:
        return rows
    inputs = {
        kind: kind.normalize(kind.center_crop(torch.stack([one[kind] for one in pixels if one]))).to(backbone.device)
        for kind in kinds
    }
    for name, patch in bound.items():
        _fill(readable, name, patch(inputs[patch.preprocessing]), patch.task.classes, top)
    if base:
        logits = backbone(inputs[backbone.preprocessing])
        _fill(readable, "base", logits, backbone.classes or tuple(map(str, range(logits.shape[1]))), top)
    return rows


def _decode(row: Row, file: Path, kinds: set[Preprocessing]) -> dict[Preprocessing, Tensor]:
    """The image as every preprocessing decodes it; nothing, and an error in its row, for one that cannot be read."""
    try:
        return {kind: kind.decode(file) for kind in kinds}
    except DataError as error:
        row["error"] = str(error)
        return {}


def _fill(rows: list[Row], name: str, logits: Tensor, classes: tuple[str, ...], top: int) -> None:
    scores = logits.softmax(1)
    best = scores.topk(min(top, len(classes)), dim=1)
    for row, values, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
        row["tasks"][name] = [{"label": classes[i], "probability": v} for i, v in zip(indices, values, strict=True)]
