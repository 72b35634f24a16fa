"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from modelpatch.patch.inspect import Inspection
from modelpatch.train import Comparison

COMPARISON_COLUMNS = (
    "method",
    "top-1",
    "base before",
    "base after",
    "harmonic mean",
    "trained numbers",
    "file bytes",
    "seconds",
)


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent; None as a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells of the comparison, as text, in the order of COMPARISON_COLUMNS."""
    return [
        (
            row.method,
            percent(row.top1),
            percent(row.base_before),
            percent(row.base_after),
            percent(row.harmonic_mean),
            f"{row.trainable_parameters:,}",
            f"{row.file_bytes:,}",
            f"{row.seconds:.1f}",
        )
        for row in comparison.rows
    ]


def comparison_table(comparison: Comparison) -> Table:
    """One row a method."""
    caption = "\n".join(f"{name} left out: {why}" for name, why in comparison.skipped.items())
    table = Table(title=escape(f"{comparison.task} on {comparison.backbone}"), caption=escape(caption) or None)
    for number, column in enumerate(COMPARISON_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in comparison_rows(comparison):
        table.add_row(*map(escape, row))
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(COMPARISON_COLUMNS) + " |", "|---|" + "---:|" * (len(COMPARISON_COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in comparison_rows(comparison)]
    return "\n".join(lines) + "\n"


def inspection_table(inspection: Inspection, spans: bool = True) -> Table:
    """A patch in figures, with one row for every module it replaces if `spans`."""
    title = f"{inspection.task}: {inspection.kind}, {inspection.classes} classes"
    table = Table(title=escape(title), show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    settings = ", ".join(f"{name}={value}" for name, value in inspection.hyperparameters.items())
    rows: list[tuple[str, str]] = [
        ("method", f"{inspection.method} ({settings})"),
        ("backbone", inspection.backbone),
        ("base fingerprint", inspection.fingerprint),
        ("image size", f"{inspection.image_size} px"),
        ("numbers", f"{inspection.numbers:,} in {inspection.tensor_bytes:,} bytes"),
        ("file", f"{inspection.file_bytes:,} bytes"),
        ("file sha256", inspection.file_sha256),
        ("content hash", inspection.content_hash),
    ]
    rows += [(name.replace("_", " "), _figure(name, value)) for name, value in inspection.metrics.items()]
    rows += [(name.replace("_", " "), _figure(name, value)) for name, value in inspection.created.items()]
    if spans:
        rows += [
            (
                f"{part.kind} {part.name}".strip(),
                f"{part.numbers:,} numbers, {part.bytes:,} bytes, {'/'.join(part.dtypes)}",
            )
            for part in inspection.parts
        ]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def _figure(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, float) and "top" in name:
        return f"{percent(value)} %"
    return f"{value:,}" if isinstance(value, int) else str(value)


def evaluation_table(task: str, figures: dict[str, Any], per_class: bool) -> Table:
    """Accuracies of one patch on one task."""
    table = Table(title=escape(task), show_header=False)
    rows = [
        ("top-1", percent(figures["top1"])),
        ("top-5", percent(figures["top5"])),
        ("images", str(figures["images"])),
    ]
    if "base_top1" in figures:
        rows += [("base top-1", percent(figures["base_top1"])), ("harmonic mean", percent(figures["harmonic_mean"]))]
    if per_class:
        rows += [(name, percent(value)) for name, value in figures["per_class"].items()]
    for name, value in rows:
        table.add_row(escape(name), value)
    return table


def prediction_table(answers: list[dict[str, Any]]) -> Table:
    """One row an image, one column a task; the best answer first with its probability."""
    tasks = list(answers[0]["tasks"])
    table = Table()
    table.add_column("image", overflow="fold")
    for task in tasks:
        table.add_column(escape(task))
    for answer in answers:
        cells = [
            "\n".join(f"{100 * one['probability']:5.1f} %  {escape(one['label'])}" for one in answer["tasks"][task])
            for task in tasks
        ]
        table.add_row(escape(answer["image"]), *cells)
    return table
