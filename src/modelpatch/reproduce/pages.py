"""An outcome for people: our figures beside the paper's as Markdown, a picture and one HTML page, and JSON for programs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from modelpatch.atomic import write_bytes
from modelpatch.report.html import Report
from modelpatch.report.plots import figure
from modelpatch.report.tables import NAME_WIDTH, new_table
from modelpatch.reproduce.outcome import Difference, Outcome, Verdict
from modelpatch.reproduce.recipe import Claim

CLAIMS = ("claim", "of", "the paper", "here", "columns above", "verdict")
OVERVIEW = ("claim", "table", "known to hold at this scale", "verdict")
METHODS = ("row", "method")
GAP = 4  # pixels at least between the names of columns, else they stand aslant


def cells(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean ± standard error over seeds, and the paper's figure in brackets where a cell means the same."""
    rows = [[row, *(_cell(outcome, row, column) for column in outcome.columns)] for row in outcome.rows]
    return ["", *outcome.columns], rows


def _cell(outcome: Outcome, row: str, column: str) -> str:
    mean = outcome.mean(row, column)
    published = outcome.recipe.published.get((row, column))
    text = "–" if mean is None else str(mean)
    return text if published is None else f"{text} ({published:g})"


def claim_cells(outcome: Outcome) -> list[list[str]]:
    """A row of `CLAIMS` for every difference of every claim; the claim's words and its verdict stand in the first."""
    rows = []
    for verdict in outcome.verdicts:
        claim = verdict.claim
        for number, one in enumerate(verdict.differences):
            words = [f"{claim.name}: {claim.text}", claim.paper, _verdict(outcome, verdict)]
            text, paper, word = words if number == 0 else ("", "", "")
            rows.append(
                [text, _pair(claim, one), paper, _difference(one, claim.margin), f"{one.cells} of {one.of}", word]
            )
    return rows


def _pair(claim: Claim, one: Difference) -> str:
    pair = f"{one.better} − {one.worse}"
    return f"{pair}, {', '.join(claim.columns)} beyond {', '.join(claim.than)}" if claim.than else pair


def _difference(one: Difference, margin: float) -> str:
    sign = "+" if one.mean.value >= 0 else ""
    return f"{sign}{one.mean}" + (f" (at least {margin:g})" if margin else "")


def _verdict(outcome: Outcome, verdict: Verdict) -> str:
    return verdict.word if outcome.is_known(verdict.claim) else f"{verdict.word} (not known to hold at this scale)"


