"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

from modelpatch.patch.inspect import Inspection
from modelpatch.train import Comparison
from modelpatch.train.compare import Row


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent; None as a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def comparison_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison as text; columns about the base stand only where it was measured."""
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.method,
        "top-1": lambda row: percent(row.top1) + ("" if row.top1_error is None else f" ± {percent(row.top1_error)}"),
    }
    if any(row.base_after is not None for row in comparison.rows):
        columns |= {
            "base before": lambda row: percent(row.base_before),
            "base after": lambda row: percent(row.base_after),
            "harmonic mean": lambda row: percent(row.harmonic_mean),
        }
    columns |= {
        "trained": lambda row: f"{row.trainable_parameters:,}",
        "file bytes": lambda row: f"{row.file_bytes:,}",
        "seconds": lambda row: f"{row.seconds:.1f}",
    }
    return list(columns), [[cell(row) for cell in columns.values()] for row in comparison.rows]


def comparison_table(comparison: Comparison) -> Table:
    """One row a method."""
    caption = "\n".join(f"{name} left out: {why}" for name, why in comparison.skipped.items())
    table = Table(title=escape(f"{comparison.task} on {comparison.backbone}"), caption=escape(caption) or None)
    header, rows = comparison_cells(comparison)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The same table as Markdown."""
    header, rows = comparison_cells(comparison)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def inspection_table(inspection: Inspection, spans: bool = True) -> Table:
    """A patch in figures, with one row for every module it replaces if `spans`."""
    title = f"{inspection.task}: {inspection.kind}, {inspection.classes} classes"
    table = Table(title=escape(title), show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    settings = ", ".join(f"{name}={value}" for name, value in inspection.hyperparameters.items())
    file_share = f"{100 * inspection.file_bytes / inspection.backbone_bytes:.2g} %"
    rows: list[tuple[str, str]] = [
        ("method", f"{inspection.method} ({settings})"),
        ("backbone", f"{inspection.backbone}, {inspection.backbone_parameters:,} parameters"),
        ("base fingerprint", inspection.fingerprint),
        ("image size", f"{inspection.image_size} px"),
        ("numbers", f"{inspection.numbers:,} in {inspection.tensor_bytes:,} bytes"),
        *([("masks", str(inspection.masks))] if inspection.masks else []),
        *([("strength", f"{inspection.strength:g}")] if inspection.strength != 1 else []),
        ("file", f"{inspection.file_bytes:,} bytes, {file_share} of the backbone's"),
        ("file sha256", inspection.file_sha256),
        ("content hash", inspection.content_hash),
    ]
    rows += [
        (name.replace("_", " "), _figure(name, value, inspection.backbone_parameters))
        for name, value in inspection.metrics.items()
    ]
    rows += [
        (name.replace("_", " "), _figure(name, value, inspection.backbone_parameters))
        for name, value in inspection.created.items()
    ]
    if spans:
        rows += [
            (
                f"{part.kind} {part.name}".strip(),
                f"{part.numbers:,} numbers, {part.bytes:,} bytes, {'/'.join(part.codecs)}"
                + ("" if part.kept is None else f", {percent(1 - part.kept)} % masked out"),
            )
            for part in inspection.parts
        ]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def _figure(name: str, value: Any, parameters: int) -> str:
    """A fact of a patch file for people, whatever a stranger wrote into it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, float) and "top" in name:
        return f"{percent(value)} %"
    if type(value) is not int:
        return str(value)
    if name == "trainable_parameters" and value.bit_length() < 64:  # larger ones may overflow as floats
        return f"{value:,} besides the head, {100 * value / parameters:.2g} % of the backbone's"
    return f"{value:,}"


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
