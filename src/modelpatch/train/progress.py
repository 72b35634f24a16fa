"""A progress bar with time left on a terminal, silence elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.table import Column


class Progress(progress.Progress):
    """Bars for the parts of a run, named after `title`. Quiet unless the console is a terminal.

    ━━━━━━━━━━━━━━━━━━━━  45% 0:00:12 scale-bias on digits: training
                                       epoch 3  loss 0.21  lr 0.002
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        words = "{task.description}\n{task.fields[note]}"
        super().__init__(
            progress.BarColumn(bar_width=20),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn(words, markup=False, table_column=Column(ratio=1, overflow="fold")),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self.title = title

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar for one part; yields what moves it on."""
        bar = self.add_task(f"{self.title}: {name}", total=total, completed=done, note="")
        try:
            yield lambda count: self.advance(bar, count)
        finally:
            self.remove_task(bar)

    def note(self, text: str) -> None:
        """Put a few words below the name of the current bar, the last that was begun."""
        if self.task_ids:
            self.update(self.task_ids[-1], note=text)


def quiet_progress() -> Progress:
    """Progress that never draws."""
    return Progress("", Console(quiet=True, force_terminal=False))
