"""Images paired with their masks: by the names of folders, or by the ends of names in one folder.

images/ beside masks/, with folders of splits above or below; SPLIT/ beside SPLIT_labels/; x.jpg with x.png or x_mask.png
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES, find_images
from modelpatch.data.sources.mask_folders import find_mask_folders, has_few_colours
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.split_names import SPLIT_OF_WORD, split_of
from modelpatch.errors import DataError

IMAGE_FOLDERS = frozenset(  # the letters of names, in lower case
    [
        *(
            "images",
            "image",
            "img",
            "imgs",
            "imgdir",
            "imagedir",
            "jpegimages",
            "leftimgbit",
            "pictures",
            "photos",
            "rgb",
            "original",
            "originals",
            "frames",
        ),
        *("input", "inputs", "data", "imagespng"),
    ]
)
MASK_FOLDERS = frozenset(
    [
        *(
            "masks",
            "mask",
            "maskdir",
            "maskspng",
            "labels",
            "label",
            "labelspng",
            "annotations",
            "annotation",
            "annots",
        ),
        *("annot", "anns", "ann", "anndir", "gt", "gts", "gtfine", "groundtruth", "groundtruths", "segmentationclass"),
        *("segmentation", "segmentations", "segmasks", "segmask", "pixellabels", "lbl", "lbls"),
    ]
)
DEEPEST = 4  # folders of roles and splits above each other
LOSSLESS = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif"})
BREAK = r"[ _.\-]*"
MASK_WORD = (
    r"(?:gtfine_labeltrainids|gtfine_labelids|labeltrainids|labelids|masks?|labels?|annotations?|annot|gt|ground_?truth"
    r"|seg(?:mentation|mask)?|truth|matte)"
)
MASK_END = re.compile(rf"(?:(?<=[a-z0-9])[ _.\-]+{MASK_WORD}|_L)$", re.IGNORECASE)
MARKED_MASK = re.compile(rf"[ _.\-]+{MASK_WORD}(?:_\d+)?$", re.IGNORECASE)
IMAGE_END = re.compile(r"[ _.\-]+(?:leftimg8bit|images?|img|im|rgb|sat|photo|input|orig(?:inal)?)$", re.IGNORECASE)
BEGIN = re.compile(rf"^(?:{MASK_WORD}|images?|img|im|picture|photo){BREAK}(?=\d)", re.IGNORECASE)
MASK_BEGIN = re.compile(rf"^{MASK_WORD}{BREAK}(?=\d)", re.IGNORECASE)
TRAIN_IDS = "labeltrainids"  # of Cityscapes, the values that are trained on
Key = tuple[str, ...]


@dataclass
class Role:
    """A file's split, and if it is a mask (None for unknown), as the folders above it tell, and the other folders."""

    split: str | None = None
    masks: bool | None = None
    others: Key = ()


@dataclass
class PairedFiles:
    """The images of every split with the mask of each."""

    images: dict[str, list[Path]] = field(default_factory=dict)
    masks: dict[str, list[Path]] = field(default_factory=dict)


def role_of(parts: Sequence[str]) -> Role:
    """The role of a file in these folders, from the outermost on."""
    role = Role()
    for part in parts:
        split, masks = _read_name(part)
        if split is None and masks is None:
            role.others += (part,)
        role.split = role.split or split
        role.masks = role.masks if masks is None else masks
    return role


