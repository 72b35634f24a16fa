"""A report as one HTML file that needs nothing else: pictures inside, no scripts, light and dark."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from modelpatch.atomic import write_bytes
from modelpatch.report.plots import plot_bytes, plot_comparison
from modelpatch.report.tables import comparison_cells

if TYPE_CHECKING:
    from modelpatch.recipes.comparison import Comparison

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
td { white-space: nowrap; } th { overflow-wrap: normal; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; font-weight: 600; white-space: normal; min-width: 9rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
pre { background: #8882; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
.samples { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 7rem; text-align: center; font-size: .85rem; }
figure img { width: 7rem; image-rendering: pixelated; }
.ok { color: #1f7a3d; } .bad { color: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) { .ok { color: #7bd497; } .bad { color: #ff9d92; } }
"""


class Report:
    """A page of sections in the order of their calls; all text is escaped."""

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.parts = title, [f"<h1>{escape(title)}</h1>"]
        self.text(lead)

    def section(self, title: str, text: str = "") -> None:
        """A heading and, below it, a paragraph."""
        self.parts.append(f"<h2>{escape(title)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is the rows' names."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        self.parts.append(f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def picture(self, path: Path, description: str) -> None:
        """A PNG file, embedded."""
        self.parts.append(f'<p><img src="{data_url(path.read_bytes())}" alt="{escape(description)}"></p>')

    def samples(self, items: Sequence[tuple[bytes, str, str]]) -> None:
        """Add small PNG pictures with their answers and true classes, marked as right or wrong."""
        cells = []
        for png, answer, truth in items:
            caption = f"✓ {answer}" if answer == truth else f"✗ {answer}, not {truth}"
            described = escape(f"an image of {truth}, answered {answer}")
            cells.append(
                f'<figure><img src="{data_url(png)}" alt="{described}">'
                f"<figcaption class={'ok' if answer == truth else 'bad'}>{escape(caption)}</figcaption></figure>"
            )
        self.parts.append(f"<div class=samples>{''.join(cells)}</div>")

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def write(self, path: Path) -> None:
        """Write the page atomically."""
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>{"".join(self.parts)}</html>'
        )
        write_bytes(path, page.encode())


def write_comparison(comparison: Comparison, path: Path) -> None:
    """The comparison as a page: table, bars, and accuracy against bytes."""
    report = Report(
        f"Methods on {comparison.task}",
        f"Every method was fitted on the frozen backbone {comparison.backbone} with the same settings and number of steps.",
    )
    report.table(*comparison_cells(comparison))
    for name, why in comparison.skipped.items():
        report.section(f"{name} was left out", why)
    with tempfile.TemporaryDirectory() as folder:
        for title, draw in (("Accuracy and bytes", plot_comparison), ("Accuracy against bytes", plot_bytes)):
            picture = Path(folder) / "picture.png"
            draw(comparison, picture)
            report.section(title)
            report.picture(picture, title)
    report.write(path)


def data_url(png: bytes) -> str:
    """A PNG as a `data:` URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
