"""The registry of data sources: layouts of other distributions, and what decides between two."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_folder
from dense import write_masks, write_voc
from modelpatch.data.sources.base import SOURCES, DataSource, Found, SourceOptions, register_source
from modelpatch.data.splits import Split
from modelpatch.data.task import load_task
from modelpatch.errors import DataError


@pytest.fixture
def numbered(registries: None) -> None:
    @register_source("numbered")
    class Numbered(DataSource):
        """Files NUMBER-CLASS.png beside names.list."""

        kind = "classification"

        def accepts(self, source: Any) -> bool:
            return str(source).endswith("names.list")

        def read(self, source: Any, options: SourceOptions) -> Found:
            names = Path(source).read_text().split()
            files = sorted(Path(source).parent.glob("*.png"))
            labels = np.array([names.index(file.stem.split("-")[1]) for file in files])
            return Found("classification", {"train": Split(files, labels)}, names)


def test_a_registered_layout_is_read(tmp_path: Path, numbered: None) -> None:
    root = write_folder(tmp_path / "colors")
    for file in sorted((root / "train").rglob("*.png")):
        file.rename(root / f"{file.stem}-{file.parent.name}.png")
    (root / "names.list").write_text("green blue red")
    task = load_task(root / "names.list")
    assert (task.classes, task.task.name) == (("green", "blue", "red"), "names")
    assert len(task.train) + len(task.test) == 24
    assert "numbered" in SOURCES.names()


def test_a_folder_in_two_layouts_is_read_as_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "both", 4)
    write_voc(root, 3)
    with pytest.raises(DataError, match=r"is in more than one layout. Choose kind='.*' or kind='.*' \(--kind\)"):
        load_task(root)
    assert load_task(root, kind="detection").task.kind == "detection"
    assert load_task(root, kind="segmentation", classes=["a", "b", "c"]).task.kind == "segmentation"


def test_the_name_of_an_unknown_kind_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="segmentation"):
        load_task(write_folder(tmp_path / "colors"), kind="segmentations")


# formats ----------------------------------------------------------------------------------------------------

cells = st.one_of(st.sampled_from(["one.png", "a", "b", "", "train", "test", "val"]), st.text(max_size=4))


@given(
    st.lists(st.sampled_from(["image", "label", "split", "x", ""]), max_size=4),
    st.lists(st.lists(cells, max_size=5), max_size=4),
)
@settings(max_examples=200)
def test_manifests_are_read_or_refused(columns: list[str], rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "one.png").write_bytes(b"never opened")
        file = Path(folder) / "all.csv"
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([columns, *rows])
        try:
            task = load_task(file)
        except DataError as error:
            assert "all" in str(error)  # noqa: PT017
        else:
            assert len(task.classes) >= 2


@pytest.mark.service
def test_a_task_is_imported_without_the_libraries_of_its_sources() -> None:
    heavy = ("torchvision", "timm", "datasets", "pyarrow", "transformers", "sklearn")
    code = f"import sys, modelpatch.data.task; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
