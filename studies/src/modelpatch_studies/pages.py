"""An outcome for people: our figures beside the paper's as Markdown, a picture and one HTML page, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modelpatch_studies.html import Page
from modelpatch_studies.pictures import draw
from modelpatch_studies.recipe import Claim
from modelpatch_studies.registry import RECIPES
from modelpatch_studies.results import Gap, Results, Verdict

CLAIMS = ("claim", "of", "the paper", "here", "columns above", "verdict")
OVERVIEW = ("claim", "table", "known to hold at this scale", "verdict")
METHODS = ("row", "method")
LISTED = ("paper", "table", "what", "claims", "data by scale")


def cells(outcome: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean ± standard error over seeds, and the paper's figure in brackets where a cell means the same."""
    rows = [[row, *(_cell(outcome, row, column) for column in outcome.columns)] for row in outcome.rows]
    return ["", *outcome.columns], rows


def _cell(outcome: Results, row: str, column: str) -> str:
    mean = outcome.mean(row, column)
    published = outcome.recipe.published.get((row, column))
    text = "–" if mean is None else str(mean)
    return text if published is None else f"{text} ({published:g})"


def claim_cells(outcome: Results) -> list[list[str]]:
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


def _pair(claim: Claim, one: Gap) -> str:
    pair = f"{one.better} − {one.worse}"
    return f"{pair}, {', '.join(claim.columns)} beyond {', '.join(claim.than)}" if claim.than else pair


def _difference(one: Gap, margin: float) -> str:
    sign = "+" if one.mean.value >= 0 else ""
    return f"{sign}{one.mean}" + (f" (at least {margin:g})" if margin else "")


def _verdict(outcome: Results, verdict: Verdict) -> str:
    return verdict.word if outcome.is_known(verdict.claim) else f"{verdict.word} (not known to hold at this scale)"


def overview(outcomes: Sequence[Results]) -> list[list[str]]:
    """A row of `OVERVIEW` for every claim of all tables."""
    rows = []
    for outcome in outcomes:
        for verdict in outcome.verdicts:
            known = "yes" if outcome.is_known(verdict.claim) else "no"
            rows.append([f"{verdict.claim.name}: {verdict.claim.text}", outcome.recipe.name, known, verdict.word])
    return rows


def doubts(outcome: Results) -> list[str]:
    """Likely reasons for the claims that fail at the small scale."""
    failed = [verdict.claim for verdict in outcome.verdicts if outcome.scale == "small" and not verdict.holds]
    return [f"{claim.name} does not hold here. {claim.doubt}" for claim in failed if claim.doubt]


def settings_line(outcome: Results) -> str:
    """The settings that made the figures, in a line."""
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


def print_outcome(console: Console, outcome: Results) -> None:
    """Print the figures, the claims and the settings."""
    header, rows = cells(outcome)
    console.print(f"{outcome.recipe.name}: {outcome.recipe.title}", markup=False, highlight=False)
    console.print(_terminal_table(header, rows, right=range(1, len(header))))
    console.print(_terminal_table(CLAIMS, claim_cells(outcome), right=[3]))
    console.print(f"{settings_line(outcome)}\n", markup=False, highlight=False, soft_wrap=True)


def listing() -> Table:
    """Every recipe with its claims and the data sets of its scales."""
    rows = []
    for recipe in RECIPES:
        claims = ", ".join(dict.fromkeys(claim.name for claim in recipe.claims))
        needed = "; ".join(f"{name}: {', '.join(scale.data) or 'none'}" for name, scale in recipe.scales.items())
        rows.append([recipe.paper, recipe.table, recipe.title, claims, needed])
    return _terminal_table(LISTED, rows)


def _terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(header):
        table.add_column(escape(column), overflow="fold", justify="right" if number in right else "left", min_width=8)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def markdown(outcome: Results) -> str:
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


def write_outcome(outcome: Results, folder: Path) -> None:
    """`outcome.json`, `table.md` and `picture.png` in the folder. Raises `MissingExtraError` without matplotlib."""
    (folder / "outcome.json").write_text(json.dumps(outcome.as_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(outcome), encoding="utf-8")
    draw(outcome, folder / "picture.png")


def write_page(outcomes: Sequence[Results], folder: Path) -> Path:
    """One HTML page of all outcomes, whose pictures lie in `folder`; its path."""
    verdicts = [verdict for outcome in outcomes for verdict in outcome.verdicts]
    held = sum(verdict.holds for verdict in verdicts)
    page = Page("Reproduced tables")
    page.text(f"Of {len(verdicts)} claims in {len(outcomes)} of the papers' tables {held} hold here.")
    page.table(OVERVIEW, overview(outcomes), {n for n, verdict in enumerate(verdicts) if not verdict.holds})
    for outcome in outcomes:
        page.section(f"{outcome.recipe.name}: {outcome.recipe.title}")
        page.text(f"{outcome.recipe.section}. {settings_line(outcome)}.")
        page.table(*cells(outcome))
        page.picture(folder / outcome.recipe.name / "picture.png", outcome.recipe.title)
        page.table(CLAIMS, claim_cells(outcome))
        if methods := outcome.recipe.scales[outcome.scale].methods:
            page.table(METHODS, list(methods.items()))
        for text in (*doubts(outcome), outcome.recipe.notes):
            page.text(text)
    path = folder / "report.html"
    page.write(path)
    return path
