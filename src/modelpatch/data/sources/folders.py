"""Class folders: the name of an image's folder is its class.

ROOT/SPLIT/CLASS/*          splits under any usual names: train, Training, seg_train, val, dev, Test, my-test ...
ROOT/CLASS/*                no splits
ROOT/CLASS/SPLIT/*          splits in each class
ROOT/data/.../*             any of these below folders that hold nothing else, as archives unpack

The name of a split never becomes a class unless `classes` names it.
"""

from pathlib import Path
from typing import Any

from modelpatch.backbone.listing import list_folder
from modelpatch.backbone.preprocessing import ImageSource, is_picture
from modelpatch.data.sources import base
from modelpatch.data.sources.class_layout import ClassLayout, PictureTree, find_layout, grow_tree
from modelpatch.data.sources.foreign import begins_as_picture, is_unread_picture, tell_arrays
from modelpatch.data.sources.labels import clean_name, make_classification
from modelpatch.data.sources.manifest_files import find_manifests, list_labelled
from modelpatch.data.sources.pairing import find_marked_masks
from modelpatch.data.sources.remarks import Remarks
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification
from modelpatch.text import count_of

OUTSIDE = "picture outside of class folders"
MASK = "mask of the picture beside it"


@base.register_source("folders")
class ClassFolders(base.DataSource):
    """A folder of class folders, with or without folders of splits above or below them."""

    kind = Classification.name
    general = True

    def accepts(self, source: Any) -> bool:
        try:
            return Path(source).is_dir() and not find_manifests(Path(source))
        except DataError:  # several manifests, of which their source asks for one
            return False

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        path, remarks = Path(source), Remarks()
        given = options.classes if isinstance(options.classes, tuple) else None
        names = None if given is None else tuple(map(clean_name, given))
        tree = grow_tree(list_folder(path))
        layout = find_layout(tree, names)
        if "train" not in layout.splits:
            raise DataError(
                f"{path} has the splits {', '.join(layout.splits)} but no training images. Expected "
                f"{path.name}/train/CLASS/*.jpg."
            )
        members: dict[str, list[tuple[ImageSource, str]]] = {}
        for split, folders in layout.splits.items():
            named = sorted(
                (layout.class_of.get(folder, folder.name), folder.listing.path, folder) for folder in folders
            )
            found = [(file, name) for name, _, folder in named for file in folder.all_pictures()]
            masks = find_marked_masks([file for file, _ in found])
            remarks.pass_over(MASK, *(file.relative_to(path).as_posix() for file in sorted(masks)))
            members[split] = [(file, name) for file, name in found if file not in masks]
        tell_what_is_left(tree, layout, remarks)
        remarks.note(
            "tables of images and labels beside the class folders are not read; give one of them to read that",
            [file.name for file in list_labelled(path)],
            "table of images and labels beside the class folders is not read; give that file to read it",
        )
        return make_classification(members, remarks, names)


def tell_what_is_left(root: PictureTree, layout: ClassLayout, remarks: Remarks) -> None:
    """Count what is not read: hidden files, files that are no pictures, pictures outside of class folders; note the rest."""
    path = root.listing.path

    def name(file: Path) -> str:
        return file.relative_to(path).as_posix()

    for folder, reason in layout.left_out.items():
        remarks.pass_over(reason, f"{name(folder.listing.path)}/ ({count_of(folder.total, 'picture')})")
    apart = {one for folder in layout.left_out for one in folder.listing.below()}
    read = {one for own in layout.splits.values() for folder in own for one in folder.listing.below()}
    classes = read | {one for folder in layout.empty for one in folder.listing.below()}
    if told := tell_arrays((file for one in root.listing.below() if one in classes for file in one.files), path):
        raise DataError(f"{path} has other files than pictures in the folders of its classes: {told}")
    for listing in root.listing.below():
        if listing in apart:
            continue
        for file in listing.files:
            if is_unread_picture(file):
                remarks.pass_over(f"picture in a format that is not read ({file.suffix.lower()})", name(file))
            elif not is_picture(file.name):
                what = "picture under a suffix of none" if begins_as_picture(file) else "no picture"
                remarks.pass_over(f"{what} ({file.suffix.lower() or 'no suffix'})", name(file))
            elif listing not in read:
                remarks.pass_over(OUTSIDE, name(file))
        remarks.pass_over("hidden", *map(name, listing.hidden))
        remarks.pass_over("link to nothing or in a circle, or no plain file", *map(name, listing.odd))
    remarks.note(
        "folders hold no picture", [name(one.listing.path) + "/" for one in layout.empty], "folder holds no picture"
    )
    nested = [one for own in layout.splits.values() for one in own if one.holders]
    remarks.note(
        "class folders hold folders, whose pictures are read as the class of the upper one",
        [name(one.listing.path) + "/" for one in nested],
        "class folder holds folders, whose pictures are read as the class of the upper one",
    )
