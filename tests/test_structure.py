"""The house stands: imports point down only, and no file holds two ideas."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpatch

ROOT = Path(modelpatch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = (
    ("errors", "atomic", "text", "moved", "registry"),
    ("backbone",),
    ("heads",),
    ("tasks",),
    ("patch",),
    ("methods",),
    ("data",),
    ("store",),
    ("engine",),
    ("convert",),
    ("train",),
    ("select",),
    ("recipes",),
    ("report",),
    ("serve",),
    ("cli",),
)
LAYERS = {part: number for number, floor in enumerate(FLOORS) for part in floor}
MAX_LINES = 500


def imports(node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """(function that imports, full name) for every import that runs: not those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((function, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            parts = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from ((function, part) for part in (parts if child.module == "modelpatch" else [str(child.module)]))
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from imports(other, function)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, child.name)
        else:
            yield from imports(child, function)


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    for function, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name == "modelpatch" or name.startswith("modelpatch."):
            yield function, name


def read_from_package(path: Path) -> set[str]:
    """`a` for every `modelpatch.a` in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "modelpatch"}


def part_of(path: Path) -> str:
    """`backbone` of `backbone/chain.py`, `errors` of `errors.py`."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_a_file_has_at_most_500_lines_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "a module begins with what it is for"


def test_the_check_sees_imports_in_functions_and_not_those_for_type_hints() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from modelpatch.patch import Patch
def f():
    if True:
        from modelpatch.train import fit
from modelpatch import methods
import modelpatch.cli
"""
    found = [item for item in imports(ast.parse(source)) if item[1].startswith("modelpatch")]
    assert found == [("f", "modelpatch.train"), ("", "modelpatch.methods"), ("", "modelpatch.cli")]


def test_no_two_test_files_have_one_name() -> None:
    """Their folders are no packages, so that a name stands for one file."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
