"""Names of the last version work at their old places, with a warning that says the new one."""

from __future__ import annotations

import importlib
import warnings

import pytest

import modelpatch
from modelpatch.moved import MODULES, NAMES

MOVED = [(package, name, place) for package, names in NAMES.items() for name, place in names.items()]


@pytest.mark.parametrize(("package", "name", "place"), MOVED, ids=lambda part: str(part))
def test_a_moved_name_is_the_object_at_its_new_place(package: str, name: str, place: str) -> None:
    module, _, attribute = f"modelpatch.{place}".rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{package}.{name} is modelpatch.{place} now") as caught:
        found = getattr(importlib.import_module(package), name)
    assert found is getattr(importlib.import_module(module), attribute)
    assert caught[0].filename == __file__
    assert name not in importlib.import_module(package).__all__


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_a_moved_module_has_the_names_of_its_new_place(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        module = importlib.reload(importlib.import_module(old))
    names = set(importlib.import_module(new).__all__)
    assert names <= vars(module).keys()


def test_an_old_import_warns_at_its_own_line() -> None:
    with pytest.warns(DeprecationWarning, match="modelpatch.store.Store") as caught:
        from modelpatch.patch import Store  # noqa: F401
    assert caught[0].filename == __file__


def test_folders_are_attributes_and_public_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert modelpatch.recipes.fit_multitask.__module__ == "modelpatch.recipes.multitask"
        assert all(getattr(modelpatch, name) is not None for name in modelpatch.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = modelpatch.nothing
    assert len(modelpatch.__all__) <= 20
