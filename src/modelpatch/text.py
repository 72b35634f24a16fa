"""Text of files, terminals and web pages: printable, short, with the nearest name for a mistyped one."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints, ValidationError

MAX_LENGTH = 256


def digest_of(facts: Any) -> str:
    """The SHA-256 of plain values: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def count_of(number: int, thing: str, things: str = "") -> str:
    """A number with its noun: `1 task`, `2 tasks`."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """` Did you mean 'scale-bias'?` for a mistyped name, empty if no known name is that alike."""
    close = difflib.get_close_matches(name, list(known), 1, likeness)
    return f" Did you mean {close[0]!r}?" if close else ""


def brief(value: Any) -> str:
    """A value as it is written, or its type where that takes more than a line."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"the {type(value).__name__}"


def check_printable(text: str) -> str:
    """Raise ValueError for control, bidirectional-override and other unprintable characters."""
    if not text.isprintable():
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


def check_facts(value: Any) -> Any:
    """Raise ValueError if any text inside nested dicts and lists is not printable."""
    if isinstance(value, str):
        check_printable(value)
    elif isinstance(value, dict | list | tuple):
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            check_facts(item)
    return value


def first_problem(error: ValidationError) -> str:
    """The first error of a pydantic model in one short line: `'task.classes' is not valid: ...`."""
    first = error.errors()[0]
    where = repr(".".join(str(part) for part in first["loc"]))[:80]
    return f"{where} is not valid: {' '.join(first['msg'].split())[:400]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


Facts = Annotated[dict[str, Any], AfterValidator(check_facts)]
Text = Annotated[str, StringConstraints(max_length=MAX_LENGTH), AfterValidator(check_printable)]
_HEAD = r"head(\.[A-Za-z0-9_-]+)+"
_PART = (
    r"[\w+:@=~,()# -]+"  # of a network's names: letters, digits, marks that no terminal, page or path gives a meaning
)
_NAME = rf"({_HEAD}|((replace|mask|delta|left|right)/|graft/[0-9]{{1,5}}-[0-9]{{1,5}}/){_PART}([./]{_PART})*)"
TENSOR_NAME = re.compile(_NAME)
STORED_NAME = re.compile(rf"masks|(scale/|bits/)?{_NAME}")  # what the codecs add
CODEC_PREFIX = re.compile(r"(scale|bits)/")


def file_name(name: str) -> str:
    """A name for a file or folder: characters other than letters, digits and `.+_-` become `-`."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", name)
