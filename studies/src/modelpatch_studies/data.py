"""Data sets of recipes: folders are read in place, archives are unpacked once beside the results."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpatch import Task, load_task
from modelpatch.errors import DataError

READING: Mapping[str, Mapping[str, Any]] = {  # what data sets do not say themselves
    "camvid": {"ignore": 11},
    "voc2007": {"kind": "detection"},
    "voc2012": {"kind": "segmentation"},
}


@dataclass(frozen=True)
class Sources:
    """Data sets by name in `folder`, as `NAME/` or `NAME.tar`; archives are unpacked into `cache`."""

    folder: Path
    cache: Path

    def has(self, name: str) -> bool:
        """True if the data set exists; names with a source of their own (`bundled:digits`, `hf:NAME`) always do."""
        return ":" in name or (self.folder / name).is_dir() or self._archive(name).is_file()

    def check(self, wanted: Mapping[str, Iterable[str]]) -> None:
        """Raises `DataError` that names every data set that is missing and the recipes, by which `wanted` is, that need it."""
        needed: dict[str, list[str]] = {}
        for recipe, names in wanted.items():
            for name in names:
                if not self.has(name):
                    needed.setdefault(name, []).append(recipe)
        if needed:
            listed = "; ".join(f"{name} (for {', '.join(recipes)})" for name, recipes in needed.items())
            raise DataError(
                f"{self.folder} lacks data sets: {listed}. Each is a folder NAME/train/CLASS/*.jpg with a test/ beside (or "
                "of masks or boxes, see docs/segmentation.md and docs/detection.md), or NAME.tar of one. Name their folder "
                "with --data."
            )

    def find(self, name: str) -> str:
        """The argument of `load_task`. Raises `DataError` for a missing data set or an unreadable archive."""
        if ":" in name:
            return name
        if (self.folder / name).is_dir():
            return str(self.folder / name)
        self.check({"this recipe": [name]})
        return str(self._unpack(name))

    def load(self, name: str) -> Task:
        """The data set as a task. Raises `DataError` where it is not there or cannot be read."""
        return load_task(self.find(name), name=name.rpartition(":")[2], **READING.get(name, {}))

    def _archive(self, name: str) -> Path:
        return self.folder / f"{name}.tar"

    def _unpack(self, name: str) -> Path:
        """The unpacked archive; it appears whole or not at all."""
        target = self.cache / name
        if target.is_dir():
            return target
        self.cache.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.cache))
        try:
            with tarfile.open(self._archive(name)) as archive:
                archive.extractall(place, filter="data")
            if not (place / name).is_dir():
                raise DataError(f"{self._archive(name)} does not hold the folder {name}/ that its name promises.")
            os.replace(place / name, target)
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{self._archive(name)} cannot be unpacked into {self.cache}: {error}") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return target
