"""The console of a verb, and the files it writes, which are checked before any work begins."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer import Option, echo

from modelpatch.atomic import check_place, write_bytes
from modelpatch.cli.runs import QUIET, write_run
from modelpatch.errors import MissingExtraError, ModelpatchError, require
from modelpatch.report import plots
from modelpatch.train.progress import Progress, quiet_progress

if TYPE_CHECKING:
    from modelpatch.data.evidence import Finding
    from modelpatch.data.task import Task

JsonOption = Annotated[Path | None, Option(help="A file for all figures; '-' prints them on standard output.")]
UNSEEN_WIDTH = 240  # characters, where no terminal sets an edge


class Screen(Console):
    """The console of a verb, which also writes the verb's files and says so; wide unless it is a terminal.

    It is standard output, or standard error if `json` claims the output. Raises `ModelpatchError` for a file that cannot
    be written, and if torchrun started the verb in several processes that cannot share its work.
    """

    def __init__(self, json: Path | None = None, *, quiet: bool = False, **style: Any):
        from modelpatch.train.distributed import is_lonely

        if is_lonely():
            raise ModelpatchError("only fit and multitask share their work under torchrun. Start this verb without it.")
        check_file("--json", json)
        super().__init__(stderr=str(json) == "-", quiet=quiet or QUIET.get(), **style)
        if not self.is_terminal:
            self.width = UNSEEN_WIDTH
        self.json = json

    def tell(self, text: str) -> None:
        """Print a line with paths in it, without markup, wrapping or cuts."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, *shown: Table) -> None:
        """Print tables with an empty line between them: names wrap, columns of figures (`no_wrap`) are always whole."""
        for number, table in enumerate(shown):
            if number:
                self.print()
            for column in table.columns:
                if column.no_wrap:
                    cells = [Text.from_markup(str(cell)).plain for cell in (column.header, *column.cells)]
                    column.min_width = max(cell_len(line) for cell in cells for line in cell.split("\n"))
            with self.capture() as captured:
                self.print(table, crop=False)
            self.out(re.sub(" +$", "", captured.get(), flags=re.MULTILINE), end="", highlight=False)

    def tell_data(self, tasks: Sequence[Task]) -> None:
        """Print a line about each task's data and the warnings of its report, for which no image is opened."""
        for task in () if self.quiet else tasks:
            report = task.report(images=0)
            self.tell(report.summary)
            self.tell_findings(finding for finding in report.findings if finding.level == "warning")

    def tell_findings(self, findings: Iterable[Finding]) -> None:
        """Print a line for each finding of a report of data."""
        for one in findings:
            level = f"[yellow]{one.level}:[/yellow]" if one.level == "warning" else f"{one.level}:"
            self.print(f"{level} {escape(one.text)}", highlight=False, soft_wrap=True)

    def progress(self, title: str) -> Progress:
        """A progress bar on standard error; hidden where the console is quiet."""
        return quiet_progress() if self.quiet else Progress(title)

    def tell_run(self, beside: Path) -> None:
        """Write the file that repeats the run (see `write_run`)."""
        if (path := write_run(beside)) is not None:
            self.tell(f"wrote {path}; --config {path} repeats the run")

    def write(self, path: Path | None, text: str) -> None:
        """Write a text to a file; None is no file."""
        if path is not None:
            write_bytes(path, text.encode())
            self.tell(f"wrote {path}")

    def draw_curves(self, log: Path, title: str) -> None:
        """Draw `curves.png` beside a log's `metrics.csv`; nothing without that file or matplotlib."""
        if history := plots.read_history(log / "metrics.csv"):
            with suppress(MissingExtraError):
                self.draw(log / "curves.png", plots.plot_history, history, title)

    def draw(self, path: Path | None, draw: Callable[..., None], *values: Any) -> None:
        """Call `draw(*values, path)` for a picture; None is no picture."""
        if path is not None:
            draw(*values, path)
            self.tell(f"drew {path}")

    def write_json(self, value: Any) -> None:
        """Write figures to the file of --json, as indented JSON; '-' is standard output and None nothing."""
        text = json.dumps(value, indent=2, sort_keys=True)
        if str(self.json) == "-":
            echo(text)
        elif self.json is not None:
            try:
                self.json.write_text(f"{text}\n")
            except OSError as error:
                raise ModelpatchError(f"cannot write {self.json}: {error.strerror}.") from error

    @contextmanager
    def resumable(self, checkpoint: Path, restart: bool) -> Iterator[None]:
        """Announce that a run resumes from `checkpoint`, when it starts and when it is stopped; or `restart` it."""
        choice = checkpoint.with_name(f"{checkpoint.name}.choice.jsonl")  # trials of a fit without a method
        if is_resumed(checkpoint, restart) or is_resumed(choice, restart):
            self.tell(f"resuming the interrupted run in {checkpoint if checkpoint.exists() else choice}")
        elif restart:
            shutil.rmtree(checkpoint, ignore_errors=True)
            choice.unlink(missing_ok=True)
        try:
            yield
        except KeyboardInterrupt:
            if not (checkpoint.exists() or choice.exists()):
                raise
            raise KeyboardInterrupt("the run resumes when the same command is given again") from None


