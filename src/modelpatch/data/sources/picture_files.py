"""The picture file that a cell of a table names: by a path, one of another machine, a file's name, or an id without suffix."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from modelpatch.backbone.listing import list_folder
from modelpatch.backbone.preprocessing import is_picture
from modelpatch.data.sources.split_names import split_of
from modelpatch.errors import DataError

LONGEST = 1024  # characters of a path
UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")  # before the name of a file that was uploaded to Label Studio
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


class Hint(NamedTuple):
    """The split and label of a row, which choose between pictures of one name in several folders."""

    split: str | None = None
    label: str = ""


class PictureFiles:
    """The pictures below a folder, found as the cells of a manifest in it name them.

    A path below the folder, or an absolute one that exists, is taken as it is. Else the pictures below the folder are searched
    for the file's name, or where it has no picture's suffix for its stem; of several the one is taken that shares the most
    folders with the path, and tells of the row's split or label. `other_suffix` names what was found under another suffix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.other_suffix: list[str] = []
        self._known: dict[tuple[str, Hint], Path | None] = {}

    def find(self, value: str, hint: Hint | None = None) -> Path | None:
        """The picture that a cell names; None where there is none. Raises `DataError` for several that are as likely."""
        key = (value, hint or Hint())
        if key not in self._known:
            self._known[key] = self._find(value, key[1])
        return self._known[key]

    def _find(self, value: str, hint: Hint) -> Path | None:
        text = value.strip().strip("'\"")
        if not text or len(text) > LONGEST or "\0" in text:
            return None
        if SCHEME.match(text):
            text = urlsplit(text).path if text.lower().startswith("file:") else text.split("?")[0]
        for given in dict.fromkeys((text, text.replace("\\", "/"), unquote(text))):
            if file := self._direct(given):
                return file
        parts = [part for part in re.split(r"[\\/]+", text) if part not in ("", ".", "..")]
        return self._search(parts, hint, value) if parts else None

    def _direct(self, text: str) -> Path | None:
        """The file of a path below the folder, of an absolute one, or of one below the folder above one without pictures."""
        places = [self.folder]
        if len(Path(text).parts) > 1 and not Path(text).is_absolute() and not self._pictures:
            places.append(self.folder.parent)
        try:
            return next((file for place in places if (file := place / text).is_file()), None)
        except (OSError, ValueError):  # a name too long, or with characters that no file has
            return None

    def _search(self, parts: list[str], hint: Hint, value: str) -> Path | None:
        lowered = [part.lower() for part in parts]
        found = self._by_name.get(lowered[-1], [])
        if not found and (stored := UPLOADED.sub("", lowered[-1])) != lowered[-1]:
            return self._search([*parts[:-1], stored], hint, value)
        stem = lowered[-1].rpartition(".")[0] if is_picture(lowered[-1]) else lowered[-1]
        if not found and (found := self._by_stem.get(stem, [])) and stem != lowered[-1]:
            self.other_suffix.append(value[:200])
        given = {split for part in lowered[:-1] if (split := split_of(part))} or ({hint.split} - {None})
        fitting = [file for file in found if not given or not (own := self._splits_of(file)) or own & given]
        if len(parts) > 1 and fitting:  # the folder that the path names is there, and the picture is not in it
            fitting = [file for file in fitting if not self._is_elsewhere(file, lowered)]
        return self._choose(fitting, lowered, hint, value)

    def closest(self, values: Sequence[str], file: Path) -> str:
        """The one of several cells, found as the same file, whose path shares the most with it."""

        def shared(value: str) -> int:
            own, given = file.parts[::-1], re.split(r"[\\/]+", value.strip())[::-1]
            return next((n for n, (a, b) in enumerate(zip(own, given, strict=False)) if a != b), len(given))

        return max(values, key=shared)

    def _is_elsewhere(self, file: Path, lowered: Sequence[str]) -> bool:
        """Return True for a file in another folder than the one that a path names, where that folder exists."""
        return file.parent.name.lower() != lowered[-2] and lowered[-2] in self._folders

    def _choose(self, found: Sequence[Path], lowered: Sequence[str], hint: Hint, value: str) -> Path | None:
        if len(found) <= 1:
            return found[0] if found else None
        label = hint.label.lower()
        scores = {}
        for file in found:
            own = [part.lower() for part in file.relative_to(self.folder).parts[:-1]]
            equal = next((n for n, (a, b) in enumerate(zip(own[::-1], lowered[-2::-1], strict=False)) if a != b), None)
            shared = min(len(own), len(lowered) - 1) if equal is None else equal
            scores[file] = (shared, hint.split in self._splits_of(file), bool(label) and label in own)
        best = [file for file in found if scores[file] == max(scores.values())]
        if len(best) > 1:
            names = " or ".join(str(file.relative_to(self.folder)) for file in best[:2])
            raise DataError(f"{value[:200]!r} may be {names}. Give its path from the manifest on.")
        return best[0]

    def _splits_of(self, file: Path) -> set[str]:
        parts = file.relative_to(self.folder).parts[:-1]
        return {split for part in parts if (split := split_of(part))}

    @property
    def holds_pictures(self) -> bool:
        """True where there is a picture below the folder."""
        return bool(self._pictures)

    @cached_property
    def _pictures(self) -> list[Path]:
        listings = list_folder(self.folder).below()
        return sorted(file for listing in listings for file in listing.files if is_picture(file.name))

    @cached_property
    def _folders(self) -> set[str]:
        return {file.parent.name.lower() for file in self._pictures}

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found = defaultdict[str, list[Path]](list)
        for file in self._pictures:
            found[file.name.lower()].append(file)
        return found

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        found = defaultdict[str, list[Path]](list)
        for file in self._pictures:
            found[file.stem.lower()].append(file)
        return found
