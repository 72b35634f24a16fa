"""Manifests: tables of images and labels, in one file, in one a split, or in shards, with or without a folder of pictures.

labels.csv, train.tsv + test.tsv, metadata.jsonl, train.parquet with the images in it, train/_classes.csv, train.txt with lines
`path label`. Columns have any usual names; several labels or numbers are read as `columns.py` says.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from modelpatch.backbone.preprocessing import ImageSource
from modelpatch.data.sources import base
from modelpatch.data.sources.column_names import (
    LABEL_NAMES,
    OTHERS,
    check_column,
    choose_image,
    choose_label,
    choose_split,
    fold_column,
    list_some,
)
from modelpatch.data.sources.columns import Table, Targets, find_targets, make_vectors
from modelpatch.data.sources.labels import UNLABELLED, clean_name, is_missing, make_classification
from modelpatch.data.sources.manifest_files import UNREADABLE, find_manifests
from modelpatch.data.sources.picture_files import Hint, PictureFiles
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.tables import READERS, TableFile, read_table
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification

NO_PICTURE = "row without its picture"
REPEATED, TORN = "row that repeats another", "row of a picture with several labels"
UNNAMED = "row of a class that --classes leaves out"
MOST_TORN = 0.25  # share of pictures with several labels, up to which these are mistakes


class ManifestRow(NamedTuple):
    """A row of a manifest: its split, its image, its cells by column, and the file and number that name it."""

    split: str
    image: ImageSource
    cells: Mapping[str, Any]
    file: Path
    number: int

    @property
    def place(self) -> str:
        """The row's name in errors."""
        return f"{self.file}, row {self.number}"

    @property
    def name(self) -> str:
        """The row's name in counts."""
        return f"{self.file.name}, row {self.number}"


@base.register_source("manifests")
class Manifests(base.DataSource):
    """A manifest, or a folder that holds one for each split or beside its pictures."""

    general = True
    has_columns = True

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        if path.is_dir():
            try:
                return bool(find_manifests(path))
            except DataError:  # several, which `read` asks about unless another layout is found
                return True
        return is_table(path)

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = Path(source), Remarks()
        folder = path if path.is_dir() else path.parent
        reader = ManifestReader(PictureFiles(folder), options, remarks)
        found: dict[str | None, list[Path]] = find_manifests(path) if path.is_dir() else {None: [path]}
        for split in sorted(found, key=lambda split: split != "train"):  # whose columns say how labels are called
            for file in found[split]:
                reader.read(file, split or "train")
        made = reader.make(str(path))
        other = reader.pictures.other_suffix
        remarks.note("pictures were found under another suffix than the manifest says", other)
        return replace(made, **remarks.facts)


