"""Plain files that a user or a store names: pipes, devices and sockets, whose reading may never end, are refused."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError, also for what is no plain file, and ValueError for no possible name."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket; expected a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """The bytes of a file, at most so many of them. Raises as `open_plain` does."""
    with open_plain(path) as stream:
        return stream.read(most)


def check_plain(path: str | os.PathLike[str]) -> Path:
    """The path of a file that another library will open. Raises as `open_plain` does."""
    open_plain(path).close()
    return Path(path)
