"""The house stands: floors import downwards, no circles, one name a class, short files, plain docstrings."""

from __future__ import annotations

import ast
import gc
import importlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import modelpatch

ROOT = Path(modelpatch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = (
    ("errors", "atomic", "plain_files", "text", "moved", "provenance", "registry", "version"),
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
LEVEL = {part: number for number, floor in enumerate(FLOORS) for part in floor}
LEVEL |= {"": LEVEL["cli"], "__main__": LEVEL["cli"]}  # "" is the face, which commands use as anybody does
MAX_LINES = 500
MOST_LINES = 46_800
MOST_NAMES = 20
RIDDLES = {"What", "Whether", "Where", "Which", "How"}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    gc.disable()  # finalisers of other tests would run inside the parser, which CPython 3.11 may take for an error of its own
    try:
        return tuple(ast.walk(ast.parse(source)))
    finally:
        gc.enable()


def imports(source: str, folder: str = "") -> Iterator[str]:
    """Modules of the package that a source imports: at its head, for types only, and inside functions.

    `folder` is the package of a stub, whose imports are relative.
    """
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "modelpatch")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == bool(folder), "relative import"
            module = ".".join(filter(None, (folder, node.module)))
            if module.split(".")[0] == "modelpatch":
                for alias in node.names:
                    full = f"{module}.{alias.name}"
                    yield full if full in MODULES else module


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


@cache
def graph() -> dict[str, set[str]]:
    """The modules that every module imports; a face imports what its stub names, when it is asked for."""
    found = {name: set(imports(source)) for name, source in SOURCES.items()}
    for stub in ROOT.rglob("*.pyi"):
        folder = module_name(stub)
        found[folder] |= set(imports(stub.read_text(encoding="utf-8"), folder))
    return found


def test_a_file_imports_from_its_own_floor_or_below() -> None:
    edges = [(name, target) for name, targets in graph().items() for target in targets]
    assert not [f"{a} imports {b}" for a, b in edges if LEVEL[part_of(b)] > LEVEL[part_of(a)]]


def test_a_file_imports_definitions_from_the_files_that_hold_them() -> None:
    """A folder's face is for users: a file that imports it would import all of the folder."""
    faces = {name for name, file in MODULES.items() if file.name == "__init__.py"} - {"modelpatch", "modelpatch.cli"}
    assert not {name: targets & faces for name, targets in graph().items() if name != "modelpatch" and targets & faces}


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {part_of(name) for name in MODULES} <= LEVEL.keys()


def test_no_two_files_import_each_other_directly_or_round_a_corner() -> None:
    waiting = {
        name: {target for target in targets if target in MODULES and target != name}
        for name, targets in graph().items()
    }
    while free := [name for name, targets in waiting.items() if not targets]:
        for name in free:
            del waiting[name]
        for targets in waiting.values():
            targets.difference_update(free)
    assert not waiting, f"circles among {sorted(waiting)}"


def test_no_class_name_is_used_twice() -> None:
    nodes = [node for source in SOURCES.values() for node in nodes_of(source)]
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


def test_a_file_is_short_and_says_what_it_is_for() -> None:
    assert not {name: lines for name, source in SOURCES.items() if (lines := len(source.splitlines())) > MAX_LINES}
    assert not [name for name, source in SOURCES.items() if not ast.get_docstring(nodes_of(source)[0])]


def test_the_package_is_small() -> None:
    assert sum(len(source.splitlines()) for source in SOURCES.values()) <= MOST_LINES


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    nodes = [node for source in SOURCES.values() for node in nodes_of(source)]
    docs = [doc for node in nodes if isinstance(node, DOCUMENTED) and (doc := ast.get_docstring(node))]
    assert not [doc.splitlines()[0] for doc in docs if doc.split()[0].strip(".,:") in RIDDLES]


def test_the_package_has_few_public_names_and_all_of_them_resolve() -> None:
    assert len(modelpatch.__all__) <= MOST_NAMES
    assert all(getattr(modelpatch, name) is not None for name in modelpatch.__all__)


@pytest.mark.parametrize("stub", sorted(ROOT.rglob("*.pyi")), ids=module_name)
def test_every_name_of_a_face_resolves(stub: Path) -> None:
    face = importlib.import_module(module_name(stub))
    assert all(getattr(face, name) is not None for name in face.__all__)


def test_the_check_sees_imports_for_types_and_in_functions() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from modelpatch.patch.contents import Patch
def f():
    from modelpatch.train.fitting import fit
"""
    assert set(imports(source)) == {"modelpatch.patch.contents", "modelpatch.train.fitting"}


def test_no_two_test_files_have_one_name() -> None:
    """Their folders are no packages, so that a name stands for one file."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