class ManifestReader:
    """The rows of the manifests of one task, which are read file by file, and the task that they make."""

    def __init__(self, pictures: PictureFiles, options: base.SourceOptions, remarks: Remarks) -> None:
        self.pictures, self.options, self.remarks = pictures, options, remarks
        self.rows: list[ManifestRow] = []
        self.label: str | None = None
        self.missing: list[str] = []  # rows whose picture is not there

    def read(self, file: Path, default: str) -> None:
        """Add the rows of a file, of a split that is the default. Raises `DataError` that names the file and the row."""
        table, source = _read_table(file), str(file)
        if not len(table) and table.columns:
            return
        pictures = self.pictures
        if file.parent != pictures.folder and file.is_relative_to(pictures.folder):
            own = PictureFiles(file.parent)
            pictures = own if own.holds_pictures else pictures
        for note in table.notes:
            self.remarks.note(note)
        named = check_column(table.cells, self.options.split_column, "split-column", source)
        image = check_column(table.cells, self.options.image_column, "image-column", source)
        image = image or choose_image(table.cells, source, pictures.find)
        label = self._find_label(table, image, named)
        if label == image:
            raise DataError(f"{source}: the column {image!r} cannot hold both images and labels. Name two columns.")
        splits = choose_split(table.cells, (image, label), source, named) or {}
        self.label = self.label or label
        bare = label is None and all(fold_column(name) in OTHERS for name in table.cells if name != image)
        found = self._find_images(
            table, image, label, [splits.get(row, default) for row in range(len(table))], pictures
        )
        for row, picture in enumerate(found):
            cells = {str(self.label) if name == label else name: values[row] for name, values in table.cells.items()}
            cells.pop(image, None)
            one = ManifestRow(splits.get(row, default), picture or b"", cells, file, row + 1)
            if picture is None:
                self.remarks.pass_over(NO_PICTURE, f"{one.name}: {str(table.cells[image][row])[:200]}")
                self.missing.append(f"{one.place}: there is no image {str(table.cells[image][row])[:200]!r}")
            elif bare and self.label is not None:
                self.remarks.pass_over(UNLABELLED, one.name)
            else:
                self.rows.append(one)

    def _find_label(self, table: TableFile, image: str, split: str | None) -> str | None:
        """The column of labels; None for a table that has none, or whose columns the user names as labels or numbers."""
        options, source = self.options, str(table.path)
        if options.label_column is not None:
            return check_column(table.cells, options.label_column, "label-column", source)
        named = options.classes if isinstance(options.classes, tuple) else ()
        if named and options.kind != Classification.name and all(name in table.cells for name in named):
            return None
        label, note = choose_label(table.cells, (image, split), source)
        if note:
            self.remarks.note(f"{table.path.name}: {note}")
        return label

    def _find_images(
        self, table: TableFile, image: str, label: str | None, splits: Sequence[str], pictures: PictureFiles
    ) -> list[ImageSource | None]:
        """The image of every row: the bytes in its cell, or the file that it names, unless other rows name that better."""
        found, values = list[ImageSource | None](), defaultdict[Path, set[str]](set)
        for row, split in enumerate(splits):
            cell = table.cells[image][row]
            if isinstance(cell, dict):
                cell = cell.get("bytes") or cell.get("path")
            if isinstance(cell, bytes):
                found.append(cell or None)
                continue
            hint = Hint(split, "" if label is None else str(table.cells[label][row]))
            try:
                file = None if is_missing(cell) else pictures.find(str(cell), hint)
            except DataError as error:
                raise DataError(f"{table.place(row)}: {error}") from error
            found.append(file)
            if file is not None:
                values[file].add(str(cell).strip())
        best = {file: pictures.closest(sorted(given), file) for file, given in values.items() if len(given) > 1}
        for row, one in enumerate(found):
            if isinstance(one, Path) and one in best and str(table.cells[image][row]).strip() != best[one]:
                found[row] = None
        return found

    def make(self, source: str) -> base.Found:
        """The task of all rows. Raises `DataError` for none, and for labels that could mean two things."""
        rows = self.rows
        if not rows and self.missing:
            raise DataError(
                f"{self.missing[0]} in {self.pictures.folder} or below it, nor any other of its {len(self.missing):,} rows. "
                "Put the manifest into the folder that its paths begin at."
            )
        if not rows:
            raise DataError(f"{source} has no rows.")
        names = dict.fromkeys(name for row in rows for name in row.cells)
        cells = {name: [row.cells.get(name) for row in rows] for name in names}
        label = self.label if self.label in cells else None  # whose file may have no picture that is there
        found = find_targets(Table(source, cells, label, lambda number: rows[number].place), self.options)
        if isinstance(found, Targets):
            return make_vectors(found, [(row.split, row.image) for row in rows])
        return self._make_classes(found)

    def _make_classes(self, labels: Sequence[str] | None) -> base.Found:
        """The task of the rows with one class each: the label's, or the one that is given for the row."""
        given = [self._label_of(row) for row in self.rows] if labels is None else list(labels)
        pairs = list(zip(self.rows, _plain_numbers(given), strict=True))
        self.remarks.pass_over(UNLABELLED, *(row.name for row, label in pairs if label is None))
        labelled = [(row, clean_name(label)) for row, label in pairs if label is not None]
        if not labelled:
            raise DataError(f"{self.rows[0].place}: it has no {self.label}, nor has any other row. Expected labels.")
        names = tuple(map(clean_name, self.options.classes)) if isinstance(self.options.classes, tuple) else None
        if names is not None:
            if lost := [name for name in names if name not in {label for _, label in labelled}]:
                raise DataError(
                    f"{self.rows[0].file} has no row of the class {lost[0]!r}. Leave it out of the classes."
                )
            self.remarks.pass_over(UNNAMED, *(row.name for row, label in labelled if label not in names))
            labelled = [(row, label) for row, label in labelled if label in names]
        members = defaultdict[str, list[tuple[ImageSource, str]]](list)
        for row, label in self._without_repetitions(labelled):
            members[row.split].append((row.image, label))
        return make_classification(members, self.remarks, names)

    def _label_of(self, row: ManifestRow) -> Any:
        """The label of a row, None where it has none. Raises `DataError` for a file without a column of labels."""
        if self.label is None or self.label not in row.cells:
            raise DataError(
                f"{row.file} has the columns {list_some(list(row.cells))} beside its images. Expected one of "
                f"{', '.join(LABEL_NAMES[:8])} ... for labels, or name one: --label-column (label_column=...)."
            )
        return None if is_missing(row.cells[self.label]) else row.cells[self.label]

    def _without_repetitions(self, rows: Sequence[tuple[ManifestRow, str]]) -> list[tuple[ManifestRow, str]]:
        """The rows whose picture has one label, once a split; others are counted. Raises `DataError` for many of several."""
        given = defaultdict[Any, set[str]](set)
        for row, label in rows:
            given[row.image].add(label)
        torn = {image for image, labels in given.items() if len(labels) > 1}
        if len(torn) > MOST_TORN * len(given):
            row = next(row for row, _ in rows if row.image in torn)
            raise DataError(
                f"{row.place}: {row.image if isinstance(row.image, Path) else 'the image'} has rows of the labels "
                f"{', '.join(sorted(given[row.image]))[:200]}, and {len(torn):,} of {len(given):,} images have several. "
                "Expected one row an image; write several labels into one cell, such as cat|dog."
            )
        seen, kept = set[tuple[str, ImageSource]](), []
        for row, label in rows:
            key = (row.split, row.image)
            if row.image in torn:
                self.remarks.pass_over(TORN, row.name)
            elif key in seen:
                self.remarks.pass_over(REPEATED, row.name)
            else:
                seen.add(key)
                kept.append((row, label))
        if not kept:
            raise DataError(f"{rows[0][0].place}: every image has rows of several labels. Expected one label an image.")
        return kept


