"""Tables for the terminal and for Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rich import box
from rich.markup import escape
from rich.table import Table

from modelpatch.text import count_of

if TYPE_CHECKING:
    from modelpatch.convert.merging import Difference
    from modelpatch.engine.program import Timing
    from modelpatch.patch.inspect import Inspection
    from modelpatch.recipes.comparison import Comparison
    from modelpatch.recipes.multitask import Multitask
    from modelpatch.store.version import Version
    from modelpatch.tasks.kind import Kind
    from modelpatch.tasks.record import TaskRecord

NAME_WIDTH, FACT_WIDTH, HASH_WIDTH, SHORT_HASH = 12, 15, 64, 12  # characters
LABELS = {"trainable_parameters": "trained"}
ENDS = ("_low", "_high")  # of the names of an interval's ends among a patch's metrics
SPLITS = {"validation": "held-out"}


def new_table(
    title: str,
    caption: str = "",
    *,
    header: bool = True,
    texts: Sequence[str] = (),
    figures: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    bold: Collection[int] = (),
) -> Table:
    """A light table that leaves a narrow terminal to the figures: columns of texts wrap, columns of figures do not.

    Cells and names of columns are shown as they are, without markup; `bold` are numbers of rows.
    """
    table = Table(
        title=escape(title),
        caption=escape(caption) or None,
        show_header=header,
        box=box.SIMPLE_HEAD if header else None,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
    for name in texts:
        table.add_column(escape(name), overflow="fold", min_width=NAME_WIDTH)
    for name in figures:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if number in bold else None)
    return table


def facts_table(title: str, rows: Iterable[tuple[str, str]], width: int | None = None) -> Table:
    """Names and values, one pair a row; values have at least `width` characters, if that is given."""
    table = new_table(title, header=False)
    table.add_column("", overflow="fold", max_width=width and FACT_WIDTH)
    table.add_column("", overflow="fold", min_width=width)
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def cells_markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown; columns after the first are figures."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]]) + "\n"


def percent(share: float | None, error: float | None = None) -> str:
    """A share in [0, 1] as percent, with its standard error if there is one; None as a dash."""
    return "–" if share is None else f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def spell_interval(ends: Sequence[float] | None) -> str:
    """The ends of an interval of shares in percent, as `84.6 to 89.1`; a dash for None."""
    return "–" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"


def plain(score: float, error: float | None = None) -> str:
    """A score that is no share, with its standard error if there is one."""
    return f"{score:.3f}" + ("" if error is None else f" ± {error:.3f}")


def comparison_cells(comparison: Comparison, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison as text; columns only of what is known of some row.

    A `narrow` one with figures of the base leaves out intervals and macro F1.
    """
    measured = any(row.base_after is not None for row in comparison.rows)
    about_base = ["base before", "base after", "harmonic mean"] * measured
    left = narrow and measured
    sure = not left and any(row.interval is not None for row in comparison.rows)
    even = not left and any(row.macro_f1 is not None for row in comparison.rows)
    rows = []
    for row in comparison.rows:
        base = [percent(share) for share in (row.base_before, row.base_after, row.harmonic_mean)] * measured
        costs = [f"{row.trainable_parameters:,}", f"{row.file_bytes:,}", f"{row.seconds:.1f}"]
        more = [spell_interval(row.interval)] * sure + [percent(row.macro_f1)] * even
        score = percent(row.score, row.score_error) if comparison.in_percent else plain(row.score, row.score_error)
        rows.append([row.method, score, *more, *base, *costs])
    known = ["95% interval"] * sure + ["macro F1"] * even
    return ["method", comparison.title, *known, *about_base, "trained", "file bytes", "seconds"], rows


def comparison_table(comparison: Comparison) -> Table:
    caption = "\n".join(f"{name} left out: {why}" for name, why in comparison.skipped.items())
    (name, *figures), rows = comparison_cells(comparison, narrow=True)
    breaks = [column.replace(" ", "\n") for column in figures]
    table = new_table(f"{comparison.task} on {comparison.backbone}", caption, texts=(name,), figures=breaks, rows=rows)
    table.columns[0].min_width = NAME_WIDTH - 2
    return table


def multitask_table(result: Multitask, sizes: Mapping[str, int]) -> Table:
    """One row a task and their mean; `sizes` are the bytes of the patch files by task."""
    figures = result.as_dict()
    shared, whole, numbers = (figures[name] for name in ("shared_parameters", "backbone_parameters", "numbers"))
    caption = f"{shared:,} of {whole:,} parameters are shared, {numbers:,} numbers in all"
    rows = []
    for name, patch in result.patches.items():
        row, epochs = figures["tasks"][name], f"{patch.created['multitask']['epochs']:g}"
        counts = (row["private_numbers"], row["head_numbers"], sizes[name])
        rows.append([name, percent(row["test_top1"]), epochs, *(f"{count:,}" for count in counts)])
    return new_table(
        f"{count_of(len(result.patches), 'task')} on {result.backbone.spec}",
        caption,
        texts=("task",),
        figures=("top-1", "epochs", "private\nnumbers", "head\nnumbers", "file\nbytes"),
        rows=[*rows, ["mean", percent(result.top1)]],
    )


