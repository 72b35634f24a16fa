"""modelpatch demo: the main job on what the package bundles."""

from __future__ import annotations

import io
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.cli.options import SeedOption
from modelpatch.cli.outputs import make_folder, open_console, tell, write_json
from modelpatch.data.task import Task, load_task
from modelpatch.engine.resident import BoundPatch
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.registry import METHODS
from modelpatch.patch.contents import Patch
from modelpatch.recipes import compare
from modelpatch.recipes.comparison import Comparison
from modelpatch.report.html import Report
from modelpatch.report.plots import check_matplotlib, plot_comparison, plot_confusion, plot_inspection
from modelpatch.report.tables import comparison_cells, comparison_table, percent, show
from modelpatch.train.evaluation import evaluate_classes

NEXT = {  # what a command is for: the command
    "What a patch holds": "inspect {folder}/digits-scale-bias.safetensors",
    "Every byte of the patches, and that they fit the base": "verify {folder}/*.safetensors",
    "A patch for your task: YOUR_FOLDERS/train/CLASS/*.jpg, .../test/CLASS/*.jpg": (
        "fit YOUR_FOLDERS --method scale-bias"
    ),
    "All methods on your task and your backbone": "compare YOUR_FOLDERS -b timm:resnet50.a1_in1k",
}


def demo(
    out: Annotated[Path, typer.Option(help="The folder for patches, pictures and the report.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 3,
    seed: SeedOption = 0,
) -> None:
    """Train patches with every method on real handwritten digits, show that the base is unchanged, write a report."""
    console = open_console()
    make_folder("--out", out)
    check_matplotlib("The demo's report")
    begin = time.perf_counter()
    backbone = load_backbone("bundled:tiny")
    task = load_task("bundled:digits", seed=seed)
    accuracy = percent(backbone.about["cifar10_test_top1"])
    console.print(
        f"One frozen backbone, [b]bundled:tiny[/b]: {sum(p.numel() for p in backbone.module.parameters()):,} parameters, "
        f"trained on CIFAR-10 photos ({accuracy} % there).\n"
        f"A task it has never seen: {len(task.train):,} real images of handwritten digits. Training one patch a method ..."
    )
    before = backbone.fingerprint
    masks = Piggyback(lr=3e-4)  # at the method's own rate no bit flips in so few steps
    methods = [masks if name == "piggyback" else name for name in METHODS]
    result = compare(backbone, task, methods, epochs=epochs, seed=seed, batch_size=64, progress=True)
    show(console, comparison_table(result))
    backbone.verify()
    console.print(f"The base after all of it, hashed again: [b]unchanged[/b] ({before[:16]}).")
    for name, patch in result.patches.items():
        patch.save(out / f"digits-{name}.safetensors")
    seconds = time.perf_counter() - begin
    write_json(out / "comparison.json", result.as_dict())
    _write_report(out, backbone, task, result, accuracy)
    console.print(f"Wrote the patches and [b]{out / 'report.html'}[/b] in {seconds:.0f} s. What to try next:\n")
    tell(console, suggestions(out))


def suggestions(folder: Path) -> str:
    """What to try next: every command below what it is for, spelled as it can be run from here."""
    pairs = [(comment, command.format(folder=shlex.quote(str(folder)))) for comment, command in NEXT.items()]
    return "\n".join(f"# {comment}\n{_program()} {command}" for comment, command in pairs)


def _program() -> str:
    """What runs this command line again: `modelpatch` on the path, else the script that was started, else the module."""
    if shutil.which("modelpatch"):
        return "modelpatch"
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).stem == "modelpatch" else "python -m modelpatch"


def _write_report(out: Path, backbone: Backbone, task: Task, result: Comparison, accuracy: str) -> None:
    best = max(result.rows, key=lambda row: row.top1).method
    small = result.patches["scale-bias"]
    plot_comparison(result, out / "comparison.png")
    plot_confusion(evaluate_classes(backbone, small, task), "top-1", task.classes, out / "confusion.png")
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
    report.section("Answers of the scale-bias patch", "Test images and what the patch says: ✓ right, ✗ wrong.")
    report.samples(_samples(backbone, small, task))
    report.section("Which digits it mixes up")
    report.picture(out / "confusion.png", "Confusion matrix")
    report.section("What is in the patch file", "Bytes of every normalisation layer it replaces, and of its head.")
    report.picture(out / "scale-bias.png", "Bytes per part")
    report.section("What to try next")
    report.code(suggestions(out))
    report.write(out / "report.html")


def _samples(backbone: Backbone, patch: Patch, task: Task, count: int = 16) -> list[tuple[bytes, str, str]]:
    images, labels = task.test.images[:count], task.test.labels[:count]
    answers = BoundPatch(backbone, patch)(patch.preprocessing(*images)).argmax(1).tolist()
    return [
        (_png(image), task.classes[answer], task.classes[label])
        for image, answer, label in zip(images, answers, labels, strict=True)
    ]


def _png(image: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")  # type: ignore[arg-type]
    return buffer.getvalue()