def overview(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row of `OVERVIEW` for every claim of all tables."""
    rows = []
    for outcome in outcomes:
        for verdict in outcome.verdicts:
            known = "yes" if outcome.is_known(verdict.claim) else "no"
            rows.append([f"{verdict.claim.name}: {verdict.claim.text}", outcome.recipe.name, known, verdict.word])
    return rows


def doubts(outcome: Outcome) -> list[str]:
    """What is known of the claims that fail at the small scale, a sentence or a few each."""
    failed = [verdict.claim for verdict in outcome.verdicts if outcome.scale == "small" and not verdict.holds]
    return [f"{claim.name} does not hold here. {claim.doubt}" for claim in failed if claim.doubt]


def settings_line(outcome: Outcome) -> str:
    """What the figures were made with, in a line."""
    scale = outcome.recipe.scales[outcome.scale]
    counts = ", ".join(f"{name} {train}/{test}" for name, (train, test) in outcome.facts["images"].items())
    given = ", ".join(f"{name} {value}" for name, value in scale.fit.items())
    length = "" if scale.steps is None else f", {scale.steps} steps"
    said = (
        f"{outcome.recipe.unit}, mean ± standard error over seeds {', '.join(map(str, outcome.facts['seeds']))}",
        f"scale {outcome.scale} on {', '.join(outcome.facts['backbones'])}{length}",
        given,
        counts and f"images trained/tested: {counts}",
        f"{outcome.seconds:.0f} s",
    )
    return "; ".join(filter(None, said))


def terminal_tables(outcome: Outcome) -> list[Table]:
    """The figures and the claims for a terminal."""
    header, rows = cells(outcome)
    first = new_table("")
    first.add_column("", overflow="fold", min_width=NAME_WIDTH)
    for column in header[1:]:
        first.add_column(escape(column), justify="right", overflow="fold")
    second = new_table("")
    for number, column in enumerate(CLAIMS):
        second.add_column(column, overflow="fold", justify="right" if number == 3 else "left")
    for table, lines in ((first, rows), (second, claim_cells(outcome))):
        for line in lines:
            table.add_row(*map(escape, line))
    return [first, second]


def markdown(outcome: Outcome) -> str:
    """Figures, claims, and where the recipe leaves the paper."""
    header, rows = cells(outcome)
    methods = outcome.recipe.scales[outcome.scale].methods
    lines = [
        f"## {outcome.recipe.name}: {outcome.recipe.title}",
        "",
        f"{outcome.recipe.section}. {settings_line(outcome)}.",
        "",
    ]
    lines += _table(header, rows)
    lines += ["", *_table(CLAIMS, claim_cells(outcome)), "", *(f"{doubt}\n" for doubt in doubts(outcome))]
    lines += [outcome.recipe.notes, ""]
    lines += [f"- {row}: `{spelled}`" for row, spelled in methods.items()]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def draw(outcome: Outcome, path: Path) -> None:
    """Lines over numeric columns, else bars by column; a row a colour, its variant with Δ (or after it) in a darker shade."""
    rows, columns = outcome.rows, outcome.columns
    colors = _colors(len(rows))
    step = 0.6 if outcome.recipe.numeric else 0.16 * len(rows)
    with figure(path, max(7.0, 1.2 + step * len(columns)), 4.2) as axes:
        width = 0.8 / len(rows)
        for number, row in enumerate(rows):
            means = [outcome.mean(row, column) for column in columns]
            known = [
                (float(place), mean.value, mean.error or 0.0) for place, mean in enumerate(means) if mean is not None
            ]
            if outcome.recipe.numeric:
                places, values, errors = zip(*_apart(known, columns), strict=True)
                axes.errorbar(places, values, yerr=errors, marker="o", capsize=3, color=colors[number], label=row)
            else:
                places, values, errors = zip(*known, strict=True)
                beside = np.array(places) + (number - (len(rows) - 1) / 2) * width
                axes.bar(
                    beside, values, width, yerr=errors, color=colors[number], label=row, error_kw={"linewidth": 0.8}
                )
        axes.set_xticks(range(len(columns)), columns)
        axes.set(ylabel=outcome.recipe.unit)
        if outcome.recipe.logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(10 ** math.floor(math.log10(axes.get_ylim()[0])))  # bars from a power of ten
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_formatter("")
        axes.figure.suptitle(outcome.recipe.title, fontsize=11)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _part_names(axes)


def _part_names(axes: Any) -> None:
    """Turn the names below an axis aslant if they would meet."""
    axes.figure.draw_without_rendering()
    names = [name.get_window_extent() for name in axes.get_xticklabels()]
    if any(left.x1 + GAP > right.x0 for left, right in itertools.pairwise(names)):
        axes.tick_params(axis="x", rotation=20)
        for name in axes.get_xticklabels():
            name.set_horizontalalignment("right")


def _apart(points: Sequence[Sequence[float]], columns: Sequence[str]) -> Iterator[Sequence[float]]:
    """The points (place, value, error) of a line, with a gap before a column that is no number, such as `all`."""
    for point in points:
        if not columns[int(point[0])][0].isdigit():
            yield (math.nan,) * 3
        yield point


def _colors(count: int) -> list[tuple[float, ...]]:
    """Pairs of a light and a dark shade."""
    import matplotlib

    shades = matplotlib.colormaps["tab20" if count > 10 else "Paired"].colors  # type: ignore[attr-defined]
    return [shades[number % len(shades)] for number in range(count)]


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """`outcome.json`, `table.md` and `picture.png` in the folder. Raises `MissingExtraError` without matplotlib."""
    write_bytes(folder / "outcome.json", (json.dumps(outcome.as_dict(), indent=2) + "\n").encode())
    write_bytes(folder / "table.md", markdown(outcome).encode())
    draw(outcome, folder / "picture.png")


def write_page(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """One HTML page of all outcomes, whose pictures lie in `folder`; its path."""
    verdicts = [verdict for outcome in outcomes for verdict in outcome.verdicts]
    held = sum(verdict.holds for verdict in verdicts)
    report = Report(
        "Reproduced tables", f"Of {len(verdicts)} claims in {len(outcomes)} of the papers' tables {held} hold here."
    )
    report.table(OVERVIEW, overview(outcomes), {n for n, verdict in enumerate(verdicts) if not verdict.holds})
    for outcome in outcomes:
        report.section(
            f"{outcome.recipe.name}: {outcome.recipe.title}", f"{outcome.recipe.section}. {settings_line(outcome)}."
        )
        report.table(*cells(outcome))
        report.picture(folder / outcome.recipe.name / "picture.png", outcome.recipe.title)
        report.table(CLAIMS, claim_cells(outcome))
        if methods := outcome.recipe.scales[outcome.scale].methods:
            report.table(METHODS, list(methods.items()))
        for text in (*doubts(outcome), outcome.recipe.notes):
            report.text(text)
    path = folder / "report.html"
    report.write(path)
    return path
