"""`modelpatch demo`: train every method on the bundled network and digits, and write a report."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from modelpatch.cli.console import Screen, make_folder
from modelpatch.cli.options import SeedOption
from modelpatch.cli.verb import verb

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.data.task import Task
    from modelpatch.patch.contents import Patch
    from modelpatch.recipes.comparison import Comparison

SHOWN = "scale-bias"  # the method of the report's pictures
FASTER = {"piggyback": "piggyback(lr=0.0003)"}  # at its own rate no bit flips in so few steps
NEXT = {  # purpose: command
    "The contents of a patch": "inspect {folder}/digits-scale-bias.safetensors",
    "Every byte of the patches, and that they fit the base": "verify {folder}/*.safetensors -b own",
    "A patch for your task: YOUR_FOLDERS/train/CLASS/*.jpg, .../test/CLASS/*.jpg": (
        "fit YOUR_FOLDERS --method scale-bias"
    ),
    "All methods on your task and your backbone": "compare YOUR_FOLDERS -b timm:resnet50.a1_in1k",
}


@verb()
def demo(
    out: Path = Option(Path("demo"), help="The folder for patches, pictures and the report."),
    epochs: int = Option(3, help="Passes over the training images."),
    seed: SeedOption = 0,
) -> None:
    """Train patches with every method on real handwritten digits, show that the base is unchanged, write a report."""
    from modelpatch.backbone.load import load_backbone
    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import METHODS, make_method
    from modelpatch.recipes.comparison import compare
    from modelpatch.report.plots import check_matplotlib
    from modelpatch.report.tables import comparison_table, percent

    make_folder("--out", out)
    console = Screen(out / "comparison.json")
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
    methods = [make_method(FASTER.get(name, name)) for name in METHODS]
    result = compare(backbone, task, methods, epochs=epochs, seed=seed, batch_size=64, progress=not console.quiet)
    console.show(comparison_table(result))
    backbone.verify()
    console.print(f"The base after all of it, hashed again: [b]unchanged[/b] ({before[:16]}).")
    for name, patch in result.patches.items():
        patch.save(out / f"digits-{name}.safetensors")
    seconds = time.perf_counter() - begin
    console.write_json(result.as_dict())
    _write_report(out, backbone, task, result, accuracy)
    console.print(f"Wrote the patches and [b]{out / 'report.html'}[/b] in {seconds:.0f} s. Try next:\n")
    console.tell(suggestions(out))


def suggestions(folder: Path) -> str:
    """Commands to try next, each below its purpose, as they can be run from here."""
    pairs = [(comment, command.format(folder=shlex.quote(str(folder)))) for comment, command in NEXT.items()]
    return "\n".join(f"# {comment}\n{_program()} {command}" for comment, command in pairs)


def _program() -> str:
    """The program of this command line: `modelpatch` on the path, else the script that was started, else the module."""
    if shutil.which("modelpatch"):
        return "modelpatch"
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).stem == "modelpatch" else "python -m modelpatch"


def _write_report(out: Path, backbone: Backbone, task: Task, result: Comparison, accuracy: str) -> None:
    from modelpatch.report.html import Report
    from modelpatch.report.plots import plot_comparison, plot_confusion, plot_inspection
    from modelpatch.report.tables import comparison_cells
    from modelpatch.train.evaluation import evaluate

    best = max(result.rows, key=lambda row: row.top1).method
    small = result.patches[SHOWN]
    plot_comparison(result, out / "comparison.png")
    plot_confusion(evaluate(backbone, small, task), "top-1", task.classes, out / "confusion.png")
    plot_inspection(small.inspect(), out / f"{SHOWN}.png")
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
    report.section(f"Answers of the {SHOWN} patch", "Test images and the patch's answers: ✓ right, ✗ wrong.")
    report.samples(_samples(backbone, small, task))
    report.section("Confused digits")
    report.picture(out / "confusion.png", "Confusion matrix")
    report.section("Contents of the patch file", "Bytes of every normalisation layer it replaces, and of its head.")
    report.picture(out / f"{SHOWN}.png", "Bytes per part")
    report.section("Try next")
    report.code(suggestions(out))
    report.write(out / "report.html")


def _samples(backbone: Backbone, patch: Patch, task: Task, count: int = 16) -> list[tuple[bytes, str, str]]:
    from PIL import Image

    from modelpatch.engine.resident import BoundPatch
    from modelpatch.tasks.drawing import encode_png

    images, labels = task.test.images[:count], task.test.labels[:count]
    answers = BoundPatch(backbone, patch)(patch.preprocessing(*images)).argmax(1).tolist()
    return [
        (encode_png(Image.fromarray(image)), task.classes[answer], task.classes[label])  # type: ignore[arg-type]
        for image, answer, label in zip(images, answers, labels, strict=True)
    ]
