"""modelpatch demo: the main job on what the package bundles."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console

from modelpatch.backbone import Backbone, load_backbone
from modelpatch.cli.options import SeedOption, write_json
from modelpatch.methods import METHODS
from modelpatch.patch import BoundPatch, Patch
from modelpatch.report.html import Report
from modelpatch.report.plots import plot_comparison, plot_confusion, plot_inspection
from modelpatch.report.tables import comparison_cells, comparison_table, percent
from modelpatch.train import Comparison, TaskData, compare, evaluate, load_task

NEXT = """\
modelpatch inspect {folder}/digits-scale-bias.safetensors        # what a patch holds
modelpatch verify {folder}/*.safetensors                         # every byte, and that it fits the base
modelpatch fit YOUR_FOLDERS --method scale-bias                  # YOUR_FOLDERS/train/CLASS/*.jpg, .../test/CLASS/*.jpg
modelpatch compare YOUR_FOLDERS -b timm:resnet50.a1_in1k         # all methods on your task and your backbone"""


def demo(
    out: Annotated[Path, typer.Option(help="The folder for patches, pictures and the report.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 3,
    seed: SeedOption = 0,
) -> None:
    """Train patches with every method on real handwritten digits, show that the base is unchanged, write a report."""
    console = Console()
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone("bundled:tiny")
    task = load_task("bundled:digits", seed=seed)
    accuracy = percent(backbone.about["cifar10_test_top1"])
    console.print(
        f"One frozen backbone, [b]bundled:tiny[/b]: {sum(p.numel() for p in backbone.module.parameters()):,} parameters, "
        f"trained on CIFAR-10 photos ({accuracy} % there).\n"
        f"A task it has never seen: {len(task.train):,} real images of handwritten digits. Training one patch a method ..."
    )
    before = backbone.fingerprint
    result = compare(backbone, task, tuple(METHODS), epochs=epochs, seed=seed, batch_size=64, progress=True)
    console.print(comparison_table(result))
    backbone.verify()
    console.print(f"The base after all of it, hashed again: [b]unchanged[/b] ({before[:16]}).")
    for name, patch in result.patches.items():
        patch.save(out / f"digits-{name}.safetensors")
    seconds = time.perf_counter() - begin
    _write_report(out, backbone, task, result, accuracy)
    write_json(out / "comparison.json", result.as_dict())
    console.print(f"Wrote the patches and [b]{out / 'report.html'}[/b] in {seconds:.0f} s. What to try next:\n")
    console.print(NEXT.format(folder=out), highlight=False, soft_wrap=True)


def _write_report(out: Path, backbone: Backbone, task: TaskData, result: Comparison, accuracy: str) -> None:
    best = max(result.rows, key=lambda row: row.top1).method
    small = result.patches["scale-bias"]
    plot_comparison(result, out / "comparison.png")
    plot_confusion(evaluate(backbone, small, task), task.classes, out / "confusion.png")
    plot_inspection(small.inspect(), out / "scale-bias.png")
    report = Report(
        "One backbone, one more task",
        f"bundled:tiny was trained on photos (CIFAR-10, {accuracy} % top-1) and then frozen. Each row below taught it to "
        f"read {len(task.train):,} handwritten digits through a patch file; {len(task.test):,} other digits measured it.",
    )
    report.section("Methods side by side", f"The most accurate is {best}.")
    report.table(*comparison_cells(result))
    report.picture(out / "comparison.png", "Accuracy and file size of every method")
    report.section(
        "The base is unchanged",
        f"SHA-256 over every parameter and buffer, before and after all training: {backbone.fingerprint}.",
    )
    report.section("Answers of the scale-bias patch", "Test images and what the patch says; wrong answers are red.")
    report.samples(_samples(backbone, small, task))
    report.section("Which digits it mixes up")
    report.picture(out / "confusion.png", "Confusion matrix")
    report.section("What is in the patch file", "Bytes of every normalisation layer it replaces, and of its head.")
    report.picture(out / "scale-bias.png", "Bytes per part")
    report.section("What to try next")
    report.code(NEXT.format(folder=out))
    report.write(out / "report.html")


def _samples(backbone: Backbone, patch: Patch, task: TaskData, count: int = 16) -> list[tuple[bytes, str, bool]]:
    images, labels = task.test.images[:count], task.test.labels[:count]
    answers = BoundPatch(backbone, patch)(patch.preprocessing(*images)).argmax(1).tolist()
    return [
        (_png(image), task.classes[answer], answer == label)
        for image, answer, label in zip(images, answers, labels, strict=True)
    ]


def _png(image: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")  # type: ignore[arg-type]
    return buffer.getvalue()
