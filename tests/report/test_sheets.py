"""Contact sheets: tiles in rows, texts that are cut, and the sheets of tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import color_task
from dense import box_task, square_task
from modelpatch.data.report import DataReport, NumberSpread, SplitReport
from modelpatch.data.task import Task
from modelpatch.errors import ModelpatchError
from modelpatch.report.data import choose_tiles, data_sheet, data_tables
from modelpatch.report.sheets import COLUMNS, Section, Tile, draw_sheet, shorten, wrap, write_picture
from modelpatch.tasks.drawing import font_for


def test_tiles_stand_in_rows() -> None:
    tiles = [Tile(Image.new("RGB", (10, 10), (number * 20, 0, 0)), [f"{number}"]) for number in range(COLUMNS + 1)]
    one, two = draw_sheet([Section("", tiles[:COLUMNS])]), draw_sheet([Section("", tiles)])
    assert one.width == two.width == COLUMNS * 128
    assert two.height == 2 * one.height
    colors = {tuple(color) for color in np.asarray(two).reshape(-1, 3).tolist()}
    assert {(number * 20, 0, 0) for number in range(COLUMNS + 1)} <= colors
    assert draw_sheet([Section("title", tiles)]).height > two.height


def test_texts_are_cut_and_wrapped_to_a_width() -> None:
    font = font_for((300, 300))
    width = font.getlength("sea lions swim")
    assert shorten("sea  lions\nswim", font, width) == "sea lions swim"
    cut = shorten("sea lions swim far away", font, width)
    assert cut.endswith("...")
    assert font.getlength(cut) <= width
    lines = wrap("sea lions swim far away", font, width)
    assert " ".join(lines) == "sea lions swim far away"
    assert len(lines) > 1


def test_tiles_of_every_class_in_turn() -> None:
    split = color_task().train
    rows = choose_tiles(split, 5)
    assert len(rows) == len(set(rows)) == 5
    assert set(split.labels[rows]) == set(split.labels)
    assert len(choose_tiles(split, 10_000)) == len(split)


@pytest.mark.parametrize("task", [color_task(), box_task(), square_task()], ids=lambda task: task.task.kind)
def test_the_sheet_of_a_task(task: Task, tmp_path: Path) -> None:
    report = task.report()
    data_sheet(task, report, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width == COLUMNS * 192
    assert [str(table.title) for table in data_tables(report)] == ["", "classes"]


def test_a_table_of_numbers_has_a_row_a_split() -> None:
    spread = NumberSpread(3, -1.5, 2.0, 4.25)
    splits = tuple(SplitReport(name, 3, numbers={"age": spread}) for name in ("train", "test"))
    report = DataReport("ages", "ages.csv", "regression", "", ("age",), splits, ())
    (_, table) = data_tables(report)
    assert [list(column.cells) for column in table.columns][1:4] == [["train", "test"], ["3", "3"], ["-1.5", "-1.5"]]


def test_a_suffix_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ModelpatchError, match="cannot write"):
        write_picture(Image.new("RGB", (4, 4)), tmp_path / "gone" / "sheet.png")
