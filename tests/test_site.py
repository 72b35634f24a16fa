"""The documentation builds without a warning and says something of every public name."""

from __future__ import annotations

import importlib
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpatch
from conftest import Library, skip_without
from modelpatch import errors
from test_structure import FLOORS

skip_without("mkdocs", "mkdocstrings", "material")
pytestmark = pytest.mark.slow
building, config = Library("mkdocs.commands.build"), Library("mkdocs.config")

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(sorted(path.parent.name for path in Path(modelpatch.__file__).parent.glob("*/__init__.pyi")))

COMPUTED = {"COMPARED"}  # made by a module's `__getattr__`, which the reference cannot see


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What mkdocs warns of while the test runs."""
    found: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(listener)
    yield found
    logging.getLogger("mkdocs").removeHandler(listener)


def documented(site: Path) -> set[str]:
    """The full names that the reference describes, as its inventory lists them."""
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode()
    return {line.split()[0] for line in lines.splitlines()}


def test_the_site_builds_without_a_warning_and_describes_every_public_name(tmp_path: Path, warnings: list[str]) -> None:
    """In one test, for a build takes seconds. Names stand under their modules, whose docstrings have formulas and tables."""
    building.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert not warnings
    found = documented(tmp_path)
    described = {
        match[1] for name in found if (match := re.fullmatch(r"modelpatch\.[a-z]+(?:\.[a-z0-9_]+)+\.(\w+)", name))
    }
    for package in PACKAGES:
        assert set(importlib.import_module(f"modelpatch.{package}").__all__) - COMPUTED <= described
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {f"modelpatch.errors.{name}" for name in kinds} <= found
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        address = page.relative_to(ROOT / "docs").with_suffix("").as_posix().removesuffix("index").rstrip("/")
        assert not address or f'href="{address}/"' in start, f"{page.name} is not in the navigation"


def test_a_link_that_leads_nowhere_is_a_warning(tmp_path: Path, warnings: list[str]) -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"^(extra_css|hooks): .*", "", settings, flags=re.MULTILINE))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[a page](nowhere.md), [a name][modelpatch.nothing]\n")
    building.build(config.load_config(str(tmp_path / "mkdocs.yml")))
    assert len(warnings) == 2
    assert "nowhere.md" in "".join(warnings)
    assert "modelpatch.nothing" in "".join(warnings)


def test_the_overview_names_all_that_the_package_gives() -> None:
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert not {name for name in modelpatch.__all__ if f"[`{name}`]" not in text} - {"__version__"}


def test_the_picture_of_the_house_has_every_floor_in_its_order() -> None:
    picture = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    places = [picture.index(f">{folder}<") for floor in FLOORS[1:] for folder in floor]
    assert places == sorted(places, reverse=True)
