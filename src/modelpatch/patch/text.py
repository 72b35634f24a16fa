"""Text that enters a patch file and leaves it again on somebody's terminal or web page: plain, printable, short."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

MAX_LENGTH = 256


def check_printable(text: str) -> str:
    """Raises ValueError for control, bidirectional-override and other unprintable characters."""
    if not text.isprintable():
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_LENGTH), AfterValidator(check_printable)]
TENSOR_NAME = re.compile(r"(head\.|(replace|mask|delta)/|graft/[0-9]{1,5}-[0-9]{1,5}/)[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
