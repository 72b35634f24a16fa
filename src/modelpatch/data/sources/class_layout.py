"""The layout of class folders: splits above, below or without them, under any usual names, and below folders that only wrap.

ROOT/SPLIT/CLASS/*, ROOT/CLASS/*, ROOT/CLASS/SPLIT/*, and any of these as ROOT/data/...
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelpatch.backbone.listing import Listing
from modelpatch.backbone.preprocessing import is_picture
from modelpatch.data.sources.labels import clean_name
from modelpatch.data.sources.split_names import COLLECTIONS, plain_split_of, split_of, without_overlaps
from modelpatch.errors import DataError

BESIDE, UNNAMED = "folder beside the splits", "folder that --classes leaves out"


@dataclass(eq=False)
class PictureTree:
    """A folder of a listing with the pictures in it, and the number of those in it and below it."""

    listing: Listing
    pictures: list[Path]
    folders: list["PictureTree"] = field(default_factory=list)
    total: int = 0

    @property
    def name(self) -> str:
        """The folder's own name."""
        return clean_name(self.listing.name)

    @property
    def holders(self) -> list["PictureTree"]:
        """The folders in it that hold pictures, directly or below."""
        return [folder for folder in self.folders if folder.total]

    def all_pictures(self) -> list[Path]:
        """The pictures in it and below it, sorted."""
        return sorted(file for one in self.listing.below() for file in one.files if is_picture(file.name))


@dataclass
class ClassLayout:
    """The class folders of each split, folders that are left out by reason, and folders of splits that hold nothing."""

    splits: dict[str, list[PictureTree]] = field(default_factory=dict)
    class_of: dict[PictureTree, str] = field(default_factory=dict)  # where a class is not called as its folder is
    left_out: dict[PictureTree, str] = field(default_factory=dict)
    empty: list[PictureTree] = field(default_factory=list)


def grow_tree(listing: Listing) -> PictureTree:
    """The tree of a listing."""
    below = listing.below()
    trees = {one: PictureTree(one, [file for file in one.files if is_picture(file.name)]) for one in below}
    for one in reversed(below):
        tree = trees[one]
        tree.folders = [trees[folder] for folder in one.folders]
        tree.total = len(tree.pictures) + sum(folder.total for folder in tree.folders)
    return trees[listing]


def find_layout(root: PictureTree, names: Sequence[str] | None = None) -> ClassLayout:
    """The class folders of every split below a folder. Raises `DataError` for none, and for names that mean two things."""
    top = root
    while True:
        holders = top.holders
        if names is not None and set(names) <= {folder.name for folder in holders}:
            return _keep_named(ClassLayout({"train": holders}), names, root)
        if layout := _find_splits(top) or _find_inner_splits(top):
            return layout if names is None else _keep_named(layout, names, root)
        if len(holders) != 1 or not holders[0].holders:
            break
        top = holders[0]
    if not holders:
        path = root.listing.path
        raise DataError(
            f"{path} holds no class folders with images. Expected {path.name}/train/CLASS/*.jpg or {path.name}/CLASS/*.jpg."
        )
    if names is None and (inner := _shared_folders(holders)):
        outer, first = ",".join(folder.name for folder in holders)[:300], holders[0].name
        raise DataError(
            f"{root.listing.path}: each of {outer[:200]} holds the folders {', '.join(inner)[:200]}. If these are the "
            f"classes, give the folder that holds them, {holders[0].listing.path}, or call splits train/, val/ and test/. If "
            f"{first} and the others are: --classes {outer} (classes=[...])."
        )
    layout = ClassLayout({"train": holders}, empty=[folder for folder in top.folders if not folder.total])
    return layout if names is None else _keep_named(layout, names, root)


def _find_splits(top: PictureTree) -> ClassLayout | None:
    """The folders in a folder that are splits, with class folders in them; None where none is. Raises `DataError` to ask."""
    holders = top.holders
    plain = [folder for folder in holders if plain_split_of(folder.name)]
    other = [folder for folder in holders if split_of(folder.name) and folder not in plain]
    good = [folder for folder in plain if _unwrap(folder).holders]
    more = [folder for folder in other if _unwrap(folder).holders]
    if not good and len({split_of(folder.name) for folder in more}) > 1:
        good, more = more, []
    spoken = {split_of(folder.name) for folder in good}
    good += [folder for folder in more if split_of(folder.name) not in spoken] if good else []
    apart = without_overlaps([folder.name for folder in good])
    good = [folder for folder in good if folder.name in apart]
    beside = [folder for folder in holders if folder not in good]
    if not good:
        if plain or (other and len(other) == len(holders) > 1):
            raise _ask(top, plain or other)
        return None
    strangers = [folder for folder in beside if folder.holders or folder not in [*plain, *other]]
    if len(good) == 1 and len(strangers) > 1 and not _share_classes(good[0], strangers):
        raise _ask(top, good)
    layout = ClassLayout(left_out=dict.fromkeys(beside, BESIDE))
    for split, folders in _choose(good, layout).items():
        known = {folder.name for folder in layout.splits.get("train", ())}
        inner = _unwrap(folders, known)
        layout.splits[split] = inner.holders
        layout.empty += [folder for folder in inner.folders if not folder.total]
    bare = [folder for folder in top.folders if not folder.total and plain_split_of(folder.name)]
    empty = _choose([folder for folder in bare if split_of(folder.name) not in layout.splits], layout)
    layout.splits |= {split: [] for split in empty}
    layout.empty += bare
    return layout