def inspection_table(inspection: Inspection) -> Table:
    settings = ", ".join(f"{name}={value}" for name, value in inspection.hyperparameters.items())
    stored = ", ".join(f"{kind} {count:,}" for kind, count in inspection.stored.items())
    why = " (int8 is for matrices; vectors stay float32)"
    rows: list[tuple[str, str]] = [
        ("method", f"{inspection.method} ({settings})"),
        ("backbone", f"{inspection.backbone}, {inspection.backbone_parameters:,} parameters"),
        ("fingerprint", inspection.fingerprint),
        ("image size", f"{inspection.image_size} px"),
        ("numbers", f"{inspection.numbers:,} in {inspection.tensor_bytes:,} bytes"),
        ("stored as", stored + why * (inspection.stored.keys() > {"int8"})),
        *([("masks", str(inspection.masks))] if inspection.masks else []),
        *([("strength", f"{inspection.strength:g}")] if inspection.strength != 1 else []),
        ("file", _size(inspection)),
        ("file sha256", inspection.file_sha256),
        ("content hash", inspection.content_hash),
        *((name.replace("_", " "), _spell(value)) for name, value in inspection.options.items()),
    ]
    rows += [
        (_label(name, inspection.kind), _figure(name, value, inspection))
        for name, value in (*inspection.metrics.items(), *inspection.created.items())
        if not _is_certain(name, inspection.classes) and not name.endswith(ENDS)
    ]
    return facts_table(_title(inspection), rows, HASH_WIDTH)


def fit_table(inspection: Inspection) -> Table:
    """The outcome of a fit in a few rows, the scores and the file last."""
    from modelpatch.tasks.kind import kind_of

    measured, trained = inspection.metrics, inspection.created.get("trainable_parameters")
    rows = [("method", f"{inspection.method} on {inspection.backbone} at {inspection.image_size} px")]
    rows += [] if trained is None else [("trained", _figure("trainable_parameters", trained, inspection))]
    images = f" of {measured['test_images']:,} images" if "test_images" in measured else ""
    kind = kind_of(inspection.kind)
    for name, title in kind.metrics.items():
        if f"test_{name}" in measured and not _is_certain(name, inspection.classes):
            rows.append((f"test {title}", f"{_figure(f'test_{name}', measured[f'test_{name}'], inspection)}{images}"))
            images = ""
    return facts_table(_title(inspection), [*rows, ("file", _size(inspection))])


def choice_table(choice: Mapping[str, Any]) -> Table:
    """All that was tried before a patch was trained: score on held-out images, or the reason that there is none."""
    rows = []
    for one in choice["tried"]:
        told = one["reason"] if one["score"] is None else f"{one['score']:.4g}"
        rows.append([one["name"], one["augment"], told, f"{one['share']:.0%}", f"{one['file_bytes']:,}"])
    bold = [number for number, row in enumerate(rows) if row[:2] == [choice["method"], choice["augment"]]]
    texts, figures = ("tried", "augmentation", "held-out score"), ("of a fit", "bytes")
    return new_table("choice of a patch", texts=texts, figures=figures, rows=rows, bold=bold)


def parts_table(inspection: Inspection) -> Table:
    """The bytes of the file: a row a span with its modules below, the head, the header, and their sum."""
    masked = inspection.masks is not None
    rows: list[list[str]] = []
    bold = []
    for span in (*inspection.spans, None):
        if span is not None:
            bold.append(len(rows))
            rows.append([str(span), "", f"{span.numbers:,}", f"{span.bytes:,}", ""])
        for part in inspection.parts:
            if part.span == (None if span is None else span.segments):
                name = part.name if part.kind == part.name else f"{part.kind} {part.name}"
                sizes = [f"{part.numbers:,}", f"{part.bytes:,}", "" if part.kept is None else percent(1 - part.kept)]
                rows.append([name if span is None else f"  {name}", "/".join(part.codecs), *sizes])
    bold.append(len(rows) + 1)
    rows.append(["header", "JSON: names, settings, hashes", "", f"{inspection.header_bytes:,}", ""])
    rows.append(["file", "", f"{inspection.numbers:,}", f"{inspection.file_bytes:,}", ""])
    figures = ["numbers", "bytes", *["masked\nout, %"] * masked]
    cells = [row[: 4 + masked] for row in rows]
    return new_table("bytes by part", texts=("part", "stored as"), figures=figures, rows=cells, bold=bold)


