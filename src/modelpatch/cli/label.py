"""`modelpatch label`: find the images to label next."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import (
    JsonOption,
    check_file,
    check_pictures,
    open_console,
    progress_of,
    tell,
    tell_run,
    write_json,
)
from modelpatch.cli.options import ArgumentOption, DeviceOption, MethodOption, SetOption, Training
from modelpatch.cli.settings import parse_arguments, parse_counts, parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import DataError, ModelpatchError

if TYPE_CHECKING:
    from rich.console import Console


@verb(first="unlabeled budget patch method set_ epochs out", panel="Simulation", config=True)
def label(
    data: Annotated[str, typer.Argument(help="The labelled data, as for fit.")],
    training: Training,
    unlabeled: Annotated[
        list[Path] | None, typer.Option(help="Images or folders to choose from; may be repeated.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Images to choose.")] = 32,
    patch: Annotated[
        Path | None, typer.Option("--patch", "-p", help="Use this patch instead of training one on DATA.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A CSV file for the list.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="A picture of the chosen images.")] = None,
    simulate_: Annotated[
        str | None,
        typer.Option("--simulate", help="N1,N2,...: label DATA's own images step by step, by margin and at random."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the simulation.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="A picture of the simulation's curves.")] = None,
    rounds: Annotated[
        Path | None,
        typer.Option(help="The file of finished rounds, by default TASK.rounds.jsonl; they are not repeated."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", "-b", help="The frozen network; by default bundled:tiny, or the patch's."),
    ] = None,
    method: MethodOption = "subset",
    set_: SetOption = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """List the images whose labels would help most: those with the smallest margin between the two best classes.

    With --simulate, accuracy against the number of labels is measured on DATA, for choice by margin and at random.
    """
    from PIL import Image

    from modelpatch.cli.loading import backbone_of, find_device, naming, open_backbone
    from modelpatch.cli.predict import gather_images
    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import make_method
    from modelpatch.patch.contents import Patch
    from modelpatch.report.search import contact_sheet, curves_table, picks_table, plot_curves
    from modelpatch.report.tables import show
    from modelpatch.select.active import pick, simulate
    from modelpatch.train.fitting import fit

    console = open_console(json)
    for name, path in (("--out", out), ("--sheet", sheet), ("--rounds", rounds)):
        check_file(name, path)
    check_pictures(plot=plot)
    if sheet is not None and sheet.suffix.lower() not in Image.registered_extensions():
        raise ModelpatchError(
            f"--sheet {sheet}: {sheet.suffix or 'no suffix'} is not a supported picture format. Use .png or .jpg."
        )
    if (simulate_ is None) == (unlabeled is None):
        raise ModelpatchError("give either --unlabeled FOLDER, to choose from it, or --simulate N1,N2,...")
    if simulate_ is not None and (patch or out or sheet):
        raise ModelpatchError(
            "--simulate trains its own patches and lists nothing: leave --patch, --out and --sheet out."
        )
    if simulate_ is None and (plot or rounds or seeds > 1):
        raise ModelpatchError("--plot, --rounds and --seeds belong to --simulate.")
    made = make_method(method, **parse_pairs(set_, "--set"))
    settings = training.settings()
    arguments, place = parse_arguments(argument), find_device(device)
    task = load_task(data, seed=training.seed)
    if simulate_ is not None:
        file = rounds or Path(f"{task.task.name}.rounds.jsonl")
        base = open_backbone(backbone or "bundled:tiny", arguments, place)
        counts = parse_counts("--simulate", simulate_)
        curves = simulate(
            base, task, made, labels=counts, seeds=seeds, rounds=file, progress=not console.quiet, **settings
        )
        show(console, curves_table(curves))
        tell(console, f"rounds kept in {file}")
        tell_run(console, file)
        write_json(json, curves.as_dict())
        if plot is not None:
            plot_curves(curves, plot)
            tell(console, f"drew {plot}")
        return
    images = gather_images(unlabeled or [])
    _check_readable(images)
    if patch is None:
        base = open_backbone(backbone or "bundled:tiny", arguments, place)
        asked = fit(base, task, made, progress=not console.quiet, **settings)
    else:
        asked = Patch.load(patch)
        base = backbone_of(asked, patch, backbone, arguments, place)
    with progress_of(console, "label") as bar, naming(patch or Path("the patch")):
        try:
            picks = pick(base, asked, images, budget, bar)
        except DataError:
            images = _without_unreadable(images, console)
            picks = pick(base, asked, images, budget, bar)
    names = [str(image) for image in images]
    show(console, picks_table(picks, names))
    rows = [
        {"image": names[one.position], "margin": one.margin, "first": one.first, "second": one.second} for one in picks
    ]
    write_json(json, rows)
    if out is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(out, text.getvalue().encode())
        tell(console, f"wrote {out}")
        tell_run(console, out)
    if sheet is not None:
        contact_sheet(picks, images, sheet)
        tell(console, f"drew {sheet}")


def _check_readable(images: list[Path]) -> None:
    """Raise `DataError` if no image can be read, before anything is trained."""
    from modelpatch.backbone.preprocessing import open_image

    problem = ""
    for image in images:
        try:
            open_image(image)
            return
        except DataError as error:
            problem = problem or str(error)
    raise DataError(f"none of the {len(images)} images can be read: {problem}")


def _without_unreadable(images: list[Path], console: Console) -> list[Path]:
    """The images that can be read; the others are printed."""
    from modelpatch.backbone.preprocessing import open_image

    problems: dict[Path, str] = {}
    for image in images:
        try:
            open_image(image)
        except DataError as error:
            problems[image] = str(error)
    for problem in problems.values():
        tell(console, f"left out: {problem}")
    return [image for image in images if image not in problems]
