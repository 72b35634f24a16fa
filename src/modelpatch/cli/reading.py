"""The options for reading data, the same for every verb that reads some, and the data that they name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typer import Argument, Option

import modelpatch as mp
from modelpatch.cli.console import read_names
from modelpatch.cli.options import patch_of
from modelpatch.cli.verb import option, spell_option
from modelpatch.errors import DataError, ModelpatchError, TrainingWarning

if TYPE_CHECKING:
    from modelpatch.engine.cascade import Cascade

DataArgument = Annotated[str, Argument(help="Class folders, a manifest, hf:NAME or bundled:digits, as for fit.")]
DataOption = Annotated[str | None, Option(help="The task's data, as for fit.")]
ImageColumnOption = Annotated[str | None, Option(help="The column of a table that holds or names the images.")]


@dataclass(frozen=True)
class Source:
    """The options for reading data: `load(source)` returns the task."""

    panel: ClassVar[str] = "Data"
    kind: str | None = option(None, help="The kind of task, such as multilabel; by default that of the data.")
    classes: str | None = option(
        None,
        help="Class folders or labels to read, values of masks, or columns; comma-separated or a file, one a line.",
    )
    separator: str | None = option(None, help="The text between several labels in one cell, such as '|'.")
    ignore: int | None = option(None, help="A value of masks to ignore, beside 255.")
    image_column: ImageColumnOption = None
    label_column: str | None = option(None, help="The column of a table that holds the labels.")
    split_column: str | None = option(None, help="The column of a table that names the split of each row.")
    skip_unreadable: bool = option(
        False, "--skip-unreadable", help="Leave out images that cannot be read, and count them."
    )

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, as `load_task` takes them. Raises `ModelpatchError` for names that are none."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["classes"] = read_names("--classes", self.classes) or None
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def check_data(self, data: object, *others: str) -> None:
        """Raise `ModelpatchError` for options that are given without --data, except for `others`."""
        if data is None and (unused := [name for name in self.given if name not in others]):
            wanted = spell_option(unused[0], self.given[unused[0]]).partition(" ")[0]
            raise ModelpatchError(f"{wanted} is for reading data. Give --data as well.")

    def load(self, source: str, seed: int, **others: Any) -> mp.Task:
        """The task of a source. Raises `DataError`."""
        return mp.load_task(source, seed=seed, **self.given, **others)

    def load_own(
        self, loaded: mp.Patch | Cascade, data: Sequence[str], seed: int | None = None, **others: Any
    ) -> mp.Task:
        """The data of a patch's task, or of its tasks, read as for the fit, as far as the file says, but for what is given.

        Columns are recorded for tables; data of another layout is read without them. Raises `DataError`.
        """
        from modelpatch.data.sources.base import takes_columns
        from modelpatch.data.task import join_tasks
        from modelpatch.train.evaluation import facts_of

        patch = patch_of(loaded)
        facts = facts_of(patch)
        kept = {one.name: facts[one.name] for one in fields(self) if one.name in facts}
        names = kept.get("classes")
        kept |= {"kind": patch.task.kind, "classes": list(map(str, names)) if isinstance(names, list) else None}
        chosen = fitted_seed(patch) if seed is None else seed
        tasks = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingWarning)  # what is unusual about the data was said before the fit
            for one in data:
                fitting = kept if takes_columns(one) else {n: v for n, v in kept.items() if not n.endswith("_column")}
                tasks.append(mp.load_task(one, seed=chosen, **{**fitting, **self.given}, **others))
        return join_tasks(tasks)


def fitted_seed(patch: mp.Patch) -> int:
    """The seed of the fitted data's split, as far as the file says: another would test images that were trained on."""
    from modelpatch.data.splits import split_seed
    from modelpatch.train.evaluation import facts_of

    if (split := split_seed(facts_of(patch))) is not None:
        return split
    settings = patch.created.get("settings")
    seed = settings.get("seed") if isinstance(settings, dict) else None
    return seed if type(seed) is int and seed >= 0 else 0


def gather_images(paths: Sequence[Path], column: str | None = None) -> list[Path]:
    """Image files in the given order; folders are searched, and tables name theirs. Raises `DataError` if there are none."""
    from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES, find_images
    from modelpatch.data.sources.manifests import is_table, list_images

    if missing := [path for path in paths if not path.exists()]:
        raise DataError(f"there is no image or folder {missing[0]}.")
    files: list[Path] = []
    for path in paths:
        files += find_images(path) if path.is_dir() else list_images(path, column) if is_table(path) else [path]
    if not files:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"no images in {', '.join(map(str, paths))}. Known kinds: {known}.")
    if column is not None and not any(map(is_table, paths)):
        raise DataError(f"--image-column {column} is for tables of images. Give one, or leave it out.")
    return files
