"""Tables hold the figures, pictures are drawn, the page needs nothing from outside and trusts no name."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from conftest import color_task, draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.cli.console import Screen
from modelpatch.errors import ModelpatchError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.registry import COMPARED
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import encode_patch
from modelpatch.recipes.comparison import Comparison, MethodRow
from modelpatch.report.html import Report, data_url, write_comparison
from modelpatch.report.plots import plot_bytes, plot_comparison, plot_confusion, plot_inspection
from modelpatch.report.tables import (
    LABELS,
    cells_markdown,
    comparison_cells,
    comparison_table,
    evaluation_table,
    fit_table,
    inspection_table,
    parts_table,
    percent,
    prediction_table,
    versions_table,
)
from modelpatch.store.version import Version
from modelpatch.tasks.classification import Evaluation
from modelpatch.tasks.record import TaskRecord

pytestmark = pytest.mark.slow

HOSTILE = '<script src="http://evil.example/x.js">[red]&"\''


def comparison(*, base: bool, task: str = "colors") -> Comparison:
    figures = {"base_before": 0.75, "base_after": 0.75} if base else {"base_before": None, "base_after": None}
    rows = [
        MethodRow("linear-probe", 0.61, None, **figures, harmonic_mean=0.673 if base else None,
            trainable_parameters=1234, file_bytes=56_789, seconds=1.25),
        MethodRow("scale-bias", 0.875, 0.0125, **figures, harmonic_mean=0.808 if base else None,
            trainable_parameters=34_112, file_bytes=169_140, seconds=62.5),
    ]  # fmt: skip
    return Comparison(task, "bundled:tiny", tuple(rows), {}, {}, {"subset": "there is [nothing] to train"})


def text_of(table: Table) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# tables -----------------------------------------------------------------------------------------------------


def test_shares_are_shown_as_percent_and_nothing_as_a_dash() -> None:
    assert [percent(share) for share in (0, 0.3333, 1, None)] == ["0.0", "33.3", "100.0", "–"]


def test_a_comparison_shows_every_figure_and_what_was_left_out() -> None:
    text = text_of(comparison_table(comparison(base=True)))
    for figure in ("colors", "bundled:tiny", "61.0", "87.5", "75.0", "80.8", "34,112", "169,140", "62.5"):
        assert figure in text
    assert "subset left out: there is [nothing] to train" in text


def test_the_markdown_has_one_line_a_method_of_equal_width() -> None:
    header, rule, *rows = cells_markdown(*comparison_cells(comparison(base=True))).splitlines()
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    assert [row.split(" | ")[0] for row in rows] == ["| linear-probe", "| scale-bias"]
    assert "| 169,140 |" in rows[1]


def test_an_inspection_shows_every_part(tiny: Backbone) -> None:
    inspection = draft_patch(tiny, ScaleBias()).inspect()
    text = text_of(inspection_table(inspection))
    assert inspection.file_sha256 in text
    assert f"{inspection.file_bytes:,} bytes" in text
    text = text_of(parts_table(inspection))
    for part in inspection.parts:
        assert part.name in text
        assert f"{part.bytes:,}" in text


def test_an_inspection_says_which_numbers_int8_left_alone(tiny: Backbone) -> None:
    patch = draft_patch(tiny, ScaleBias())
    counts = patch.astype("int8").inspect().stored
    text = re.sub(r"\s+", " ", text_of(inspection_table(patch.astype("int8").inspect())))
    for kind in ("int8", "float32"):
        assert f"{kind} {counts[kind]:,}" in text
    assert "vectors stay float32" in text
    assert "vectors stay float32" not in text_of(inspection_table(patch.astype("float16").inspect()))


@pytest.mark.parametrize("method", [ScaleBias(), DeltaNetwork(modules=2), Piggyback(), ScaleBias() + Piggyback()])
def test_the_bytes_of_spans_head_and_header_add_up_to_the_file(tiny: Backbone, method: Method) -> None:
    patch = draft_patch(tiny, method)
    inspection = patch.inspect(tiny.chain)
    spans = {span.segments: span for span in inspection.spans}
    assert tuple(spans) == patch.blueprint.spans(tiny.chain)
    rest = sum(part.bytes for part in inspection.parts if part.span is None)
    assert sum(span.bytes for span in spans.values()) + rest + inspection.header_bytes == inspection.file_bytes
    assert sum(part.bytes for part in inspection.parts) == inspection.tensor_bytes
    text = text_of(parts_table(inspection))
    for (start, end), span in spans.items():
        assert span.bytes == sum(part.bytes for part in inspection.parts if part.span == (start, end))
        first, last = tiny.chain[start].name, tiny.chain[end - 1].name
        name = f"segment {start} {first}" if end == start + 1 else f"segments {start} to {end - 1} {first} to {last}"
        assert name in text
    assert f"{inspection.header_bytes:,}" in text


# at 80 columns ----------------------------------------------------------------------------------------------


def shown(table: Table, width: int) -> list[str]:
    console = Screen(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.quiet = False  # a verb that ran before may have been
    console.show(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


SURE = ((0.861, 0.889), 0.8713, 0.8655)  # interval, macro F1, balanced accuracy


def large_comparison() -> Comparison:
    """All methods that are compared by default, with figures as wide as they come."""
    rows = [
        MethodRow(name, 0.875 - 0.002 * number, 0.0125, 0.7512, 0.7512, 0.808, 123_456_789, 987_654_321, 3600.5, *SURE)
        for number, name in enumerate(COMPARED)
    ]
    return Comparison("colors", "bundled:tiny", tuple(rows), {}, {}, {})


@pytest.mark.parametrize("width", [40, 80, 240])
def test_names_wrap_and_figures_do_not(width: int) -> None:
    lines = shown(comparison_table(large_comparison()), width)
    assert sum("123,456,789" in line and "987,654,321" in line and "80.8" in line for line in lines) == len(COMPARED)
    assert not any("…" in line for line in lines)
    joined = "".join(line[:12].strip() for line in lines)
    if width == 80:
        assert "delta(modules=all,batch_norm=true)" in joined


def test_a_comparison_with_common_figures_fits_80_columns() -> None:
    for base in ((0.7512, 0.7512, 0.8), (None, None, None)):
        rows = [MethodRow(name, 0.875, 0.0125, *base, 3_504_872, 14_123_456, 62.5, *SURE) for name in COMPARED]
        compared = Comparison("colors", "bundled:tiny", tuple(rows), {}, {}, {})
        lines = shown(comparison_table(compared), 80)
        assert max(map(len, lines)) <= 80
        assert any("86.1 to 88.9" in line for line in lines) == (base[0] is None)
        assert "86.1 to 88.9" in comparison_cells(compared)[1][0]


def test_hashes_are_whole_at_80_columns(tiny: Backbone) -> None:
    inspection = draft_patch(tiny, ScaleBias()).with_metrics(test_top1=0.5, test_images=12).inspect()
    lines = shown(inspection_table(inspection), 80)
    for value in (inspection.fingerprint, inspection.file_sha256, inspection.content_hash):
        assert any(value in line for line in lines)
    assert max(map(len, lines)) <= 80


ODD = ["abc", True, None, -1, 10**400, 1e308, [1, [2]], {"a": {"b": 1}}, HOSTILE, "", float("inf")]


@pytest.mark.parametrize("name", ["trainable_parameters", "test_top1", "settings", "data"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_any_fact_of_a_file_is_shown(tiny: Backbone, name: str, value: object) -> None:
    inspection = draft_patch(tiny).inspect()
    label = {"test_top1": "test top-1", **LABELS}.get(name, name)
    for facts in ({"metrics": {name: value}}, {"created": {name: value}}):
        assert label in text_of(inspection_table(replace(inspection, **facts)))


def test_trained_numbers_are_shown_beside_those_of_the_backbone(tiny: Backbone) -> None:
    inspection = draft_patch(tiny).inspect()
    shown = replace(inspection, created={"trainable_parameters": inspection.backbone_parameters})
    assert f"{inspection.backbone_parameters:,} besides the head, 100 % of" in text_of(inspection_table(shown))


def task_of(classes: int) -> TaskRecord:
    return TaskRecord(name="colors", classes=tuple(map(str, range(classes))))


def test_an_evaluation_lists_classes_only_when_asked() -> None:
    figures = {"top1": 0.5, "top5": 1.0, "images": 12, "per_class": {"red[/]": 0.25}}
    assert "red" not in text_of(evaluation_table(task_of(9), figures, per_class=False))
    figures |= {"base_top1": 0.7, "harmonic_mean": 0.58, "interval": [0.254, 0.746]}
    text = text_of(evaluation_table(task_of(9), figures, per_class=True))
    assert "top-1 of red[/]" in text
    for figure in ("50.0", "25.4 to 74.6", "100.0", "12", "red[/]", "25.0", "70.0", "58.0"):
        assert figure in text


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_the_best_five_of_no_more_classes_are_no_figure(tiny: Backbone, classes: int, shown: bool) -> None:
    figures = {"top1": 0.5, "top5": 1.0, "images": 12, "per_class": {}}
    measured = (
        draft_patch(tiny, classes=classes).with_metrics(test_top1=0.5, test_top5=1.0, validation_top5=1.0).inspect()
    )
    evaluated = evaluation_table(task_of(classes), figures, per_class=False)
    for table in (evaluated, fit_table(measured), inspection_table(measured)):
        assert "top-1" in text_of(table)
        assert ("top-5" in text_of(table)) is shown


def test_names_of_figures_are_whole_at_80_columns(tiny: Backbone) -> None:
    inspection = draft_patch(tiny).with_metrics(validation_top1=0.5).inspect()
    assert any(line.startswith("held-out top-1 ") for line in shown(inspection_table(inspection), 80))


def test_a_broken_image_has_its_error_in_the_table() -> None:
    answers = [
        {"image": "a.png", "tasks": {}, "error": "a.png cannot be read as an image: [no]"},
        {"image": "b.png", "tasks": {"colors": [{"label": "red", "probability": 0.75}]}},
    ]
    text = text_of(prediction_table(answers, {"colors": "classification"}))
    for part in ("error: cannot be read as an image: [no]", "colors", "75.0 %  red"):
        assert part in text
    assert "error:" in text_of(prediction_table(answers[:1], {"answer": "classification"}))


def test_predictions_show_the_best_answers_of_every_task() -> None:
    answer = [{"label": "red", "probability": 0.75}, {"label": HOSTILE, "probability": 0.2}]
    text = text_of(
        prediction_table(
            [{"image": "a[b].png", "tasks": {"colors": answer, "shades": answer[:1]}}],
            dict.fromkeys(("colors", "shades"), "classification"),
        )
    )
    for shown in ("a[b].png", "colors", "shades", "75.0 %", "20.0 %", HOSTILE):
        assert shown in text


def test_boxes_are_counted_by_class() -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    sure = [("cell", 0.9), ("grain", 0.8), ("cell", 0.7), ("cell", 0.6)]
    found = [{"label": label, "probability": probability, "box": box} for label, probability in sure]
    text = text_of(prediction_table([{"image": "a.png", "tasks": {"blood": found}}], {"blood": "detection"}))
    assert "90.0 %  cell and 2 more" in text
    assert "80.0 %  grain" in text
    assert "grain and" not in text
    assert "70.0 %" not in text
    assert "no box from 50 % on" in text_of(
        prediction_table([{"image": "a.png", "tasks": {"blood": []}}], {"blood": "detection"})
    )


# pictures ---------------------------------------------------------------------------------------------------


def assert_drawn(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        low, high = image.convert("L").getextrema()
        assert low < high


@pytest.mark.parametrize("base", [True, False])
def test_a_comparison_is_drawn(tmp_path: Path, base: bool) -> None:
    plot_comparison(comparison(base=base, task="a $task$ with_marks"), tmp_path / "bars.png")
    assert_drawn(tmp_path / "bars.png")


@pytest.mark.parametrize("count", [3, 50])
def test_a_confusion_matrix_is_drawn_with_few_and_many_classes(tmp_path: Path, count: int) -> None:
    confusion = [[int(i == j) for j in range(count)] for i in range(count)]
    evaluation = Evaluation(1.0, 1.0, count, {}, confusion)
    plot_confusion(evaluation, "top-1", tuple(map(str, range(count))), tmp_path / "confusion.png")
    assert_drawn(tmp_path / "confusion.png")


def test_the_parts_of_a_patch_are_drawn(tmp_path: Path, tiny: Backbone) -> None:
    plot_inspection(draft_patch(tiny, ScaleBias()).inspect(), tmp_path / "parts.png")
    assert_drawn(tmp_path / "parts.png")


@pytest.mark.parametrize("name", ["missing/parts.png", "parts.txt"])
def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path, tiny: Backbone, name: str) -> None:
    with pytest.raises(ModelpatchError, match=r"cannot draw .*\.png, \.svg or \.pdf"):
        plot_inspection(draft_patch(tiny).inspect(), tmp_path / name)


# the page ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """All tags, attribute values and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(color_task().train.images[0]).save(buffer, format="PNG")  # type: ignore[arg-type]
    return buffer.getvalue()


