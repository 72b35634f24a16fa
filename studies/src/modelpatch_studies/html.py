"""One HTML page with its pictures embedded: no scripts, no other files, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
td { white-space: nowrap; } td:first-child, th:first-child { text-align: left; font-weight: 600; white-space: normal; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.failed td:last-child { color: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) { .failed td:last-child { color: #ff9d92; } }
"""


class Page:
    """A page that grows by sections, paragraphs, tables and pictures. All text is escaped."""

    def __init__(self, title: str) -> None:
        self.title, self.parts = title, [f"<h1>{escape(title)}</h1>"]

    def section(self, title: str) -> None:
        """Add a heading."""
        self.parts.append(f"<h2>{escape(title)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], failed: Collection[int] = ()) -> None:
        """Add a table whose first column names the rows; the last cell of each `failed` row is highlighted."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = ""
        for number, row in enumerate(rows):
            mark = "<tr class=failed>" if number in failed else "<tr>"
            body += mark + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        self.parts.append(f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def picture(self, path: Path, description: str) -> None:
        """Embed a PNG file."""
        data = base64.b64encode(path.read_bytes()).decode()
        self.parts.append(f'<p><img src="data:image/png;base64,{data}" alt="{escape(description)}"></p>')

    def write(self, path: Path) -> None:
        """Write the page as one file."""
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style>'
        path.write_text(f'<!doctype html><html lang="en">{head}{"".join(self.parts)}</html>', encoding="utf-8")
