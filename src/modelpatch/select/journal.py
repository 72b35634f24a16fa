"""Outcomes on disk, a line each, so that an interrupted selection goes on and a later one starts from what is known.

An outcome is found by the hash of everything it depends on: backbone, images, folds, settings, method, seed. One file may
thus serve many runs; lines that no run asks for do no harm.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from modelpatch.errors import TrainingError

T = TypeVar("T")  # a dataclass of plain values


class Journal(Generic[T]):
    """The outcomes, of type `kind`, in a file of JSON lines; with no path they are kept in memory only."""

    def __init__(self, kind: type[T], path: str | Path | None = None) -> None:
        self.kind, self.path = kind, None if path is None else Path(path)
        self.outcomes: dict[str, T] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TrainingError(f"{path} cannot be read: {error.strerror}.") from error
        whole = data[: data.rfind(b"\n") + 1]  # a line that a killed run left unfinished is written anew
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.outcomes[entry["key"]] = self.kind(**entry["outcome"])
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(
                    f"{path}, line {number}: this is no {self.kind.__name__.lower()}. Name another file, or remove this one."
                ) from error
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def add(self, key: str, what: dict[str, Any], outcome: T) -> None:
        """Keep the outcome of `what`; on disk before this returns."""
        self.outcomes[key] = outcome
        if self.path is None:
            return
        entry: dict[str, Any] = {"key": key, "of": what, "outcome": asdict(outcome)}  # type: ignore[call-overload]
        try:
            with self.path.open("ab") as stream:
                stream.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror}.") from error
