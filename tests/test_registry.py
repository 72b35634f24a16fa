"""Registries find what is registered in code, in a folder's files and by other distributions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from modelpatch.errors import MethodError
from modelpatch.registry import Registry


def make_package(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """An installed distribution `name` with one module of that name and an entry point for `spiral` in `shapes_here`."""
    (root / f"{name}.py").write_text(body)
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[shapes_here]\nspiral = {name}:Spiral\n")
    monkeypatch.syspath_prepend(root)


def test_names_are_registered_once() -> None:
    shapes = Registry[type]("shape", "shapes_here")

    @shapes.register("round")
    class Round: ...

    assert shapes.find("round") is Round
    assert shapes.register("round")(Round) is Round
    with pytest.raises(ValueError, match=r"registered already, by .*Round"):
        shapes.register("round")(int)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known_ones() -> None:
    shapes = Registry[type]("shape", "shapes_here", error=MethodError)
    shapes.register("round")(int)
    shapes.register("square")(str)
    with pytest.raises(MethodError, match=r"no shape 'sqare'\. Did you mean 'square'\? Known: round, square\."):
        shapes.find("sqare")
    with pytest.raises(MethodError, match="no shape '7'"):
        shapes.find(7)
    with pytest.raises(KeyError):
        shapes["sqare"]
    assert "sqare" not in shapes
    assert dict(shapes) == {"round": int, "square": str}


def test_a_file_of_the_folder_is_imported_when_its_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shapes_folder"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from modelpatch.registry import Registry\nSHAPES = Registry('shape', 'shapes_folder')\n"
    )
    for name in ("long_oval", "cube"):
        text = f"from shapes_folder import SHAPES\nSHAPES.register({name.replace('_', '-')!r})({name!r})\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    from shapes_folder import SHAPES  # type: ignore[import-not-found]

    assert SHAPES.find("long-oval") == "long_oval"
    assert "shapes_folder.cube" not in sys.modules
    assert SHAPES.names() == ("cube", "long-oval")


def test_another_distribution_adds_a_name_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "spirals", monkeypatch, "class Spiral: ...\n")
    shapes = Registry[type]("shape", "shapes_here")
    assert shapes.names() == ("spiral",)
    assert "spirals" not in sys.modules
    assert shapes.find("spiral").__name__ == "Spiral"


def test_a_distribution_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "broken_spirals", monkeypatch, "raise RuntimeError('no spirals today')\n")
    shapes = Registry[type]("shape", "shapes_here", error=MethodError)
    shapes.register("round")(int)
    with pytest.raises(MethodError, match=r"'spiral' of broken_spirals:Spiral cannot be imported .*no spirals today"):
        shapes.find("spiral")
    assert shapes.find("round") is int
