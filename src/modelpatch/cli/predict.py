"""modelpatch predict: answer for images with one or several patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from modelpatch.backbone import Backbone
from modelpatch.backbone.preprocess import IMAGE_SUFFIXES
from modelpatch.cli.options import JsonOption, PatchBackboneOption, backbone_of, write_json
from modelpatch.errors import DataError, ModelpatchError
from modelpatch.patch import BoundPatch, Patch
from modelpatch.report.tables import prediction_table
from modelpatch.train.progress import Progress


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders that are searched for them.")],
    patch: Annotated[list[Path], typer.Option("--patch", "-p", help="A patch file; may be repeated.")],
    backbone: PatchBackboneOption = None,
    base: Annotated[bool, typer.Option("--base", help="Also give the base's own answer.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Answers an image and task.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    json: JsonOption = None,
) -> None:
    """Answer for every image with every patch. All patches must belong to one backbone."""
    console = Console(stderr=str(json) == "-")
    files = find_images(images)
    patches = [(path, Patch.load(path)) for path in patch]
    loaded = backbone_of(patches[0][1], patches[0][0], backbone)
    bound = {name: BoundPatch(loaded, one) for name, one in _named(patches).items()}
    answers: list[dict[str, Any]] = []
    with Progress("predict") as bar, bar.task("images", len(files)) as advance:
        for at in range(0, len(files), batch_size):
            chunk = files[at : at + batch_size]
            answers += _answer(loaded, bound, base, chunk, top)
            advance(len(chunk))
    console.print(prediction_table(answers))
    write_json(json, answers)


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


def _named(patches: list[tuple[Path, Patch]]) -> dict[str, Patch]:
    """Patches by task name, or by file name where two answer tasks of the same name."""
    tasks = [patch.task.name for _, patch in patches]
    named = {patch.task.name if tasks.count(patch.task.name) == 1 else path.stem: patch for path, patch in patches}
    if len(named) < len(patches):
        raise ModelpatchError("two patches have the same task and file name; give each --patch once.")
    return named


def _answer(
    backbone: Backbone, bound: dict[str, BoundPatch], base: bool, files: list[Path], top: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"image": str(file), "tasks": {}} for file in files]
    inputs: dict[Any, torch.Tensor] = {}
    for name, patch in bound.items():
        if patch.preprocessing not in inputs:
            inputs[patch.preprocessing] = patch.preprocessing(*files)
        _fill(rows, name, patch(inputs[patch.preprocessing]), patch.task.classes, top)
    if base:
        logits = backbone(backbone.preprocessing(*files))
        _fill(rows, "base", logits, backbone.classes or tuple(map(str, range(logits.shape[1]))), top)
    return rows


def _fill(rows: list[dict[str, Any]], name: str, logits: torch.Tensor, classes: tuple[str, ...], top: int) -> None:
    scores = logits.softmax(1)
    best = scores.topk(min(top, len(classes)), dim=1)
    for row, values, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
        row["tasks"][name] = [{"label": classes[i], "probability": v} for i, v in zip(indices, values, strict=True)]
