"""Class folders: `train/CLASS/*`, `test/CLASS/*` (and `val` or `validation`), or `CLASS/*` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelpatch.backbone.preprocessing import find_images
from modelpatch.data.sources.base import DataSource, Found, SourceOptions, named_splits, register_source
from modelpatch.data.sources.manifests import find_manifests, make_classification
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification


@register_source("folders")
class ClassFolders(DataSource):
    """A folder of class folders, with or without folders of splits above them."""

    kind = Classification.name
    general = True

    def accepts(self, source: Any) -> bool:
        return Path(source).is_dir() and not find_manifests(Path(source))

    def read(self, source: Any, options: SourceOptions) -> Found:
        path = Path(source)
        folders = named_splits([folder for folder in sorted(path.iterdir()) if folder.is_dir()])
        if folders and "train" not in folders:
            raise DataError(
                f"{path} has the splits {', '.join(folders)} but no training images. Expected {path.name}/train/CLASS/*.jpg."
            )
        folders = folders or {"train": path}
        files = {
            split: {folder.name: find_images(folder) for folder in root.iterdir() if folder.is_dir()}
            for split, root in folders.items()
        }
        classes = sorted({name for own in files.values() for name, images in own.items() if images})
        if not classes:
            raise DataError(
                f"{path} holds no class folders with images. Expected {path.name}/train/CLASS/*.jpg or "
                f"{path.name}/CLASS/*.jpg."
            )
        members = {
            split: [(file, name) for name in classes for file in own.get(name, ())] for split, own in files.items()
        }
        return make_classification(members, classes)
