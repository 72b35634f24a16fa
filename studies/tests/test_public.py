"""The studies use public names of modelpatch alone: `modelpatch` itself, and the names in each folder's __init__.pyi."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpatch
import modelpatch_studies

PACKAGE, STUDIES = Path(modelpatch.__file__).parent, Path(modelpatch_studies.__file__).parent
FILES = sorted(STUDIES.rglob("*.py"))


def listed(stub: Path) -> set[str]:
    """The names that a stub of a package lists."""
    found: set[str] = set()
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def public() -> dict[str, set[str]]:
    """The public names of `modelpatch` and of its folders, by module."""
    names = {"modelpatch": listed(PACKAGE / "__init__.pyi")}
    for stub in PACKAGE.glob("*/__init__.pyi"):
        names[f"modelpatch.{stub.parent.name}"] = listed(stub)
    errors = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8")).body
    names["modelpatch.errors"] = {node.name for node in errors if isinstance(node, ast.ClassDef)}
    return names


def outside(source: str, names: dict[str, set[str]]) -> Iterator[str]:
    """What the source takes of modelpatch that is not public, members with a leading underscore included."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or "modelpatch"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "modelpatch"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("modelpatch.") and a.name not in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "modelpatch":
            known = names.get(node.module or "", set())
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if isinstance(node.value, ast.Name) and node.value.id in aliases and node.attr not in names["modelpatch"]:
                yield f"modelpatch.{node.attr}"
            elif node.attr.startswith("_") and not node.attr.startswith("__") and not own:
                yield f"{ast.unparse(node.value)}.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(STUDIES).as_posix())
def test_a_study_uses_public_names_alone(path: Path) -> None:
    assert not list(outside(path.read_text(encoding="utf-8"), public()))


def test_what_is_not_public_is_seen() -> None:
    source = """
import modelpatch as mp
import modelpatch.patch.codec
from modelpatch.methods import Method, nothing
from modelpatch.train.fitting import fit
from modelpatch_studies.recipe import Recipe
mp.load_backbone("a"); mp.hidden(); model._features(x); self._own
def f(self): return self._own
"""
    assert set(outside(source, public())) == {
        "modelpatch.patch.codec",
        "modelpatch.methods.nothing",
        "modelpatch.train.fitting.fit",
        "modelpatch.hidden",
        "model._features",
    }
