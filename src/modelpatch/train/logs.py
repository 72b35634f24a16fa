"""What a run writes down as it goes: a CSV file, and TensorBoard events where the library is installed."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

from modelpatch.errors import TrainingError


class RunLog:
    """Rows of figures by epoch, appended to `metrics.csv` in a folder; None writes nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.file: Path | None = None
        self._events: Any = None
        if folder is None:
            return
        self.file = Path(folder) / "metrics.csv"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot make the log folder {folder}: {error.strerror}.") from error
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder))

    def begin(self) -> None:
        """Forget the figures of an earlier run: this one starts anew."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def write(self, row: dict[str, float]) -> None:
        """Append one row; the first one of a new file brings the header."""
        if self.file is None:
            return
        new = not self.file.exists()
        with self.file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name, value, int(row["epoch"]))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()
