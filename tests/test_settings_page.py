"""docs/settings.md lists every setting of a fit and every hyperparameter of a method, with its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpatch.methods.method import Method
from modelpatch.methods.registry import METHODS
from modelpatch.train.fitting import fit
from modelpatch.train.settings import FitOptions, FitSettings

PAGE = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
BEFORE, _, METHOD = PAGE.partition("\n## Hyperparameters\n")
FIT, _, PYTHON = BEFORE.partition("\n## Options in Python\n")
COMMON = {field.name: field.default for field in dataclasses.fields(Method)}
RATES = ("lr", "weight_decay", "optimizer")


def rows(text: str, columns: int) -> Iterator[list[str]]:
    """The cells of the rows of all tables of so many columns, without heads and rules."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")] if line.startswith("|") else []
        if len(cells) == columns and "`" in cells[0] + cells[1]:
            yield cells


def spell(value: Any) -> str:
    """A default as the page writes it: in code, and nothing for what is not set."""
    if value in (None, ()):
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(f'{part:.3g}' if isinstance(part, float) else part for part in value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_every_setting_of_a_fit_is_listed_with_its_default() -> None:
    listed = {cells[0].strip("`"): cells[1] for cells in rows(FIT, 4)}
    assert listed == {field.name: spell(field.default) for field in dataclasses.fields(FitSettings)}


def test_the_docstring_of_fit_lists_every_setting_with_its_default() -> None:
    written = {"memory": "2 * 2**30", "drops": "(2/3, 5/6)"}
    for field in dataclasses.fields(FitSettings):
        default = written.get(field.name, repr(field.default).replace("'", '"'))
        assert f" {field.name}={default}" in (fit.__doc__ or "")


def test_every_option_of_a_fit_in_python_is_listed_with_its_default() -> None:
    listed = {cells[0].strip("`"): cells[1] for cells in rows(PYTHON, 3)}
    assert listed == {field.name: spell(field.default) for field in dataclasses.fields(FitOptions)}


def test_hyperparameters_of_all_methods_are_listed() -> None:
    common = {cells[0].strip("`"): cells[1] for cells in rows(METHOD.partition("by method:")[0], 3)}
    assert common.keys() == COMMON.keys()
    assert all(common[name] == ("by method" if name in RATES else spell(default)) for name, default in COMMON.items())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_hyperparameter_of_a_method_is_listed_with_its_default(name: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(METHODS[name])}
    before, _, after = METHOD.partition("\nBesides:\n")
    assert [spell(defaults[rate]) for rate in RATES] in [
        cells[1:] for cells in rows(before, 4) if cells[0] == f"`{name}`"
    ]
    listed, current = {}, ""
    for cells in rows(after, 4):
        current = cells[0].strip("`") or current
        if current == name:
            listed[cells[1].strip("`")] = cells[2]
    own = {key: default for key, default in defaults.items() if key not in RATES and default != COMMON.get(key, ...)}
    assert listed == {key: spell(default) for key, default in own.items()}
