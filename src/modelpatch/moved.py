"""Faces of folders: lazy public names, and the names and modules that moved, for one version with a warning.

Every folder's `__init__.py` is a face: its `__init__.pyi` lists public names, which are imported when they are used.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lazy_loader

from modelpatch.errors import warn_caller

PLACES: dict[str, dict[str, str]] = {  # by old place and new folder: names, OLD=NEW for those that changed
    "modelpatch": {
        "backbone": "Tuning save_backbone",
        "convert": "diff",
        "data": "join_tasks",
        "engine": "BoundPatch Cascade",
        "recipes": "PaintSettings fit_multires fit_multitask",
        "store": "Version",
        "train": "harmonic_mean",
    },
    "modelpatch.engine": {"backbone": "Tuning"},
    "modelpatch.methods": {"convert": "export_peft import_peft"},
    "modelpatch.patch": {
        "convert": "DELTA_CODECS diff extract merge",
        "engine": "BoundPart BoundPatch Cascade Confidence",
        "heads": "CosineHead Decoder DeepLabHead Detector DraftHead FCNHead FasterRCNNHead HeadRecord LinearHead SSDLiteHead "
        "SiameseHead pooled_width",
        "store": "Problem=Fault Store Version",
        "tasks": "Task=TaskRecord",
    },
    "modelpatch.train": {
        "data": "Split TaskData=Task join_tasks load_task",
        "recipes": "Comparison MultiResolution Multitask PaintSettings Painting compare fit_multires fit_multitask paint",
        "tasks": "DetectionResult Evaluation Result SegmentationResult",
    },
}
NAMES = {  # by old place: names and their new places
    package: {
        old: f"{folder}.{new or old}"
        for folder, names in folders.items()
        for old, _, new in (name.partition("=") for name in names.split())
    }
    for package, folders in PLACES.items()
}
# modules whose paths the documentation named
MODULES = dict.fromkeys(("modelpatch.patch.detectors", "modelpatch.patch.heads"), "modelpatch.heads")


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a face: the names of its stub, its folders, and names that moved."""
    find, names, public = lazy_loader.attach_stub(package, file)
    moved = NAMES.get(package, {})

    def getattribute(name: str) -> Any:
        if name in public:
            return find(name)
        if name in moved:
            _warn(f"{package}.{name}", f"modelpatch.{moved[name]}")
            folder, _, new = moved[name].partition(".")
            return getattr(importlib.import_module(f"modelpatch.{folder}"), new)
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute, names, public


class MovedModules(Loader):
    """An import hook that imports a module that moved from its new place, with a warning."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        new = MODULES[module.__name__]
        _warn(module.__name__, new)
        place = importlib.import_module(new)
        module.__dict__.update({name: getattr(place, name) for name in place.__all__})


def _warn(old: str, new: str) -> None:
    """Warn at the line outside of this file and of importlib that used the old name."""
    text = f"{old} is {new} now; the old name goes with the next version"
    warn_caller(text, DeprecationWarning, ("importlib", __name__))


if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
    sys.meta_path.append(MovedModules())
