"""A progress bar with time left on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column


class Progress:
    """Bars for the parts of a run, named after `title`. Quiet unless the console is a terminal.

    ━━━━━━━━━━━━━━━━━━━━  45% 0:00:12 scale-bias on digits: training
                                       epoch 3  loss 0.21  lr 0.002
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        console = console or Console(stderr=True)
        self._note = ""
        self._bars = Bars(
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn(
                "{task.description}\n{task.fields[note]}", markup=False, table_column=Column(ratio=1, overflow="fold")
            ),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._current: int | None = None

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar for one part; yields what moves it on."""
        bar = self._bars.add_task(f"{self.title}: {name}", total=total, completed=done, note="")
        outer, self._current = self._current, bar
        try:
            yield lambda count: self._bars.advance(bar, count)
        finally:
            self._current = outer
            self._bars.remove_task(bar)

    def note(self, text: str) -> None:
        """Put a few words below the name of the current bar."""
        if self._current is not None:
            self._bars.update(self._current, note=text)  # type: ignore[arg-type]

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def quiet_progress() -> Progress:
    """Progress that never draws."""
    return Progress("", Console(quiet=True, force_terminal=False))
