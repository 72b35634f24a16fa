"""A report of a task's data as tables, and a contact sheet of its pictures with their labels, masks or boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.table import Table

from modelpatch.backbone.preprocessing import open_image
from modelpatch.errors import DataError
from modelpatch.report.sheets import Section, Tile, draw_sheet, write_picture
from modelpatch.report.tables import facts_table, new_table
from modelpatch.tasks.drawing import add_legend, font_for, palette
from modelpatch.tasks.kind import kind_of
from modelpatch.text import count_of, first_line

if TYPE_CHECKING:
    from modelpatch.data.report import DataReport, SplitReport, Spread
    from modelpatch.data.splits import Split
    from modelpatch.data.task import Task

MOST_CLASSES, MOST_UNREADABLE = 40, 10  # rows of tables
TILE, PER_SPLIT, MOST_LEGEND = 192, 24, 40
LETTERS = 420  # the side of a picture whose letters a legend has
RED, PALE = (178, 38, 30), (236, 236, 236)
IMAGES = "images"


def data_tables(report: DataReport) -> list[Table]:
    """Tables of the facts, of the classes, and of the images that cannot be read."""
    tables = [facts_table("", _facts(report))]
    if any(split.classes is not None for split in report.splits):
        tables.append(_classes_table(report))
    if any(split.numbers for split in report.splits):
        tables.append(_numbers_table(report))
    if report.unreadable:
        shown = list(report.unreadable.items())[:MOST_UNREADABLE]
        more = len(report.unreadable) - len(shown)
        caption = f"and {more:,} more, which --json lists" if more > 0 else ""
        tables.append(new_table("cannot be read", caption, texts=("image", "because"), rows=shown))
    return tables


def _facts(report: DataReport) -> Iterable[tuple[str, str]]:
    """Names and values of the facts: the kind, the splits, what was not read, and the pictures."""
    yield "kind", report.kind + (f": {report.layout}" if report.layout else "")
    for split in report.splits:
        images = "a stream of unknown length" if split.images is None else count_of(split.images, "image")
        if split.name == "test" and report.held_out:
            images += (
                f", held out of the training images ({report.held_out['fraction']:.0%}, seed {report.held_out['seed']})"
            )
        elif split.images is None or (report.opened and not split.opened):
            images += ", not read"
        yield split.name, images
    for number, line in enumerate(report.tell_passed_over()):
        yield "" if number else "passed over", line
    opened = [split for split in report.splits if split.widths is not None]
    if opened:
        widths, heights = ([getattr(split, side) for split in opened] for side in ("widths", "heights"))
        yield "pixels", " by ".join(_together(spreads) for spreads in (widths, heights))
        yield "files", _counts([split.formats for split in opened])
        yield "modes", _counts([split.modes for split in opened])
        left = report.images - report.opened
        took = f"{report.opened:,} of {report.images:,} images in {report.seconds:.1f} s"
        if left > 0:
            took += f"; all would take about {report.seconds / report.opened * report.images:,.0f} s"
        yield "opened", took


def _together(spreads: Sequence[Spread | None]) -> str:
    known = [spread for spread in spreads if spread is not None]
    least, largest = min(one.least for one in known), max(one.largest for one in known)
    return f"{least:,}" if least == largest else f"{least:,} to {largest:,}"


def _counts(found: Sequence[Mapping[str, int]]) -> str:
    total: dict[str, int] = {}
    for counts in found:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {name or 'unknown'}" for name, count in ordered)


def _numbers_table(report: DataReport) -> Table:
    """The outputs of a regression with their ranges, a row a split."""
    rows = [
        (name, split.name, f"{one.known:,}", f"{one.least:g}", f"{one.median:g}", f"{one.largest:g}")
        for name in report.classes
        for split in report.splits
        if (one := split.numbers.get(name)) is not None
    ]
    return new_table("numbers", texts=("number", "split"), figures=("images", "least", "median", "largest"), rows=rows)


def _classes_table(report: DataReport) -> Table:
    """The classes with their counts by split; of many classes the ends of the list by frequency."""
    splits = [split for split in report.splits if split.classes is not None]
    names, captions = list(report.classes), []
    if len(names) > MOST_CLASSES:
        counts = splits[0].classes or {}
        names.sort(key=lambda name: -counts[name])
        half = MOST_CLASSES // 4
        names = names[:half] + names[-half:]
        captions.append(
            f"the {half} most and the {half} least frequent of {len(report.classes):,} classes; --json lists all"
        )
    for split in splits:
        if split.images is not None and split.counted < split.images:
            captions.append(f"{split.name}: counted in {split.counted:,} of {split.images:,} images")
    counted = report.counted if any(split.classes != split.images_of for split in splits) else IMAGES
    figures = [f"{split.name}\n{title}" for split in splits for title in _titles(counted)]
    rows = [[name, *(cell for split in splits for cell in _cells(split, name, counted))] for name in names]
    return new_table("classes", "\n".join(captions), texts=("class",), figures=figures, rows=rows)


def _titles(counted: str) -> list[str]:
    """The titles of a split's columns: of pixels their share is shown."""
    return [IMAGES] if counted == IMAGES else ["% of pixels" if counted == "pixels" else counted, IMAGES]


