"""Tar shards as WebDataset writes them: the members of one stem, `0001.jpg` and `0001.cls`, are a sample, read in place.

shards/train-000000.tar ..., shards/train/*.tar, train-{000000..000009}.tar, or one file. A label is in `.cls`, `.label`, a
field of `.json` that is called as columns of labels are, or `.txt`; `classes.txt` beside the shards
names numbers. Nothing is unpacked.
"""

import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modelpatch.backbone.listing import is_hidden
from modelpatch.backbone.preprocessing import ImageSource, is_picture
from modelpatch.data.sources import base
from modelpatch.data.sources.column_names import LABEL_NAMES, find_by_name
from modelpatch.data.sources.labels import check_names, is_missing, make_classification, name_at
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.split_names import plain_split_of, split_of
from modelpatch.data.splits import Lazy
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification

LABELS = ("cls", "cls.txt", "label", "label.txt", "class", "class.txt", "json", "txt")  # suffixes, the surest first
LONGEST_LABEL = 2**20  # bytes of a member that holds a label
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


class Member(NamedTuple):
    """The place of a member's bytes in a tar file."""

    file: Path
    start: int
    size: int


@base.register_source("shards")
class TarShards(base.DataSource):
    """Tar files of samples, or a folder of them."""

    kind = Classification.name

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str | Path) and bool(find_shards(source))

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        shards, remarks = find_shards(source), Remarks()
        if packed := [file for files in shards.values() for file in files if file.name.endswith(COMPRESSED)]:
            raise DataError(f"{packed[0]} is compressed, and cannot be read in place. Unpack it to a .tar file first.")
        if "train" not in shards:
            raise DataError(
                f"{source} has the splits {', '.join(shards)} but no training shards, such as train-0000.tar."
            )
        folder = next(iter(shards.values()))[0].parent
        names = options.class_names(folder)
        members: dict[str, list[tuple[ImageSource, str]]] = {}
        places: dict[str, list[Member]] = {}
        for split, files in shards.items():
            pairs = [pair for file in files for pair in read_shard(file, remarks)]
            labels = [label for _, label in pairs]
            if names is not None and all(re.fullmatch(r"\d+", label) for label in labels):
                labels = [name_at(names, int(label), str(files[0])) for label in labels]
            places[split] = [place for place, _ in pairs]
            members[split] = [(b"", label) for label in labels]
        if not any(members.values()):
            raise DataError(f"{source} holds no pictures with labels. Expected members such as 0001.jpg and 0001.cls.")
        found = make_classification(members, remarks, check_names(members, options.names, str(source)))
        for split, images in found.splits.items():
            images.images = Lazy(places[split], read_member)
        return found


def find_shards(source: str | Path) -> dict[str, list[Path]]:
    """The tar files of a source by split: a file, a range in braces, or a folder of files or of such folders."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_shard(file))
        if files:
            by_split: dict[str, list[Path]] = {}
            for file in files:
                by_split.setdefault(plain_split_of(file.name.partition(".")[0]) or "train", []).append(file)
            return by_split
        folders = [one for one in sorted(path.iterdir()) if one.is_dir() and split_of(one.name)]
        found = {str(split_of(one.name)): sorted(file for file in one.iterdir() if _is_shard(file)) for one in folders}
        return {split: files for split, files in found.items() if files}
    if (match := RANGE.search(str(source))) and int(match[2]) - int(match[1]) < 10**6:
        width, text = len(match[1]), str(source)
        numbers = range(int(match[1]), int(match[2]) + 1)
        files = [Path(f"{text[: match.start()]}{number:0{width}}{text[match.end() :]}") for number in numbers]
        if files and files[0].name.endswith(".tar") and files[0].is_file():
            if missing := [file for file in files if not file.is_file()]:
                raise DataError(f"{missing[0]} does not exist. Expected all of {source}.")
            return {"train": files}
        return {}
    return {"train": [path]} if _is_shard(path) else {}


def _is_shard(path: Path) -> bool:
    return not is_hidden(path.name) and path.name.lower().endswith((".tar", *COMPRESSED)) and path.is_file()


def read_shard(file: Path, remarks: Remarks) -> list[tuple[Member, str]]:
    """The pictures of a tar file with their labels. Raises `DataError` that names the file for what is no tar file."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if is_hidden(name):
                    remarks.pass_over("hidden", f"{file.name}: {member.name}")
                elif member.isreg() and not member.issparse():
                    stem, _, suffix = name.partition(".")
                    place = Member(file, member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{stem}", {})[suffix.lower()] = place
    except (OSError, tarfile.TarError, ValueError, UnicodeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as a tar file: {error}") from error
    read = []
    for key, own in samples.items():
        picture = next((place for suffix, place in own.items() if is_picture(f"x.{suffix}")), None)
        label = _read_label(own, f"{file}, sample {key.lstrip('/')}")
        if picture is None:
            remarks.pass_over("sample without a picture", f"{file.name}: {key.lstrip('/')}")
        elif label is None:
            remarks.pass_over("sample without a label", f"{file.name}: {key.lstrip('/')}")
        else:
            read.append((picture, label))
    return read


def read_member(place: Member) -> bytes:
    """The bytes of a member."""
    with place.file.open("rb") as stream:
        stream.seek(place.start)
        return stream.read(place.size)


def _read_label(own: Mapping[str, Member], name: str) -> str | None:
    """The label of a sample, None where it has none."""
    suffix = next((suffix for suffix in LABELS if suffix in own), None)
    if suffix is None or own[suffix].size > LONGEST_LABEL:
        return None
    try:
        text = read_member(own[suffix]).decode("utf-8").strip()
        value = json.loads(text) if suffix == "json" else text
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: its .{suffix} cannot be read: {str(error)[:200]}") from error
    if isinstance(value, dict):
        columns = find_by_name({str(key): () for key in value}, LABEL_NAMES)
        value = value[columns[0]] if len(columns) == 1 else None
        if len(columns) > 1:
            raise DataError(
                f"{name}: its .json has several labels: {', '.join(columns)}. Expected one, or a .cls member."
            )
    return None if is_missing(value) or str(value) == "-1" else str(value)
