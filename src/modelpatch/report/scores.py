"""Precision, recall and F1 of every class, and confused classes with their counts, as tables."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from modelpatch.report.tables import new_table, percent
from modelpatch.tasks.scores import score_classes

MOST_COLUMNS, MOST_PAIRS = 16, 20


def class_table(
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    counted: str = "images",
    more: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """A row a class: its images (or what is counted), precision, recall and F1, in percent, and `more` shares by title."""
    own = more or {}
    rows = [
        (
            one.name,
            f"{one.asked:,}",
            percent(one.precision),
            percent(one.recall),
            percent(one.f1 if one.asked else None),
            *(percent(shares.get(one.name)) for shares in own.values()),
        )
        for one in score_classes(confusion, classes)
    ]
    return new_table("classes", texts=("class",), figures=(counted, "precision", "recall", "F1", *own), rows=rows)


def confusion_table(confusion: Sequence[Sequence[int]], classes: Sequence[str], counted: str = "images") -> Table:
    """Counts of a row's class that were answered as a column's; of many classes the pairs that are confused most."""
    if len(classes) <= MOST_COLUMNS:
        rows = [[name, *(f"{count:,}" for count in row)] for name, row in zip(classes, confusion, strict=True)]
        return new_table("class by answer", counted, texts=("class",), figures=classes, rows=rows)
    pairs = [
        (count, name, classes[other])
        for name, row in zip(classes, confusion, strict=True)
        for other, count in enumerate(row)
        if count and classes[other] != name
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    caption = (
        f"the {MOST_PAIRS} most frequent of {len(pairs):,} pairs; --json has all counts"
        if len(pairs) > MOST_PAIRS
        else ""
    )
    rows = [[name, other, f"{count:,}"] for count, name, other in pairs[:MOST_PAIRS]]
    return new_table("confused classes", caption, texts=("class", "answer"), figures=(counted,), rows=rows)
