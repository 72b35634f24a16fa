"""`modelpatch label`: find the images to label next."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from typer import Argument, Option

from modelpatch.cli.console import Screen, check_file
from modelpatch.cli.options import ArgumentOption, DeviceOption, MethodOption, SetOption, Training
from modelpatch.cli.settings import parse_arguments, parse_counts, parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import DataError, ModelpatchError


@verb(first="unlabeled budget patch method set_ epochs out", panel="Simulation", config=True)
def label(
    console: Screen,
    training: Training,
    data: str = Argument(..., help="The labelled data, as for fit."),
    unlabeled: list[Path] | None = Option(None, help="Images or folders to choose from; may be repeated."),
    budget: int = Option(32, min=1, help="Images to choose."),
    patch: Path | None = Option(None, "--patch", "-p", help="Use this patch instead of training one on DATA."),
    out: Path | None = Option(None, "--out", "-o", help="A CSV file for the list."),
    sheet: Path | None = Option(None, help="A picture of the chosen images."),
    simulate_: str | None = Option(None, "--simulate", help="N1,N2,...: label DATA in steps, by margin and at random."),
    seeds: int = Option(1, min=1, help="Seeds of the simulation."),
    plot: Path | None = Option(None, help="A picture of the simulation's curves."),
    rounds: Path | None = Option(None, help="The file of finished rounds, not repeated; by default TASK.rounds.jsonl."),
    backbone: str | None = Option(None, "--backbone", "-b", help="By default bundled:tiny, or the patch's."),
    method: MethodOption = "subset",
    set_: SetOption = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
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
    from modelpatch.select.active import pick, simulate
    from modelpatch.train.fitting import fit

    for name, path in (("--out", out), ("--sheet", sheet), ("--rounds", rounds)):
        check_file(name, path)
    if sheet is not None and sheet.suffix.lower() not in Image.registered_extensions():
        raise ModelpatchError(
            f"--sheet {sheet}: {sheet.suffix or 'no suffix'} is not a picture format. Use .png or .jpg."
        )
    if (simulate_ is None) == (unlabeled is None):
        raise ModelpatchError("give either --unlabeled FOLDER, to choose from it, or --simulate N1,N2,...")
    if simulate_ is not None and (patch or out or sheet):
        raise ModelpatchError("--simulate trains patches and lists nothing: leave --patch, --out and --sheet out.")
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
        settings |= {"labels": counts, "seeds": seeds, "rounds": file, "progress": not console.quiet}
        curves = simulate(base, task, made, **settings)
        console.show(curves_table(curves))
        console.tell(f"rounds kept in {file}")
        console.tell_run(file)
        console.write_json(curves.as_dict())
        console.draw(plot, plot_curves, curves)
        return
    images = gather_images(unlabeled or [])
    problems: list[str] = []
    if next(_readable(images, problems.append), None) is None:
        raise DataError(f"none of the {len(images)} images can be read: {problems[0]}")
    if patch is None:
        base = open_backbone(backbone or "bundled:tiny", arguments, place)
        asked = fit(base, task, made, progress=not console.quiet, **settings)
    else:
        asked = Patch.load(patch)
        base = backbone_of(asked, patch, backbone, arguments, place)
    with console.progress("label") as bar, naming(patch or Path("the patch")):
        try:
            picks = pick(base, asked, images, budget, bar)
        except DataError:
            images = list(_readable(images, lambda problem: console.tell(f"left out: {problem}")))
            picks = pick(base, asked, images, budget, bar)
    names = [str(image) for image in images]
    console.show(picks_table(picks, names))
    rows = [
        {"image": names[one.position], "margin": one.margin, "first": one.first, "second": one.second} for one in picks
    ]
    console.write_json(rows)
    if out is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        console.write(out, text.getvalue())
        console.tell_run(out)
    console.draw(sheet, contact_sheet, picks, images)


def _readable(images: list[Path], report: Callable[[str], None]) -> Iterator[Path]:
    """Yield the images that can be read; report the errors of the others."""
    from modelpatch.backbone.preprocessing import open_image

    for image in images:
        try:
            open_image(image)
        except DataError as error:
            report(str(error))
        else:
            yield image
