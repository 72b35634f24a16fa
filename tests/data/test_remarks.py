"""The record of what a source passed over: by reason, in order, counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import write_folder
from modelpatch.data.sources.base import DataSource, Found, register_source
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.splits import Split
from modelpatch.data.task import load_task


def test_names_are_kept_by_reason_in_the_order_of_reading() -> None:
    remarks = Remarks()
    remarks.pass_over("no picture (.txt)", "b.txt")
    remarks.pass_over("hidden file", "._a.jpg", ".DS_Store")
    remarks.pass_over("no picture (.txt)", "a.txt")
    remarks.pass_over("never")
    assert list(remarks.facts["passed_over"].items()) == [
        ("no picture (.txt)", ("b.txt", "a.txt")),
        ("hidden file", ("._a.jpg", ".DS_Store")),
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], []),
        (["a"], ["1 folder is empty: a"]),
        (["a", "b"], ["2 folders are empty: a, b"]),
        (list("abcdef"), ["6 folders are empty: a, b, c and 3 more"]),
    ],
)
def test_a_note_counts_and_names_the_first(names: list[str], said: list[str]) -> None:
    remarks = Remarks()
    remarks.note("folders are empty", names, "folder is empty")
    assert remarks.notes == said


def test_a_task_tells_what_its_source_passed_over(tmp_path: Path, registries: None) -> None:
    @register_source("remarking")
    class Remarking(DataSource):
        kind = "classification"

        def accepts(self, source: object) -> bool:
            return str(source).endswith("names.list")

        def read(self, source: object, options: object) -> Found:
            files = sorted(Path(str(source)).parent.rglob("*.png"))
            remarks = Remarks()
            remarks.pass_over("hidden file", "a")
            remarks.note("read as it stands")
            return Found(self.kind, {"train": Split(files, np.arange(len(files)) % 2)}, ["a", "b"], **remarks.facts)

    root = write_folder(tmp_path / "colors")
    (root / "names.list").touch()
    task = load_task(root / "names.list")
    assert (task.passed_over, task.notes) == ({"hidden file": ("a",)}, ("read as it stands",))
    assert task.subsample(4).passed_over == task.passed_over
