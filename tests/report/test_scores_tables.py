"""Tables of the scores of classes and of confused classes."""

from __future__ import annotations

from modelpatch.report.scores import MOST_COLUMNS, class_table, confusion_table


def cells(table: object) -> list[list[str]]:
    return [list(map(str, column.cells)) for column in table.columns]  # type: ignore[attr-defined]


def test_classes_have_precision_recall_and_f1() -> None:
    names, asked, precision, recall, f1 = cells(class_table([[3, 1], [0, 0]], ["cat", "dog[/]"]))
    assert names == ["cat", r"dog\[/]"]
    assert asked == ["4", "0"]
    assert precision == ["100.0", "0.0"]
    assert recall == ["75.0", "\u2013"], "no image has the class"
    assert f1 == ["85.7", "\u2013"]
    *_, shares = cells(class_table([[3, 1], [0, 0]], ["cat", "dog"], "pixels", {"IoU": {"cat": 0.75}}))
    assert shares == ["75.0", "\u2013"], "no pixel has the class"


def test_few_classes_make_a_matrix_and_many_a_list_of_pairs() -> None:
    assert cells(confusion_table([[3, 1], [0, 2]], ["cat", "dog"])) == [["cat", "dog"], ["3", "0"], ["1", "2"]]
    count = MOST_COLUMNS + 1
    counts = [[10 if row == column else 0 for column in range(count)] for row in range(count)]
    counts[2][0], counts[1][3] = 5, 7
    classes, answers, images = cells(confusion_table(counts, [f"c{number}" for number in range(count)]))
    assert (classes, answers, images) == (["c1", "c2"], ["c3", "c0"], ["7", "5"])