def _choose(good: Sequence[PictureTree], layout: ClassLayout) -> dict[str, PictureTree]:
    """One folder for each split, training first; of several the one that is called as the split alone."""
    by_split = defaultdict[str, list[PictureTree]](list)
    for folder in good:
        by_split[str(split_of(folder.name))].append(folder)
    chosen = {}
    for split in sorted(by_split, key=("train", "validation", "test").index):
        folders = by_split[split]
        exact = [folder for folder in folders if plain_split_of(folder.name, ())] if len(folders) > 1 else folders
        exact = exact or [folder for folder in folders if plain_split_of(folder.name, COLLECTIONS)]
        if len(exact) != 1:
            first, second = [folder.listing.path for folder in (exact or folders)[:2]]
            raise DataError(f"{first} and {second} are both the {split} split. Keep one of them.")
        chosen[split] = exact[0]
        layout.left_out |= {folder: BESIDE for folder in folders if folder is not exact[0]}
    return chosen


def _find_inner_splits(top: PictureTree) -> ClassLayout | None:
    """Classes with folders of splits in each, CLASS/SPLIT/*; None where any folder is something else."""
    holders = top.holders
    inner = [folder for one in holders for folder in one.holders]
    whole = all(not one.pictures and one.holders for one in holders)
    if not whole or len(holders) < 2 or not all(plain_split_of(folder.name) for folder in inner):
        return None
    layout = ClassLayout()
    for one in holders:
        for folder in one.holders:
            layout.splits.setdefault(str(plain_split_of(folder.name)), []).append(folder)
            layout.class_of[folder] = one.name
    return layout


def _unwrap(tree: PictureTree, classes: set[str] | frozenset[str] = frozenset()) -> PictureTree:
    """The folder itself, or the one below it that everything lies in: `seg_train/seg_train`. Classes that are known stay."""
    while not tree.pictures and len(tree.holders) == 1:
        only = tree.holders[0]
        if only.pictures or only.name in classes:
            break
        tree = only
    return tree


def _share_classes(split: PictureTree, others: Sequence[PictureTree]) -> bool:
    """Return True where folders hold folders of the same names as a split does."""
    names = {folder.name for folder in _unwrap(split).holders}
    return any(names & {folder.name for folder in _unwrap(other).holders} for other in others)


def _shared_folders(holders: Sequence[PictureTree]) -> list[str]:
    """The names of the folders in each of several folders that hold nothing else; empty where they differ or are numbers."""
    names = [sorted(folder.name for folder in one.holders) for one in holders]
    alike = len(holders) > 1 and not any(one.pictures for one in holders) and all(own == names[0] for own in names)
    return names[0] if alike and len(names[0]) > 1 and not all(map(str.isdigit, names[0])) else []


def _keep_named(layout: ClassLayout, names: Sequence[str], root: PictureTree) -> ClassLayout:
    """The layout with the classes that the user names alone. Raises `DataError` for one that has no folder."""
    called = {folder: layout.class_of.get(folder, folder.name) for own in layout.splits.values() for folder in own}
    if missing := [name for name in names if name not in called.values()]:
        known = ", ".join(sorted(set(called.values())))[:300]
        raise DataError(f"{root.listing.path} has no folder of the class {missing[0]!r}; it has: {known}.")
    layout.left_out |= {folder: UNNAMED for folder, name in called.items() if name not in names}
    layout.splits = {split: [one for one in own if called[one] in names] for split, own in layout.splits.items()}
    return layout


def _ask(top: PictureTree, folders: Sequence[PictureTree]) -> DataError:
    """The question that folders ask which are called as splits are, and do not look like them."""
    named = ", ".join(folder.name for folder in folders)
    every = ",".join(folder.name for folder in top.holders)[:300]
    rest = [folder.name for folder in top.holders if folder not in folders]
    first = folders[0].name
    apart = f", or of the others, --classes {','.join(rest)[:300]}" if len(rest) > 1 else ""
    return DataError(
        f"{top.listing.path}: {named} is the name of a split, but its place is that of a class. For splits, expected "
        f"{first}/CLASS/*.jpg, or a manifest of labels. For classes, give the names of all: --classes {every} (classes=[...])"
        f"{apart}."
    )