def _is_certain(figure: str, classes: int) -> bool:
    """True for a top-k that is 100 % for any answers, since the task has no more than k classes."""
    number = figure.rpartition("top")[2]
    return number.isdecimal() and int(number) >= classes


def _label(name: str, kind: str) -> str:
    """A fact's name as it is read: `held-out top-1` for `validation_top1`."""
    from modelpatch.tasks.kind import kind_of

    split, _, metric = name.partition("_")
    if title := kind_of(kind).metrics.get(metric):
        return f"{SPLITS.get(split, split)} {title}"
    return LABELS.get(name, name.replace("_", " "))


def _title(inspection: Inspection) -> str:
    from modelpatch.tasks.kind import kind_of

    kind = kind_of(inspection.kind)
    return f"{inspection.task}: {inspection.kind}, {count_of(inspection.classes, kind.noun, kind.nouns)}"


def _size(inspection: Inspection) -> str:
    share = 100 * inspection.file_bytes / inspection.backbone_bytes
    return f"{inspection.file_bytes:,} bytes, {share:.2g} % of the backbone's"


def _figure(name: str, value: Any, inspection: Inspection) -> str:
    """A fact of a patch file as text, whatever its type."""
    from modelpatch.tasks.kind import kind_of

    kind = kind_of(inspection.kind)
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, float) and (metric := next((one for one in kind.metrics if name.endswith(one)), None)):
        known = (inspection.metrics.get(name + end) for end in ENDS)
        ends = [end for end in known if isinstance(end, float)]
        return kind.show_figure(metric, value) + (f" ({_show_ends(kind, metric, ends)})" if len(ends) == 2 else "")
    if type(value) is not int:
        return str(value)
    if name == "trainable_parameters" and value.bit_length() < 64:  # larger ones may overflow as floats
        share = 100 * value / inspection.backbone_parameters
        return f"{value:,} besides the head, {share:{'.2g' if share < 99.5 else '.0f'}} % of the backbone's"
    return f"{value:,}"


def difference_tables(difference: Difference, first: str, second: str) -> list[Table]:
    """Differences of two patch files' records, and the sizes, distance and cosine of their changes, one row per tensor."""
    tables = []
    if difference.facts:
        tables.append(new_table("differences of the records", texts=("", first, second), rows=difference.facts))
    rows = []
    for row in (*difference.rows, *((difference.total,) if difference.total else ())):
        cosine = "–" if row.cosine is None else f"{row.cosine:.3f}"
        sizes = [f"{size:.4g}" for size in (row.first, row.second, row.distance)]
        rows.append([row.name, f"{row.numbers:,}", *sizes, cosine])
    columns = ("numbers", "first", "second", "distance", "cosine")
    return [*tables, new_table("differences of the tensors", texts=("tensor",), figures=columns, rows=rows)]


def evaluation_table(task: TaskRecord, figures: dict[str, Any], per_class: bool) -> Table:
    """Figures of one patch on one task."""
    from modelpatch.tasks.kind import kind_of

    kind = kind_of(task.kind)
    shown = [name for name in kind.metrics if name in figures and not _is_certain(name, len(task.classes))]
    rows = [(kind.metrics[name], _bare(kind.show_figure(name, figures[name]))) for name in shown]
    if figures.get("interval"):
        rows.insert(1, ("95 % interval", _show_ends(kind, kind.metric, figures["interval"])))
    rows.append(("images", str(figures["images"])))
    rows += [(f"top-1 of {name}", percent(value)) for name, value in figures.get("by_task", {}).items()]
    if "base_top1" in figures:
        rows += [("base top-1", percent(figures["base_top1"])), ("harmonic mean", percent(figures["harmonic_mean"]))]
    if "macs" in figures:
        rows.append(("multiply-adds", f"{figures['macs']:,.0f}"))
        rows += [(f"answered by stage {n}", percent(share)) for n, share in enumerate(figures["answered"], 1)]
    if per_class:
        own = {name: _bare(kind.show_figure("", value)) for name, value in figures["per_class"].items()}
        rows += [(f"{kind.per_class} of {name}", value) for name, value in own.items()]
    return new_table(task.name, header=False, texts=("",), figures=("",), rows=rows)


def _spell(value: Any) -> str:
    """An option of a task as text."""
    return ", ".join(f"{one:.4g}" for one in value) if isinstance(value, list) else str(value)


def _show_ends(kind: Kind, metric: str, ends: Sequence[float]) -> str:
    """The ends of a figure's interval, as the kind shows figures: `84.6 to 89.1`."""
    return " to ".join(_bare(kind.show_figure(metric, end)) for end in ends)


