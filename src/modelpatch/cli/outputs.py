"""Where verbs speak and write: the console, and files that are checked before any work begins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modelpatch.errors import ModelpatchError
from modelpatch.report.plots import check_picture
from modelpatch.train.distributed import is_lonely, restarted

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file ('-': standard output).")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what --out names where it exists.")]
UNSEEN_WIDTH = 240  # characters, where no terminal sets an edge


def open_console(json: Path | None = None, **style: Any) -> Console:
    """Standard output, or standard error if `json` claims the output; wide unless it is a terminal.

    Raises `ModelpatchError` if --json names a file that cannot be written, and in a verb that torchrun started in several
    processes though it cannot share its work among them.
    """
    if is_lonely():
        raise ModelpatchError("only fit and multitask share their work under torchrun. Start this verb without it.")
    check_file("--json", json)
    console = Console(stderr=str(json) == "-", **style)
    if not console.is_terminal:
        console.width = UNSEEN_WIDTH
    return console


def tell(console: Console, text: str) -> None:
    """A line with paths in it: nothing is marked up, wrapped or cut."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def check_file(option: str, path: Path | None) -> None:
    """Raises `ModelpatchError` if no file can be written there; None and '-' are fine."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise ModelpatchError(f"{option} {path} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise ModelpatchError(f"the folder of {option} {path} does not exist. Make it first: mkdir -p '{path.parent}'")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ModelpatchError(f"{option} {path} cannot be written: permission denied. Name another place.")


def check_pictures(**pictures: Path | None) -> None:
    """`check_file` for options that name a picture, and that it can be drawn: matplotlib is there and knows the suffix."""
    for name, path in pictures.items():
        if path is not None:
            check_file(_option(name), path)
            check_picture(path, _option(name))


def check_free(option: str, paths: Iterable[Path], force: bool) -> None:
    """Raises `ModelpatchError` if a file stands there already, unless `force`."""
    if not force and (taken := [path for path in paths if path.exists()]):
        raise ModelpatchError(
            f"{taken[0]} exists already. Give --force to replace it, or name another place with {option}."
        )


def make_folder(option: str, folder: Path) -> None:
    """The folder, made where it is missing. Raises `ModelpatchError` if it cannot be."""
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
    """Whether a run goes on from what is in the folder `checkpoint`."""
    return checkpoint.exists() and (not restart or restarted())


@contextmanager
def resumable(console: Console, checkpoint: Path, restart: bool) -> Iterator[None]:
    """A run that keeps its state in the folder `checkpoint`: says that it goes on, when it starts and when it is stopped.

    With `restart` an earlier state is forgotten, unless torchrun starts the run again after a process died.
    """
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