def test_hostile_names_are_text_and_nothing_is_loaded_from_outside(tmp_path: Path, png: bytes) -> None:
    (tmp_path / "picture.png").write_bytes(png)
    report = Report(HOSTILE, HOSTILE)
    report.section(HOSTILE, HOSTILE)
    report.table((HOSTILE, "value"), [(HOSTILE, HOSTILE)])
    report.picture(tmp_path / "picture.png", HOSTILE)
    report.samples([(png, HOSTILE, HOSTILE), (png, HOSTILE, "blue")])
    report.code(HOSTILE)
    report.write(tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 11  # title, heading, lead, section twice, table thrice, samples twice, code
    pictures = [value for value in page.attributes if value.startswith("data:")]
    assert pictures == [data_url(png)] * 3
    assert not any(value.startswith(("http:", "https:", "//")) for value in page.attributes)
    assert not re.search(r"@import|url\(", source)
    assert {"ok", "bad", HOSTILE, f"an image of blue, answered {HOSTILE}"} <= set(page.attributes)
    assert f"✓ {HOSTILE}" in page.text
    assert f"✗ {HOSTILE}, not blue" in page.text


@pytest.mark.parametrize("base", [True, False])
def test_accuracy_against_bytes_is_drawn_and_stands_in_the_page(base: bool, tmp_path: Path) -> None:
    plot_bytes(comparison(base=base), tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
    write_comparison(comparison(base=base, task=HOSTILE), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 2
    assert "<script" not in page
    assert "87.5 ± 1.2" in page
    assert "there is [nothing] to train" in page


def test_no_two_names_overlap_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *rest, **options: drawn.append(figure))
    plot_bytes(large_comparison(), tmp_path / "bytes.png")
    texts = drawn[0].axes[0].texts
    boxes = [Text.get_window_extent(text) for text in texts]
    assert [text.get_text() for text in texts] == list(COMPARED)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = drawn[0].axes[0].get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in box.corners())
    points = drawn[0].axes[0].transData.transform([text.xy for text in texts])  # type: ignore[attr-defined]
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_the_versions_of_a_store_show_the_accuracy_that_was_measured(tiny: Backbone) -> None:
    patch = draft_patch(tiny, ScaleBias()).with_metrics(test_top1=0.1234)
    assert "12.3" in text_of(versions_table([Version.of("colors", encode_patch(patch), patch)]))
