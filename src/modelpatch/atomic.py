"""Writes that leave the old file or the new file, never a mixture, and survive a power cut."""

import os
import secrets
import shutil
from pathlib import Path

from modelpatch.errors import ModelpatchError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: temporary file beside it, fsync, rename, fsync of the folder. Mode follows the umask.

    Raises `ModelpatchError` where the folder does not exist or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise ModelpatchError(
            f"cannot write {path}: {error.strerror}. Check that the folder exists and has room."
        ) from error


def check_place(path: Path, size: int = 0, makes_folder: bool = False) -> None:
    """Check that `write_bytes` can put a file of `size` bytes there: the folder, its rights, the name's length, the room.

    With `makes_folder` the folder need not exist yet. Raises `ModelpatchError` that names what is in the way.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ModelpatchError(f"{path} is a folder. Name a file in it.")
        folder = next(one for one in (path.parent, *path.parent.parents) if one.exists())
        if folder != path.parent and not makes_folder:
            raise ModelpatchError(f"the folder of {path} does not exist. Make it first: mkdir -p '{path.parent}'")
        if not folder.is_dir():
            raise ModelpatchError(f"{folder} is a file, not a folder: {path} cannot be written. Name another place.")
        trial = folder / f".{path.name}.{secrets.token_hex(6)}.tmp"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        trial.unlink()
        if path.exists() and not os.access(path, os.W_OK):
            raise ModelpatchError(f"{path} is write-protected. Name another place, or remove it.")
        room = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ModelpatchError(f"{str(path)[:300]} cannot be written: {reason}. Name another place.") from error
    if room < size:
        raise ModelpatchError(
            f"{path} needs about {size:,} bytes; {folder} has room for {room:,}. Free some space, or name another place."
        )


def sync_folder(folder: Path) -> None:
    """Make what was written, made or renamed in a folder survive a power cut."""
    if os.name != "posix":  # other systems cannot open a folder; the rename is atomic there all the same
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
