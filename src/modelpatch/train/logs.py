"""The log of a run: a CSV file, and TensorBoard events where the library is installed."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelpatch.errors import TrainingError


class RunLog:
    """Rows of figures by epoch in `metrics.csv` of a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "metrics.csv"
        self._events: Any = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot make the log folder {folder}: {error.strerror}.") from error

    def begin(self, history: Sequence[dict[str, float]]) -> None:
        """Begin the file anew, with the rows of an interrupted run."""
        self.file.unlink(missing_ok=True)
        for row in history:
            self._append(row)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder))

    def write(self, row: dict[str, float]) -> None:
        """Append one row to the file and to the events."""
        self._append(row)
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name, value, int(row["epoch"]))

    def _append(self, row: dict[str, float]) -> None:
        new = not self.file.exists()
        with self.file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def close(self) -> None:
        """Close the events."""
        if self._events is not None:
            self._events.close()
            self._events = None