def is_table(path: Path) -> bool:
    """Return True for the name of a table, of a list or of a spreadsheet."""
    return path.suffix.lower() in (*READERS, *UNREADABLE) and path.is_file()


def list_images(path: Path, column: str | None = None) -> list[Path]:
    """The image file of every row of a table, named by a column. Raises `DataError` that names the row of one without."""
    table, pictures, files = _read_table(path), PictureFiles(path.parent), list[Path]()
    image = check_column(table.cells, column, "image-column", str(path))
    image = image or choose_image(table.cells, str(path), pictures.find)
    for row, cell in enumerate(table.cells[image]):
        if not isinstance(cell, str | int):
            raise DataError(
                f"{table.place(row)}: its {image} names no file. Expected the path of an image, or its name."
            )
        if (file := pictures.find(str(cell))) is None:
            raise DataError(f"{table.place(row)}: there is no image {str(cell)[:200]!r} in {path.parent} or below it.")
        files.append(file)
    return files


def _read_table(file: Path) -> TableFile:
    if file.suffix.lower() in UNREADABLE:
        raise DataError(f"{file} is a spreadsheet, which is not read. Save it as CSV, and give that file.")
    return read_table(file)


def _plain_numbers(labels: Sequence[Any]) -> list[str | None]:
    """Labels as text: 1.0 is 1 where all are whole numbers, and -1 among these is no label."""
    texts = [None if label is None else str(label) for label in labels]
    if not all(text is None or re.fullmatch(r"\s*-?\d+(\.0+)?\s*", text) for text in texts):
        return texts
    whole = [None if text is None else text.strip().partition(".")[0] for text in texts]
    return [None if text == "-1" else text for text in whole]
