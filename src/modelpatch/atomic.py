"""Writes that leave the old file or the new file, never a mixture, and survive a power cut."""

import os
import secrets
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


def sync_folder(folder: Path) -> None:
    """Make what was written, made or renamed in a folder survive a power cut."""
    if os.name != "posix":  # other systems cannot open a folder; the rename is atomic there all the same
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
