"""The verb that shows what is read from data, before anything is trained: `data`."""

import warnings
from pathlib import Path

import typer
from typer import Option

from modelpatch.cli import options as opt
from modelpatch.cli import reading as read
from modelpatch.cli.console import Screen
from modelpatch.cli.verb import verb
from modelpatch.errors import DataWarning

MOST_IMAGES = 20_000


@verb(first="images near sheet json strict", panel="Data")
def data(
    console: Screen,
    data: read.DataArgument,
    reading: read.Source,
    seed: opt.SeedOption = 0,
    images: int = Option(MOST_IMAGES, min=0, help="Images to open at most, spread over the splits; 0: names alone."),
    near: bool = Option(False, "--near", help="Find images of two splits that look alike, beside equal ones."),
    sheet: Path | None = Option(None, help="A picture of images with their labels, masks or boxes, and of findings."),
    strict: bool = Option(False, "--strict", help="Exit status 1 where there is a warning."),
) -> None:
    """Show what is read from DATA: kind, splits, classes, sizes and modes of images, and what is unusual about them.

    Images are opened to find unreadable ones and the same image in two splits: 20,000 photos take about a minute or two.
    """
    from modelpatch.report.data import data_sheet, data_tables

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # a table says what was passed over
        task = reading.load(data, seed)
    total = sum(split.length or 0 for split in task.splits.values())
    with console.progress("data") as bar, bar.task("images opened", min(total, images)) as advance:
        report = task.report(images, near=near, advance=advance)
    console.tell(report.summary)
    console.show(*data_tables(report))
    if report.findings:
        console.print()
    console.tell_findings(report.findings)
    console.write_json(report.as_dict())
    console.draw(sheet, data_sheet, task, report)
    if strict and report.warnings:
        raise typer.Exit(1)
