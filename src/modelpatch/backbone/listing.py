"""The files below a folder. Hidden files, and those that operating systems leave behind, are kept apart."""

import os
from dataclasses import dataclass, field
from pathlib import Path

LEFT_BEHIND = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "system volume information",
    "lost+found",
}


def is_hidden(name: str) -> bool:
    """Return True for a name that begins with a dot, and for those that systems and programs make on their own."""
    return name.startswith((".", "~$")) or name.lower() in LEFT_BEHIND


@dataclass(eq=False)
class Listing:
    """A folder: its own files, the folders in it, and what is passed over: hidden files and folders, and links to nothing."""

    path: Path
    files: list[Path] = field(default_factory=list)
    folders: list["Listing"] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    odd: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    def below(self) -> list["Listing"]:
        """The folder and all folders below it, each before those in it."""
        found = [self]
        for listing in found:
            found.extend(listing.folders)
        return found


def list_folder(path: Path) -> Listing:
    """The files below a folder, those of each folder sorted by name.

    A link to a folder is followed once; one that leads to a folder above it, or to one that another link leads to, is odd, as
    are links to nothing and what is no plain file. Raises OSError for a folder that cannot be read.
    """
    root = Listing(path)
    waiting, reached = [root], {os.path.realpath(path)}
    while waiting:
        listing = waiting.pop()
        with os.scandir(listing.path) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                file = listing.path / entry.name
                if is_hidden(entry.name):
                    listing.hidden.append(file)
                elif entry.is_dir():
                    target = os.path.realpath(file) if entry.is_symlink() else None
                    if target is not None and (target in reached or _is_above(target, listing.path)):
                        listing.odd.append(file)
                        continue
                    reached |= set() if target is None else {target}
                    listing.folders.append(Listing(file))
                elif entry.is_file():
                    listing.files.append(file)
                else:
                    listing.odd.append(file)
        waiting.extend(listing.folders)
    return root


def _is_above(target: str, folder: Path) -> bool:
    real = os.path.realpath(folder)
    return real == target or real.startswith(target.rstrip(os.sep) + os.sep)
