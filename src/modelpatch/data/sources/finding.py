"""The pictures that annotations name, found below a folder however their paths are written."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from modelpatch.backbone.preprocessing import find_images
from modelpatch.data.sources.split_names import split_of
from modelpatch.errors import DataError


def folders_of_splits(folder: Path) -> dict[str, list[Path]]:
    """The folders in a folder whose names are those of splits, by split."""
    found = defaultdict[str, list[Path]](list)
    for one in sorted(folder.iterdir()) if folder.is_dir() else ():
        if one.is_dir() and (split := split_of(one.name)):
            found[split].append(one)
    return found


class Pictures:
    """The picture files below a folder, found by the names that annotations give them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> list[Path]:
        """All picture files below the folder."""
        return find_images(self.root)

    def find(self, name: str, places: Sequence[Path], asking: str) -> Path | None:
        """The file of a name, which may have folders of another machine before it; None where there is none.

        A path below one of the `places` comes first, then the file of the most equal last parts. Raises `DataError`, which
        begins with `asking`, for several equal ones.
        """
        for given in dict.fromkeys((name, unquote(name))):
            parts = [part for part in re.split(r"[\\/]+", given) if part not in ("", ".", "..")]
            if not parts:
                continue
            for place in places:
                if is_there(file := place.joinpath(*parts)) and file.is_file():
                    return file
            if found := self._choose(parts, self._by_name.get(parts[-1], ()), places, asking):
                return found
        return None

    def find_stem(self, stem: str, places: Sequence[Path], asking: str) -> Path | None:
        """The file of a stem: in the first of the `places` that has one, else anywhere."""
        return self._choose([stem], self._by_stem.get(Path(stem).name, ()), places, asking)

    def _choose(self, parts: list[str], found: Sequence[Path], places: Sequence[Path], asking: str) -> Path | None:
        if len(found) > 1:
            for place in places:
                if below := [file for file in found if file.is_relative_to(place)]:
                    found = below
                    break
        if len(found) > 1:
            equal = {file: _equal_ends(file.parts[:-1], parts[:-1]) for file in found}
            found = [file for file in found if equal[file] == max(equal.values())]
        if len(found) > 1:
            raise DataError(f"{asking}: {parts[-1]!r} may be {found[0]} or {found[1]}. Keep one of them.")
        return found[0] if found else None

    @cached_property
    def _by_name(self) -> Mapping[str, list[Path]]:
        return _group(self.files, lambda file: file.name)

    @cached_property
    def _by_stem(self) -> Mapping[str, list[Path]]:
        return _group(self.files, lambda file: file.stem)


def is_there(path: Path) -> bool:
    """Return True for a path that exists; one that no file could have, such as one too long, does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _group(files: Sequence[Path], key: Callable[[Path], str]) -> Mapping[str, list[Path]]:
    groups = defaultdict[str, list[Path]](list)
    for file in files:
        groups[key(file)].append(file)
    return groups


def _equal_ends(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for ours, theirs in zip(reversed(one), reversed(other), strict=False):
        if ours != theirs:
            break
        count += 1
    return count