def check_name(option: str, path: Path) -> None:
    """Raise `ModelpatchError` for a name that is a number or an option: more likely a slip than a file."""
    name = str(path)
    if name.replace(".", "", 1).isdigit() or (name.startswith("-") and name != "-"):
        kind = "an option" if name.startswith("-") else "a number"
        raise ModelpatchError(f"{option} {name}: expected a file or folder, not {kind}. For a file: {option} ./{name}")


def check_file(option: str, path: Path | None) -> None:
    """Raise `ModelpatchError` if no file can be written there; None and '-' are fine."""
    if path is None or str(path) == "-":
        return
    check_name(option, path)
    if os.path.isdir(path):
        raise ModelpatchError(f"{option} {path} is a folder. Name a file in it.")
    if not os.path.isdir(path.parent):
        raise ModelpatchError(f"the folder of {option} {path} does not exist. Make it first: mkdir -p '{path.parent}'")
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise ModelpatchError(f"{option} {path} cannot be written: permission denied. Name another place.")
    check_place(path)


def check_picture(option: str, path: Path | None) -> None:
    """`check_file` for a picture; raises also without matplotlib and for a suffix it does not know."""
    if path is None:
        return
    check_file(option, path)
    canvases = require("matplotlib.backend_bases", "plots", f"{option} {path}", "matplotlib")
    if path.suffix.lower().removeprefix(".") not in canvases.FigureCanvasBase.get_supported_filetypes():
        suffix = path.suffix or "no suffix"
        raise ModelpatchError(f"{option} {path}: {suffix} is not a supported picture format. Use .png, .svg or .pdf.")


def check_sheet(option: str, path: Path | None) -> None:
    """`check_file` for a picture of pictures; raises also for a suffix that Pillow does not write."""
    from PIL import Image

    check_file(option, path)
    if path is not None and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        suffix = path.suffix or "no suffix"
        raise ModelpatchError(f"{option} {path}: {suffix} is not a picture format. Use .png or .jpg.")


def check_out(paths: Path | Iterable[Path], force: bool) -> None:
    """Raise `ModelpatchError` if no file can be written to one of the paths, or if one exists, unless `force`."""
    for path in [paths] if isinstance(paths, Path) else paths:
        check_file("--out", path)
        if path.exists() and not force:
            raise ModelpatchError(f"{path} exists already. Give --force to replace it, or another place with --out.")


def check_once(patches: Sequence[Path]) -> None:
    """Raise `ModelpatchError` for a patch file that is given twice."""
    if len(set(patches)) < len(patches):
        raise ModelpatchError("a patch file is given twice. Give each once.")


def make_folder(option: str, folder: Path | None) -> None:
    """Make the folder unless it exists; None is no folder. Raises `ModelpatchError` if it cannot be made or written to."""
    if folder is None:
        return
    check_name(option, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelpatchError(f"{option} {folder} cannot be a folder: {error.strerror}. Name another place.") from error
    if not os.access(folder, os.W_OK):
        raise ModelpatchError(f"{option} {folder} cannot be written to: permission denied. Name another place.")


def read_names(option: str, text: str | None) -> tuple[str, ...]:
    """Names that an option gives, separated by commas, or one a line of the file it names; none without it."""
    if text is None:
        return ()
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelpatchError(f"{option} {text} cannot be read as names, one a line: {error}.") from error
    names = tuple(name.strip() for name in lines if name.strip())
    if not names or len(set(names)) < len(names):
        raise ModelpatchError(f"{option} {text[:80]!r} names nothing, or something twice.")
    return names


def is_resumed(checkpoint: Path, restart: bool) -> bool:
    """True if a run resumes the state in a folder: not with `restart`, unless torchrun replaces a process that died."""
    from modelpatch.train.distributed import restarted

    return checkpoint.exists() and (not restart or restarted())
