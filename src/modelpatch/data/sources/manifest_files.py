"""The manifests of a folder: one a split, shards of one, or one of all images beside pictures without class folders."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from modelpatch.backbone.listing import is_hidden, list_folder
from modelpatch.backbone.preprocessing import is_picture
from modelpatch.data.sources.class_layout import find_layout, grow_tree
from modelpatch.data.sources.column_names import IMAGE_NAMES, LABEL_NAMES, find_by_name, find_columns_of_pictures
from modelpatch.data.sources.picture_files import PictureFiles
from modelpatch.data.sources.split_names import plain_split_of, split_of
from modelpatch.data.sources.tables import PEEKED, READERS, peek_cells, peek_columns
from modelpatch.errors import DataError

FOUND_SUFFIXES = tuple(suffix for suffix in READERS if suffix not in (".txt", ".lst"))
LISTS = (".txt", ".lst")
PREFERRED = (".parquet", ".pq", ".arrow", ".feather")  # where a folder holds a split twice
UNREADABLE = (".xls", ".xlsx", ".ods", ".numbers")
BOXES = (b'"categories"', b'"annotations"')  # keys of COCO's files, which are no tables
HUB_FOLDERS = ("data", "default")  # which hold the shards of a data set of the hub


def find_manifests(folder: Path) -> dict[str | None, list[Path]]:
    """The manifests of a folder by split, None for one of all images; empty for a folder that holds none.

    Manifests of splits come first, then `metadata.csv` with labels, then others where no class folders hold the pictures. A
    folder without any of its own may have one in each folder of a split. One without a column of images that is called so is
    taken where the cells of one name pictures. Raises `DataError` for several of one kind.
    """
    own = _tables_of(folder)
    if by_split := _by_split(own):
        return by_split
    lone = [file for file in own if plain_split_of(file.stem) is None and _names_images(file)]
    metadata = [file for file in lone if file.stem.lower() == "metadata" and find_by_name(_columns(file), LABEL_NAMES)]
    if metadata:
        return {None: metadata[:1]}
    if lone and not _has_classes(folder):
        return _only(lone)
    if found := _in_split_folders(folder):
        return found
    others = [file for file in own if file not in lone and plain_split_of(file.stem) is None]
    if others and not _has_classes(folder):
        pictures = PictureFiles(folder)
        telling = [file for file in others if find_columns_of_pictures(peek_cells(file), pictures.find)]
        return {None: telling} if len(telling) == 1 else {}
    return {}


def list_labelled(folder: Path) -> list[Path]:
    """The tables of a folder that have columns of images and of labels."""
    return [file for file in _tables_of(folder) if _names_images(file) and find_by_name(_columns(file), LABEL_NAMES)]


def _tables_of(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if not is_hidden(file.name) and file.is_file()]
    return [
        file for file in files if (file.suffix.lower() in FOUND_SUFFIXES and not _holds_boxes(file)) or _is_list(file)
    ]


def _holds_boxes(file: Path) -> bool:
    if file.suffix.lower() != ".json":
        return False
    with file.open("rb") as stream:
        head = stream.read(PEEKED)
    return all(key in head for key in BOXES)


def _is_list(file: Path) -> bool:
    """Return True for a list of pictures and labels that is called as a split is."""
    return file.suffix.lower() in LISTS and plain_split_of(file.stem) is not None and _names_images(file)


def _by_split(files: Sequence[Path]) -> dict[str | None, list[Path]]:
    """The manifests that are called as splits are, where one is of the training split and names images."""
    found = defaultdict[str, list[Path]](list)
    for file in files:
        if split := plain_split_of(file.stem):
            found[split].append(file)
    if not any(map(_names_images, found.get("train", ()))):
        return {}
    return {split: _one_of(split, own) for split, own in found.items()}


def _one_of(split: str, files: Sequence[Path]) -> list[Path]:
    """One manifest or the shards of one. Raises `DataError` for several others."""
    for suffix in dict.fromkeys([*PREFERRED, *FOUND_SUFFIXES, *LISTS]):
        own = [file for file in files if file.suffix.lower() == suffix and (_names_images(file) or len(files) == 1)]
        if len(own) > 1 and not _are_shards(own):
            raise DataError(f"{own[0]} and {own[1]} are both the {split} split. Keep one of them.")
        if own:
            return own
    return list(files[:1])


def _are_shards(files: Sequence[Path]) -> bool:
    """Return True for names that differ in their numbers alone: `train-00000-of-00002.parquet`."""
    return len({"".join("#" if c.isdigit() else c for c in file.name) for file in files}) == 1


def _only(files: Sequence[Path]) -> dict[str | None, list[Path]]:
    labelled = [file for file in files if find_by_name(_columns(file), LABEL_NAMES)] or list(files)
    if len(labelled) > 1 and not _are_shards(labelled):
        names = ", ".join(file.name for file in labelled[:5])
        raise DataError(f"{labelled[0].parent} holds several manifests: {names}. Give the one to read: {labelled[0]}.")
    return {None: labelled}


def _in_split_folders(folder: Path) -> dict[str | None, list[Path]]:
    """A manifest in each folder of a split, or those of splits in a folder `data`."""
    folders = [one for one in sorted(folder.iterdir()) if not is_hidden(one.name) and one.is_dir()]
    for inner in folders:
        if inner.name.lower() in HUB_FOLDERS and (shards := _by_split(_tables_of(inner))):
            return shards
    found: dict[str | None, list[Path]] = {}
    for one in folders:
        split = split_of(one.name)
        named = [file for file in _tables_of(one) if _names_images(file)] if split else []
        if named:
            if split in found:
                raise DataError(f"{found[split][0]} and {named[0]} are both the {split} split. Keep one of them.")
            found[split] = next(iter(_only(named).values()))
    return found if "train" in found and not _has_classes(folder) else {}


def _names_images(file: Path) -> bool:
    """Return True for a table with a column that is called as those of images are, or that lists pictures."""
    return bool(find_by_name(_columns(file), IMAGE_NAMES)) or (file.suffix.lower() == ".json" and _maps_pictures(file))


def _maps_pictures(file: Path) -> bool:
    return any(is_picture(column) for column in peek_columns(file))


def _columns(file: Path) -> Mapping[str, Sequence[object]]:
    return dict.fromkeys(peek_columns(file), ())


def _has_classes(folder: Path) -> bool:
    """Return True where the pictures lie in the folders of several classes."""
    try:
        layout = find_layout(grow_tree(list_folder(folder)))
    except DataError:  # no classes, or folders of splits that hold pictures, as beside a manifest
        return False
    return len({layout.class_of.get(one, one.name) for own in layout.splits.values() for one in own}) > 1