def _read_name(name: str) -> tuple[str | None, bool | None]:
    """The split and the role that a folder's whole name tells of: `train`, `masks`, `train_labels`, `valannot`."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    for word in ("", *sorted(SPLIT_OF_WORD, key=len, reverse=True)):
        for rest in (letters.removeprefix(word), letters.removesuffix(word)):
            if word and rest == letters:
                continue
            if word and not rest:
                return SPLIT_OF_WORD[word], None
            if rest in IMAGE_FOLDERS or rest in MASK_FOLDERS:
                return SPLIT_OF_WORD.get(word), rest in MASK_FOLDERS
    split, end = (
        split_of(name),
        re.sub(r"[^a-z]", "", name.lower().replace("ground_truth", "groundtruth").rpartition("_")[2]),
    )
    if split and (end in IMAGE_FOLDERS or end in MASK_FOLDERS):  # ISIC2018_Task1_Training_GroundTruth
        return split, end in MASK_FOLDERS
    return None, None


def has_folders(path: Path) -> bool:
    """Return True where folders of images lie beside folders of masks that hold pictures."""
    roles = list(_walk(path, Role(), 0))
    if not any(role.masks and _holds_pictures(folder) for folder, role in roles):
        return False
    splits = {role.split for _, role in roles if role.masks}
    return any(
        (role.masks is False or (role.masks is None and role.split in splits and role.split))
        and _holds_pictures(folder)
        for folder, role in roles
    )


def _walk(folder: Path, role: Role, depth: int) -> Iterator[tuple[Path, Role]]:
    """The folders whose names tell of splits and roles, with what they tell."""
    if depth:
        yield folder, role
    if depth < DEEPEST:
        for inner in sorted(one for one in folder.iterdir() if one.is_dir()):
            split, masks = _read_name(inner.name)
            if split or masks is not None:
                yield from _walk(inner, Role(role.split or split, role.masks if masks is None else masks), depth + 1)


def _holds_pictures(folder: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))


def has_pairs(folder: Path) -> bool:
    """Return True where most of the pictures that lie in the folder itself are images and masks of one stem."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    masks = [file for file, mask in _marked(files).items() if mask]
    images = {_plain(file.stem) for file, mask in _marked(files).items() if not mask}
    paired = sum(_plain(file.stem) in images for file in masks)
    return paired > 0 and 2 * paired >= len(masks) and 2 * paired >= len(images)


def find_marked_masks(files: Sequence[Path]) -> set[Path]:
    """The files with the name of another in their folder and `_mask` or its like at the end, where few colours are in them."""
    stems = {(file.parent, file.stem) for file in files}
    plain = {file: MARKED_MASK.sub("", file.stem) for file in files}
    pairs = [file for file, stem in plain.items() if stem != file.stem and (file.parent, stem) in stems]
    return {file for file in pairs if has_few_colours(file)}


def _marked(files: Sequence[Path]) -> dict[Path, bool]:
    """Of each picture of a folder, True where it is a mask: its name ends so, or it is the lossless one of a stem."""
    by_stem = defaultdict[tuple[Path, str], list[Path]](list)
    for file in files:
        by_stem[file.parent, file.stem].append(file)
    marked = {}
    for file in files:
        twins = [one for one in by_stem[file.parent, file.stem] if one is not file]
        lossless = file.suffix.lower() in LOSSLESS and any(one.suffix.lower() not in LOSSLESS for one in twins)
        marked[file] = bool(MASK_END.search(file.stem) or MASK_BEGIN.search(file.stem)) or lossless
    return marked