def _bare(figure: str) -> str:
    """A figure without the sign of percent, for columns of figures."""
    return figure.removesuffix(" %")


def prediction_table(answers: list[dict[str, Any]], kinds: Mapping[str, str]) -> Table:
    """One row per image, one column per task, whose kind is in `kinds`; the error of a broken image."""
    from modelpatch.tasks.kind import kind_of

    tasks = list(dict.fromkeys(task for answer in answers for task in answer["tasks"])) or ["answer"]
    table = new_table("", texts=("image", *tasks))
    for answer in answers:
        found = [(kinds.get(task, ""), answer["tasks"].get(task)) for task in tasks]
        cells = ["" if one is None else escape("\n".join(kind_of(kind).summarize(one))) for kind, one in found]
        if "error" in answer:
            cells[0] = f"[red]error:[/red] {escape(answer['error'].removeprefix(answer['image']).strip())}"
        table.add_row(escape(answer["image"]), *cells)
    return table


def timing_table(timings: Sequence[Timing]) -> Table:
    """One row a step of a plan: what it does, what it took and its share of the whole."""
    from modelpatch.engine.plan import describe_step

    total = sum(timing.seconds for timing in timings)
    took = [(describe_step(one.step), one.seconds, one.seconds / total if total else 0) for one in timings]
    rows = [(step, f"{1000 * seconds:.2f}", f"{share:.0%}") for step, seconds, share in (*took, ("all", total, 1))]
    return new_table("", texts=("step",), figures=("ms", "share"), rows=rows)


def versions_table(versions: Sequence[Version]) -> Table:
    """A store's versions, one row each: the first digits of the hash are enough to name it."""
    rows = [
        (one.name, one.hash[:SHORT_HASH], " ".join(one.tags), one.method, one.task, _score(one.metrics),
         f"{one.nbytes:,}", one.created[:16])
        for one in versions
    ]  # fmt: skip
    texts, figures = ("name", "version", "tags", "method", "task"), ("score", "bytes", "published")
    table = new_table("", texts=texts, figures=figures, rows=rows)
    for column in table.columns[:2]:
        column.no_wrap = True
    return table


def _score(metrics: Mapping[str, float]) -> str:
    """The first test metric in percent, with its name unless it is top-1; a dash without one."""
    from modelpatch.tasks.kind import KINDS

    scores = [f"test_{kind.metric}" for kind in KINDS.values()]
    first = [name for name in metrics if name.startswith("test_") and name != "test_images"]
    measured = next((kind for kind in KINDS.values() if f"test_{kind.metric}" in metrics), None)
    if measured is not None and not measured.in_percent:
        return f"{plain(metrics[f'test_{measured.metric}'])} {measured.metric}"
    name = next((name for name in (*scores, *first) if name in metrics), "")
    return percent(metrics.get(name)) + (f" {name.removeprefix('test_')}" if name not in ("", "test_top1") else "")


def version_table(version: Version) -> Table:
    """Everything that a store says of one version."""
    from modelpatch.patch.envelope import short

    rows = [
        ("hash", version.hash),
        ("tags", " ".join(version.tags) or "none"),
        ("published", version.created),
        ("signed by", ", ".join(map(short, version.signers)) or "nobody"),
        ("file", f"{version.nbytes:,} bytes"),
        *((name, getattr(version, name)) for name in ("task", "method", "backbone", "fingerprint")),
        ("its chain", version.chain),
        *((LABELS.get(name, name.replace("_", " ")), f"{value:g}") for name, value in version.metrics.items()),
    ]
    return facts_table(version.name, rows, HASH_WIDTH)


def describe_fields(settings: type) -> list[dict[str, str]]:
    """The name, default and values of every field of a dataclass that a command line can give."""
    hints = get_type_hints(settings, include_extras=True)
    given = [field for field in fields(settings) if field.init and not field.metadata.get("internal")]
    defaults = {field.name: field.default for field in given}
    return [
        {"name": name, "default": "" if value is MISSING else spell_value(value), "values": spell_type(hints[name])}
        for name, value in defaults.items()
    ]


def spell_type(hint: Any) -> str:
    """The values that a type takes, in words: `auto, none or light`, `integer`, `number or none`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return spell_type(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (list, tuple, set, frozenset) or getattr(origin, "__name__", "") == "Sequence":
        inner = dict.fromkeys(spell_type(arg) for arg in args if arg is not Ellipsis)
        return f"list of {' or '.join(inner) or 'values'}"
    if args:
        return " or ".join(dict.fromkeys(spell_type(arg) for arg in args))
    words = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def spell_value(value: Any) -> str:
    """A default as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(spell_value, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def first_line(thing: object) -> str:
    """The first sentence of a docstring, up to a colon."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=[.:]) ", " ".join(paragraph.split()))[0]
    return sentence.rstrip(".:")
