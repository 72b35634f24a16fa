"""A hook of mkdocs: put the public names of a folder into its page of the reference.

A page has the line `<!-- public names of modelpatch.FOLDER, FILE.NAME, ... -->`: the names that the folder's `__init__.pyi`
lists, and others of its files that deserve a place. Each file becomes a section with its docstring and its names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
LINE = re.compile(r"^<!-- public names of ([\w.]+)((?:, [\w.]+)*) -->$", re.MULTILINE)
NAME = re.compile(r"^from \.([\w.]+) import (\w+) as \w+$", re.MULTILINE)


def on_page_markdown(markdown: str, **given: Any) -> str:
    """The page with its names written out."""
    return LINE.sub(lambda found: describe(found[1], [name for name in found[2].split(", ") if name]), markdown)


def describe(package: str, others: list[str]) -> str:
    """The folder's docstring, then a section for every file that defines a public name."""
    stub = SOURCE.joinpath(*package.split("."), "__init__.pyi").read_text(encoding="utf-8")
    names = [*NAME.findall(stub), *(tuple(other.rsplit(".", 1)) for other in others)]
    files: dict[str, list[str]] = {}
    for file, name in sorted(names):
        files.setdefault(file, []).append(name)
    whole = f"::: {package}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}\n"
    parts = [f"::: {package}.{file}\n    options: {{members: [{', '.join(found)}]}}\n" for file, found in files.items()]
    return "\n".join([whole, *parts])
