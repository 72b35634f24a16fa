"""The console of a verb, and the files it writes, which are checked before any work begins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.runs import QUIET, write_run
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from rich.console import Console

    from modelpatch.train.progress import Progress

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="A file for all figures; '-' prints them on standard output.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
LogOption = Annotated[
    Path | None, typer.Option(help="A folder for metrics.csv, TensorBoard events and a picture of the curves.")
]
UNSEEN_WIDTH = 240  # characters, where no terminal sets an edge


def open_console(json: Path | None = None, **style: Any) -> Console:
    """Standard output, or standard error if `json` claims the output; wide unless it is a terminal.

    Raises `ModelpatchError` if --json names a file that cannot be written, and in a verb that torchrun started in several
    processes though it cannot share its work among them.
    """
    from rich.console import Console

    from modelpatch.train.distributed import is_lonely

    if is_lonely():
        raise ModelpatchError("only fit and multitask share their work under torchrun. Start this verb without it.")
    check_file("--json", json)
    style["quiet"] = style.get("quiet", False) or QUIET.get()
    console = Console(stderr=str(json) == "-", **style)
    if not console.is_terminal:
        console.width = UNSEEN_WIDTH
    return console


def tell(console: Console, text: str) -> None:
    """Print a line with paths in it, without markup, wrapping or cuts."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_of(console: Console, title: str) -> Progress:
    """A progress bar on standard error; hidden where the console is quiet."""
    from modelpatch.train.progress import Progress, quiet_progress

    return quiet_progress() if console.quiet else Progress(title)


def tell_run(console: Console, beside: Path) -> None:
    """Write the file that repeats the run (see `write_run`) and say so."""
    if (path := write_run(beside)) is not None:
        tell(console, f"wrote {path}; --config {path} repeats the run")


def check_name(option: str, path: Path) -> None:
    """Raise `ModelpatchError` for a name that is a number or an option: more likely a slip than a file."""
    name = str(path)
    if name.replace(".", "", 1).isdigit() or (name.startswith("-") and name != "-"):
        kind = "an option" if name.startswith("-") else "a number"
        raise ModelpatchError(
            f"{option} {name}: expected a file or folder, not {kind}. Write {option} ./{name} for a file."
        )


def check_file(option: str, path: Path | None) -> None:
    """Raise `ModelpatchError` if no file can be written there; None and '-' are fine."""
    if path is None or str(path) == "-":
        return
    check_name(option, path)
    if path.is_dir():
        raise ModelpatchError(f"{option} {path} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise ModelpatchError(f"the folder of {option} {path} does not exist. Make it first: mkdir -p '{path.parent}'")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ModelpatchError(f"{option} {path} cannot be written: permission denied. Name another place.")


def check_pictures(**pictures: Path | None) -> None:
    """`check_file` for options that name a picture; raises also without matplotlib and for a suffix it does not know."""
    for name, path in pictures.items():
        if path is not None:
            check_file(_option(name), path)
            from modelpatch.report.plots import check_picture

            check_picture(path, _option(name))


def check_free(option: str, paths: Iterable[Path], force: bool) -> None:
    """Raise `ModelpatchError` if one of the files exists, unless `force`."""
    if not force and (taken := [path for path in paths if path.exists()]):
        raise ModelpatchError(
            f"{taken[0]} exists already. Give --force to replace it, or name another place with {option}."
        )


def make_folder(option: str, folder: Path) -> None:
    """Make the folder unless it exists. Raises `ModelpatchError` if it cannot be made or written to."""
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
    """True if a run resumes the state in the folder `checkpoint`."""
    from modelpatch.train.distributed import restarted

    return checkpoint.exists() and (not restart or restarted())


@contextmanager
def resumable(console: Console, checkpoint: Path, restart: bool) -> Iterator[None]:
    """Announce that a run resumes from the folder `checkpoint`, when it starts and when it is stopped.

    With `restart` an earlier state is removed, unless torchrun starts the run again after a process died.
    """
    from modelpatch.train.distributed import restarted

    if is_resumed(checkpoint, restart):
        tell(console, f"resuming the interrupted run in {checkpoint}")
    elif restart and not restarted():
        shutil.rmtree(checkpoint, ignore_errors=True)
    try:
        yield
    except KeyboardInterrupt:
        if not checkpoint.exists():
            raise
        raise KeyboardInterrupt("the run resumes when the same command is given again") from None


def write_json(path: Path | None, value: Any) -> None:
    """Write figures as indented JSON; '-' is standard output and None nothing."""
    if path is None:
        return
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise ModelpatchError(f"cannot write {path}: {error.strerror}.") from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def draw_log(console: Console, folder: Path, title: str) -> None:
    """Draw the curves of a log folder to `curves.png` in it, if matplotlib is installed."""
    from modelpatch.report.curves import plot_history, read_history
    from modelpatch.report.plots import has_matplotlib

    history = read_history(folder / "metrics.csv")
    if history and has_matplotlib():
        plot_history(history, title, folder / "curves.png")
        tell(console, f"drew {folder / 'curves.png'}")