def pair_up(path: Path, remarks: Remarks) -> PairedFiles:
    """The images below a folder with their masks, by split. Raises `DataError` for an image without one, or with two."""
    images, masks = defaultdict[str, list[tuple[Key, Path]]](list), defaultdict[str, list[tuple[Key, Path]]](list)
    in_folders = has_folders(path)
    files = find_images(path)
    roles = {file: role_of(file.relative_to(path).parts[:-1]) for file in files}
    if not in_folders and (alike := find_alike(path)):
        in_folders, roles = True, _roles_of_folders(files, alike, path)
        texts = [f"{own.relative_to(path)} of {photos.relative_to(path)}" for own, photos in alike.items()]
        remarks.note(
            "folders are read as masks, by their pictures' names and few colours",
            texts,
            "folder is read as masks, by its pictures' names and few colours",
        )
    marked = {} if in_folders else _marked(files)
    with_images = {role.split for role in roles.values() if role.masks is False}
    split_masks = in_folders and all(role.split for role in roles.values() if role.masks)
    for file, role in roles.items():
        is_mask = role.masks if in_folders else marked[file]
        if is_mask is None and role.split and not role.others and role.split not in with_images:
            is_mask = False  # SPLIT/ beside SPLIT_labels/
        if is_mask is None or (split_masks and not role.split) or (not in_folders and role.others):
            remarks.pass_over("picture outside of the folders of images and masks", str(file.relative_to(path)))
        else:
            (masks if is_mask else images)[role.split or "train"].append((role.others, file))
    found = PairedFiles()
    for split, own in images.items():
        if split not in masks and len(images) > 1:
            remarks.pass_over("picture of a split without masks", *(str(file.relative_to(path)) for _, file in own))
        else:
            found.images[split], found.masks[split] = _match(own, masks[split], path, split, remarks)
    for split in masks.keys() - images.keys():
        remarks.pass_over("mask without an image", *(str(file.relative_to(path)) for _, file in masks[split]))
    return found


def find_alike(path: Path) -> dict[Path, Path]:
    """The folder of images of each folder that looks like one of masks."""
    return find_mask_folders(path, _plain)


def _roles_of_folders(files: Sequence[Path], masks: Mapping[Path, Path], path: Path) -> dict[Path, Role]:
    """The roles of files whose folders are those of masks, or of their photos; a split is told by any folder above."""
    roles = {}
    for file in files:
        is_mask = True if file.parent in masks else False if file.parent in masks.values() else None
        splits = [
            split for part in file.relative_to(path).parts[:-1] if (split := split_of(part) or _read_name(part)[0])
        ]
        roles[file] = Role(splits[0] if splits else None, is_mask)
    return roles


def _match(
    images: Sequence[tuple[Key, Path]], masks: Sequence[tuple[Key, Path]], path: Path, split: str, remarks: Remarks
) -> tuple[list[Path], list[Path]]:
    """Images with the mask of the same stem, else of the same stem without `_mask` and its like.

    Folders that are not named for a part, such as those of cities, are the same for both, or there are none above one of them.
    """
    exact, plain = _index(masks, str), _index(masks, _plain)
    anywhere, below = _index([((), file) for _, file in masks], _plain), {file: others for others, file in masks}
    chosen: dict[Path, Path] = {}
    missing = []
    for others, image in images:
        found = [one for one in exact.get((*others, image.stem), ()) if one != image]
        found = found or plain.get((*others, _plain(image.stem)), [])
        found = found or [one for one in anywhere.get((_plain(image.stem),), ()) if not (others and below[one])]
        trained = [one for one in found if TRAIN_IDS in one.stem.lower()]
        found = trained if len(trained) == 1 else found
        if len(found) > 1:
            raise DataError(f"{image} has the masks {found[0]} and {found[1]}. Expected one mask an image.")
        if found:
            chosen[image] = found[0]
        else:
            missing.append(image)
    if missing:
        raise DataError(
            f"{path} has no mask for {len(missing)} of {len(images)} images of {split}, first {missing[0]}. Expected one of "
            "the same stem for each, or one that ends in _mask."
        )
    used = set(chosen.values())
    remarks.pass_over("mask without an image", *(str(file.relative_to(path)) for _, file in masks if file not in used))
    return list(chosen), list(chosen.values())


def _index(files: Sequence[tuple[Key, Path]], name: Callable[[str], str]) -> Mapping[Key, list[Path]]:
    index = defaultdict[Key, list[Path]](list)
    for others, file in files:
        index[*others, name(file.stem)].append(file)
    return index


def _plain(stem: str) -> str:
    """A stem without the words that tell images from masks: `a_mask`, `a_leftImg8bit` and `a` are one, `mask_3` and `img3`."""
    return BEGIN.sub("", IMAGE_END.sub("", MASK_END.sub("", stem)))
