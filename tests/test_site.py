"""The documentation builds without a warning and says something of every public name."""

from __future__ import annotations

import importlib
import logging
import re
import zlib
from pathlib import Path

import pytest

import modelpatch

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbone", "methods", "train", "patch", "engine", "select", "serve", "reproduce")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built. A warning (a link, an anchor, a name that leads nowhere) is an error."""
    folder = tmp_path_factory.mktemp("site")
    warnings: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(listener)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        logging.getLogger("mkdocs").removeHandler(listener)
    assert not warnings
    return folder


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    """The full names that the reference describes, as its inventory lists them."""
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode()
    return {line.split()[0] for line in lines.splitlines()}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_is_described(package: str, documented: set[str]) -> None:
    """Under the name of the module where it stands, whose docstring has the formula, the paper or the table."""
    names = importlib.import_module(f"modelpatch.{package}").__all__
    described = re.compile(r"modelpatch\.[a-z]+\.[a-z0-9_]+\.(\w+)")
    assert set(names) <= {found[1] for name in documented if (found := described.fullmatch(name))}


def test_every_error_is_described(documented: set[str]) -> None:
    from modelpatch import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert not {name for name in kinds if f"modelpatch.errors.{name}" not in documented}


def test_the_overview_names_all_that_the_package_gives() -> None:
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert not {name for name in modelpatch.__all__ if f"[`{name}`]" not in text} - {"__version__"}


def test_every_page_of_the_documentation_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        address = page.relative_to(ROOT / "docs").with_suffix("").as_posix().removesuffix("index")
        assert f'href="{address.rstrip("/")}/"' in start or address == ""