def _cells(split: SplitReport, name: str, counted: str) -> list[str]:
    """The count of a class in a split, and where it is counted in other things, the number of images that have it."""
    counts, images = split.classes or {}, split.images_of or {}
    if counted == IMAGES:
        return [f"{counts[name]:,}"]
    share = f"{100 * counts[name] / max(sum(counts.values()), 1):.2f}"
    return [share if counted == "pixels" else f"{counts[name]:,}", f"{images[name]:,}"]


def data_sheet(task: Task, report: DataReport, path: Path) -> None:
    """Draw pictures of every split with their labels, masks or boxes, and those that findings are about, to a file.

    Raises `ModelpatchError` where the picture cannot be written.
    """
    splits = {name: split for name, split in task.splits.items() if not split.is_stream}
    sections = []
    for name, split in splits.items():
        if name == "train" or split is not task.train:
            title = f"{name}: {count_of(len(split), 'image')}"
            sections.append(Section(title, [_tile(task, name, row) for row in choose_tiles(split, PER_SPLIT)]))
    for finding in report.findings:
        if finding.rows:
            tiles = [_tile(task, split, row, named=True) for split, row in finding.rows]
            sections.append(Section(f"{finding.level}: {finding.text}", tiles))
    sheet = draw_sheet(sections, TILE)
    if kind_of(task.task.kind).dense and len(task.classes) <= MOST_LEGEND:
        colors = [tuple(color) for color in palette(len(task.classes)).tolist()]
        sheet = add_legend(sheet, list(zip(colors, task.classes, strict=True)), font_for((LETTERS, LETTERS)))
    write_picture(sheet, path)


def choose_tiles(split: Split, most: int) -> list[int]:
    """Rows to show, at most so many: of every class in turn where classes are known, else spread over all."""
    if split.dense or not split.labels_known:
        return np.unique(np.linspace(0, len(split) - 1, min(most, len(split))).astype(int)).tolist()
    classes = [np.flatnonzero(split.labels == label).tolist() for label in np.unique(split.labels)]
    if len(classes) > most:
        classes = [classes[place] for place in np.linspace(0, len(classes) - 1, most).astype(int)]
    turns = [rows[turn] for turn in range(max(map(len, classes))) for rows in classes if turn < len(rows)][:most]
    return sorted(turns, key=lambda row: (int(split.labels[row]), row))


def _tile(task: Task, name: str, row: int, named: bool = False) -> Tile:
    """One picture with its target, its class and its size, or with the name of its split."""
    kind, split = kind_of(task.task.kind), task.splits[name]
    try:
        source, target = split[row]
        image = open_image(source)
        drawn = kind.illustrate(image, target, task.classes, TILE - 4)
        words = kind.caption(target, task.classes)
    except DataError as error:
        return Tile(Image.new("RGB", (TILE, TILE), PALE), [f"{name} {row}: cannot be read", first_line(error)], RED)
    size = f"{image.width} x {image.height}"
    return Tile(drawn, [words, f"{name}, {size}" if named else size])
