"""Training state on disk: written atomically, read back exactly, refused if it belongs to another run."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from modelpatch.atomic import write_bytes
from modelpatch.errors import CheckpointMismatchError, TrainingError

EVERY_SECONDS = 60.0


class Checkpoint:
    """The state of one run in a folder. `identity` must be equal for the run to be continued."""

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder), identity
        self.file = self.folder / "state.pt"
        self._saved = time.monotonic()

    def due(self) -> bool:
        """True when a minute has passed since the last save."""
        return time.monotonic() - self._saved >= EVERY_SECONDS

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state."""
        make_folder(self.folder, "checkpoint")
        buffer = io.BytesIO()
        torch.save({"identity": self.identity, **state}, buffer)
        write_bytes(self.file, buffer.getvalue())
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The saved state; None where there is none.

        Raises `CheckpointMismatchError` for the state of a run with other settings.
        """
        if not self.file.exists():
            return None
        try:
            saved = torch.load(self.file, weights_only=True)
            identity = saved["identity"]
        except Exception as error:
            raise TrainingError(f"{self.file} cannot be read ({error}). Remove {self.folder} to start anew.") from error
        if identity != self.identity:
            raise CheckpointMismatchError(
                f"{self.folder} holds an unfinished run with {', '.join(differences(identity, self.identity))}. Finish it "
                "with its own settings, or start anew: give --restart, name another checkpoint folder, or remove this one."
            )
        return saved

    def clear(self) -> None:
        """Remove the folder's state: the run is finished."""
        self.file.unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            shutil.rmtree(self.folder)


def make_folder(folder: Path, purpose: str) -> None:
    """Make a folder where there is none. Raises `TrainingError` where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the {purpose} folder {folder}: {error.strerror}.") from error


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """List the differences between two identities in words: `other images`, `epochs = 10 instead of 3`."""
    words = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            words += differences(before, now)
        elif before != now:
            plain = isinstance(before, str | int | float) and len(str(before)) <= 40
            words.append(f"{key} = {before!r} instead of {now!r}" if plain else f"other {key}")
    return words
