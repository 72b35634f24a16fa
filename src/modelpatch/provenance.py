"""The code and the command that make a patch, as its record keeps them."""

import importlib.metadata
import json
import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import PurePath
from typing import Any

from modelpatch.version import __version__

COMMAND: ContextVar[tuple[str, ...] | None] = ContextVar("command", default=None)  # the words of the command that runs
LONGEST = 2000  # characters of a recorded command
LIBRARIES = ("torch", "torchvision", "timm")  # that compute what a patch is trained on


def describe_making() -> dict[str, Any]:
    """The versions of the code, with the commit where it was installed from one, and the command, where one runs."""
    found = {"modelpatch": __version__, "commit": installed_commit()}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    given = COMMAND.get()
    found |= {"command": None if given is None else spell_command(given)}
    return {name: value for name, value in found.items() if value is not None}


def spell_command(words: Sequence[str]) -> str:
    """A command in one line; of files and folders their names alone, since a patch tells nothing of its machine's folders."""
    line = shlex.join(["modelpatch", *map(_without_folder, words)])
    printable = "".join(letter if letter.isprintable() else "?" for letter in line)
    return printable if len(printable) <= LONGEST else f"{printable[: LONGEST - 3]}..."


def installed_commit() -> str | None:
    """The commit that pip installed this package from (PEP 610); None for a release or a working copy."""
    try:
        text = importlib.metadata.distribution("modelpatch").read_text("direct_url.json")
        commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None


def _without_folder(word: str) -> str:
    """`--out=/home/me/a.safetensors` as `--out=a.safetensors`; what a zoo or hub names (`hf:ORG/NAME`) is kept."""
    option, separator, value = word.partition("=") if word.startswith("-") else ("", "", word)
    kind, colon, place = value.partition(":")
    named = bool(colon) and len(kind) > 1 and "/" not in kind and "\\" not in kind
    path = (place if named else value).replace("\\", "/")
    own = path.startswith(("/", "~", ".")) or not named
    return f"{option}{separator}{f'{kind}:' if named else ''}{PurePath(path).name or path if own else path}"
