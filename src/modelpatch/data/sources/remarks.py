"""The record that a source keeps while it reads: names that it passed over, and notes of what it decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LISTED = 3  # names in a note
EXPECTED = (
    "hidden",
    "no picture (",
    "row that repeats another",
    "folder that --classes",
    "row of a class that --classes",
)


def is_expected(reason: str) -> bool:
    """Return True for a reason to pass something over that no user misses: system files, texts, what `classes` leave out."""
    return reason.startswith(EXPECTED)


@dataclass
class Remarks:
    """Names that were passed over, by the reason in plain words, and notes for the user. Both keep the order of reading.

    >>> remarks = Remarks()
    >>> remarks.pass_over("hidden file", "cat/._1.jpg")
    >>> remarks.note("class folders are empty", ["dog"], "class folder is empty")
    >>> remarks.facts
    {'passed_over': {'hidden file': ('cat/._1.jpg',)}, 'notes': ('1 class folder is empty: dog',)}
    """

    passed_over: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def pass_over(self, reason: str, *names: str) -> None:
        """Count files, rows or objects, named relative to the source, that are not read for a reason."""
        if names:
            self.passed_over.setdefault(reason, []).extend(names)

    def note(self, text: str, names: Sequence[str] | None = None, text_of_one: str = "") -> None:
        """Add a note. With `names` it begins with their number and ends with the first of them; of none there is no note."""
        if names is None:
            self.notes.append(text)
        elif names:
            more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
            subject = text_of_one if len(names) == 1 and text_of_one else text
            self.notes.append(f"{len(names):,} {subject}: {', '.join(names[:LISTED])}{more}")

    @property
    def facts(self) -> Mapping[str, Any]:
        """The record as arguments of `Found`: `Found(..., **remarks.facts)`."""
        passed_over = {reason: tuple(names) for reason, names in self.passed_over.items()}
        return {"passed_over": passed_over, "notes": tuple(self.notes)}
