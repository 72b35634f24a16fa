"""Verbs that convert: `extract` checkpoints to patches, `merge` and `diff` patches, `export` models."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from typer import Argument, Option

import modelpatch as mp
from modelpatch.cli import options as opt
from modelpatch.cli import reading as read
from modelpatch.cli.console import Screen, check_once, check_out, read_names
from modelpatch.cli.using import add_tasks
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError, PatchError
from modelpatch.report import tables


@verb(first="backbone finetuned out codec data", panel="Extraction")
def extract(
    console: Screen,
    network: opt.FineTunedNetwork,
    reading: read.Source,
    finetuned: Path = Option(
        ..., help="The checkpoint: safetensors, a .pth of tensors, an index of shards or a folder."
    ),
    out: Path | None = Option(None, "--out", "-o", help="The patch file; by default CHECKPOINT.patch.safetensors."),
    force: opt.ForceOption = False,
    codec: str = Option("float16", help="Coding: exact, float16, bfloat16, int8, sign, two-bit or low-rank."),
    rank: int = Option(8, help="Rank of low-rank differences."),
    data: str | None = Option(None, help="The task's data, as for fit: measure every codec on its test images."),
    calibrate: int = Option(200, min=0, help="With --data: steps that learn the scales of sign on training images."),
    image_size: int | None = Option(None, help="Pixels of the checkpoint's images; by default the backbone's."),
    part: str | None = Option(None, help="One of several networks in the checkpoint, such as model_ema or student."),
    head: str | None = Option(None, help="The layer of its head, where there are several."),
) -> None:
    """Turn an existing fine-tuned checkpoint into a patch of the base it started from.

    With --data every codec is measured, and the patch of --codec written with its accuracy. --classes are the names of the
    head's outputs in their order, and of the data's classes where there is data.
    """
    from modelpatch.backbone.states import read_states
    from modelpatch.convert.extraction import DELTA_CODECS, read_finetuned
    from modelpatch.report.measures import CALIBRATED, SIZED, codec_table, compare_codecs

    path = out or finetuned.with_name(f"{finetuned.stem}.patch.safetensors")
    check_out(path, force)
    names = read_names("--classes", reading.classes)
    reading.check_data(data, "classes")
    task = None if data is None else reading.load(data, 0)
    states = read_states(finetuned)
    backbone = network.open()
    with opt.naming(finetuned):
        state = read_finetuned(backbone, states, part, head)
    options: dict[str, Any] = {"rank": rank, "image_size": image_size}
    figures = []
    if task is None:
        patch = mp.extract(backbone, state, codec=codec, name=finetuned.stem, classes=names, **options)
    else:
        mp.extract(backbone, state, codec=codec, classes=task.classes, **options)  # refuses a wrong checkpoint at once
        total = len(DELTA_CODECS) + len(SIZED) * bool(calibrate)
        with console.progress("extract") as bar, bar.task("codecs", total) as advance:
            rows, patches = compare_codecs(backbone, state, task, advance=advance, calibration=calibrate, **options)
        patch = patches[f"{codec}{CALIBRATED}" if codec in SIZED and calibrate else codec]
        console.show(codec_table(f"{task.task.name}: {finetuned.name} over {backbone.spec}", rows))
        console.print()
        figures = [asdict(row) for row in rows]
    _write(console, patch, path, codecs=figures)


@verb(first="out weights rule head", panel="Merging")
def merge(
    console: Screen,
    network: opt.NamedNetwork,
    patches: list[Path] = Argument(..., help="Patch files of one backbone."),
    out: Path = Option(..., "--out", "-o", help="The merged patch file."),
    force: opt.ForceOption = False,
    weights: str | None = Option(None, help="Comma-separated factors of the patches; by default 1 / n, for ties 1."),
    rule: str = Option("sum", help="The rule: sum, ties or dare."),
    density: float = Option(0.2, help="ties: share of the largest numbers to keep."),
    drop: float = Option(0.9, help="dare: share of numbers to drop."),
    head: str = Option("0", help="The head: a patch's by its number from 0, or 'all' for all classes side by side."),
    alpha: opt.AlphaOption = None,
    seed: opt.SeedOption = 0,
) -> None:
    """Combine the bodies of several patches of one backbone into one patch."""
    check_out(out, force)
    try:
        factors = None if weights is None else [float(part) for part in weights.split(",")]
    except ValueError:
        raise PatchError(f"--weights {weights!r} is not numbers separated by commas.") from None
    if head != "all" and not head.isdecimal():
        raise PatchError(f"--head {head!r} is neither 'all' nor the number of a patch from 0.")
    chosen: int | Literal["all"] = "all" if head == "all" else int(head)
    loaded = [opt.at_alpha(mp.Patch.load(path), alpha) for path in patches]
    base = _common_backbone(patches, loaded, network)
    options: dict[str, Any] = {"rule": rule, "density": density, "drop": drop, "seed": seed}
    _write(console, mp.merge(base, loaded, weights=factors, head=chosen, **options), out)


@verb()
def diff(
    console: Screen,
    network: opt.PatchNetwork,
    first: Path = Argument(..., help="A patch file."),
    second: Path = Argument(..., help="Another of the same backbone."),
) -> None:
    """Compare two patches: the sizes of their changes, their distance and cosine, one row per tensor."""
    from modelpatch.convert.merging import diff as run_diff

    loaded = [mp.Patch.load(path) for path in (first, second)]
    difference = run_diff(_common_backbone([first, second], loaded, network), *loaded)
    console.show(*tables.difference_tables(difference, first.name, second.name))
    console.print()
    console.tell("the two compute the same" if difference.same else "the two compute different answers")
    console.write_json(difference.as_dict())


def _write(console: Screen, patch: "mp.Patch", path: Path, **figures: Any) -> None:
    """Save a patch and show its contents."""
    patch.save(path)
    inspection = patch.inspect()
    console.show(tables.inspection_table(inspection))
    console.tell(f"wrote {path} ({inspection.file_bytes:,} bytes)")
    console.write_json({**inspection.as_dict(), **figures})


def _common_backbone(paths: list[Path], patches: "list[mp.Patch]", network: opt.NamedNetwork) -> "mp.Backbone":
    from modelpatch.convert.merging import check_pair

    for path, patch in zip(paths[1:], patches[1:], strict=True):
        with opt.naming(path):
            check_pair(patches[0], patch)
    return network.open(patches[0], paths[0])


@verb(first="form out one_graph data")
def export(
    console: Screen,
    network: opt.PatchNetwork,
    reading: read.Source,
    patch: list[Path] = Argument(..., help="The patch file; several with --one-graph."),
    form: str | None = Option(
        None, "--format", "-f", help="safetensors (by default), torch-export or onnx; with --one-graph onnx."
    ),
    out: Path | None = Option(None, "--out", "-o", help="The file; by default PATCH-model with its suffix."),
    one_graph: bool = Option(
        False, "--one-graph", help="One graph with an output a patch; what they share is in it once."
    ),
    force: opt.ForceOption = False,
    data: str | None = Option(None, help="onnx: data on whose test images to compare onnxruntime and PyTorch."),
    images: int = Option(500, min=1, help="Number of these images, at most."),
    alpha: opt.AlphaOption = None,
) -> None:
    """Write the patched model as an ordinary model: weights for timm, a program for PyTorch, or an ONNX graph.

    With --one-graph several patches become one graph, in which their common layers run once.
    """
    import torch

    from modelpatch.backbone.graphs import GRAPHS
    from modelpatch.backbone.tuning import Tuning
    from modelpatch.convert.exporting import SUFFIXES, Agreement, check_graph, check_onnx
    from modelpatch.convert.exporting import export as run_export

    form = form or ("onnx" if one_graph else "safetensors")
    reading.check_data(data)
    if data is not None and form != "onnx":
        raise ModelpatchError("--data checks the format onnx. Leave it out, or give --format onnx.")
    if one_graph and form not in GRAPHS:
        raise ModelpatchError(f"--one-graph writes one of: {', '.join(GRAPHS)}. --format {form} holds one patch.")
    if len(patch) > 1 and not one_graph:
        raise ModelpatchError(f"{len(patch)} patches are given. Export one at a time, or all in one with --one-graph.")
    check_once(patch)
    path = out or patch[0].with_name(f"{patch[0].stem}-model{SUFFIXES.get(form, '')}")
    if one_graph and path.suffix != GRAPHS[form]:
        raise ModelpatchError(f"--out {path}: with --one-graph a file of the format {form} ends in {GRAPHS[form]}.")
    check_out(path, force)
    loaded = {one: opt.at_alpha(mp.Patch.load(one), alpha) for one in patch}
    base = _common_backbone(patch, list(loaded.values()), network)
    first = next(iter(loaded.values()))
    test = None if data is None else reading.load_own(first, [data], hold_out=False).test.images
    if one_graph:
        engine = mp.Engine(base, tuning=Tuning())
        tasks = add_tasks(engine, loaded)
        engine.export(path, tasks)
    else:
        with opt.naming(patch[0]):
            run_export(base, loaded[patch[0]], path, form)
    figures: dict[str, Any] = {"out": str(path), "format": form, "bytes": path.stat().st_size}
    console.tell(f"wrote {path} ({figures['bytes']:,} bytes, {form})")
    agreements: dict[str, Agreement] = {}
    if test is not None:
        sources = [test[row] for row in torch.linspace(0, len(test) - 1, min(images, len(test))).long().tolist()]
        if one_graph:
            agreements = check_graph(path, engine, tasks, sources)
            figures["tasks"] = {name: asdict(one) for name, one in agreements.items()}
        else:
            own = loaded[patch[0]]
            agreements = {own.task.name: check_onnx(path, base.patched(own), own.preprocessing(*sources))}
            figures |= asdict(agreements[own.task.name])
    for name, agreement in agreements.items():
        console.tell(
            f"{name}: onnxruntime and PyTorch: {agreement.equal_answers} of {agreement.images} answers equal, "
            f"logits differ by at most {agreement.max_difference:.2g}"
        )
    console.write_json(figures)
    if wrong := [name for name, agreement in agreements.items() if not agreement.holds]:
        raise ModelpatchError(f"{path} does not answer {wrong[0]} as the patched model does; do not use it.")
