"""Profiles, selections, searches and active learning as tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from modelpatch.report.plots import BLUE, GREY, ORANGE, draw_scores, figure
from modelpatch.report.tables import facts_table, new_table, percent

if TYPE_CHECKING:
    from modelpatch.backbone.preprocessing import ImageSource
    from modelpatch.select.active import Curves, Pick
    from modelpatch.select.greedy import Round, Selection
    from modelpatch.select.searching import Proposal, Search
    from modelpatch.select.study import Profile, ProfileRow, Score

PALE = 0.3  # the opacity of what successive halving stopped early
TICKS: dict[str, Any] = {"rotation": 60, "ha": "right", "fontsize": 8}  # style of long names below a picture
SHOWN = 24  # rows of a search's table
Cells = dict[tuple[int, int], tuple[float, float]]  # value and opacity by row and column of a heat map


def accuracy(score: Score | None) -> str:
    """`71.3 ± 0.8`, in percent; a dash where nothing was measured."""
    return percent(score.top1, score.error) if score and score.top1s else percent(None)


def profile_table(profile: Profile) -> Table:
    """A row a unit in the order of the chain, the best one in bold, the linear probe last."""
    notes = [f"{name} left out: {why}" for name, why in profile.skipped.items()]
    notes += [f"{row.name} failed: {row.score.failure}" for row in profile.rows if row.score.failure]
    notes += [str(profile.effect)] if profile.effect else []
    rows = [(row.name, accuracy(row.score), f"{row.parameters:,}", *_costs(row.score)) for row in profile.rows]
    return new_table(
        _title(profile, f" by {profile.kind}"),
        "\n".join(notes),
        texts=("trained",),
        figures=("held-out\ntop-1", "parameters", "file\nbytes", "epochs", "seconds"),
        rows=[*rows, ("linear probe", accuracy(profile.probe), "0", *_costs(profile.probe))],
        bold=[number for number, row in enumerate(profile.rows) if row is profile.best],
    )


def sizes_table(profiles: Sequence[Profile]) -> Table:
    """A row a unit, a column a number of training images; the best of every column in bold, the linear probe last."""
    first = profiles[0]
    table = new_table(
        _title(first, f" by {first.kind}, held-out top-1"),
        texts=("trained",),
        figures=[f"{profile.images:,}\nimages" for profile in profiles],
    )
    for row in first.rows:
        found = [next((own for own in one.rows if own.name == row.name), None) for one in profiles]
        cells = [accuracy(own.score if own else None) for own in found]
        best = [own is not None and own is one.best for own, one in zip(found, profiles, strict=True)]
        table.add_row(escape(row.name), *(f"[b]{c}[/b]" if b else c for c, b in zip(cells, best, strict=True)))
    table.add_row("linear probe", *(accuracy(profile.probe) for profile in profiles))
    return table


def _title(result: Profile | Selection, more: str = "") -> str:
    return f"{result.task} on {result.backbone}: {result.method}{more}"


def _costs(score: Score | None) -> tuple[str, str, str]:
    return (f"{score.file_bytes:,}", str(score.epochs), f"{score.seconds:.1f}") if score else ("", "", "")


def round_table(one: Round, task: str) -> Table:
    """A row a candidate, the best first; those that a limit leaves out say which."""
    taken = "taken" if one.accepted else "not taken: it does not improve enough"
    caption = "no candidate keeps the limits" if one.best is None else f"{one.steps[one.best].block}: {taken}"
    tops = [-2.0 if step.score is None else step.score.top1 for step in one.steps]
    steps = [one.steps[n] for n in sorted(range(len(tops)), key=lambda n: (n != one.best, -tops[n]))]
    return new_table(
        f"{task}, round {one.number}",
        "\n".join([caption, *([str(one.effect)] if one.effect else [])]),
        texts=("block", "left out"),
        figures=("held-out\ntop-1", "file\nbytes", "epochs", "seconds"),
        rows=[(step.block, step.left_out or "", accuracy(step.score), *_costs(step.score)) for step in steps],
        bold=[] if one.best is None else [0],
    )


def selection_table(selection: Selection) -> Table:
    given_up = ""
    if selection.replaced:
        name, score = selection.replaced
        given_up = f"{name}: {accuracy(score)} %; {_winner(selection)} better on the folds"
    rows = [
        ("blocks, in the order chosen", ", ".join(selection.blocks) or "none: the linear probe is best"),
        ("cross-validation", f"{accuracy(selection.score)} %"),
        ("linear probe, same folds", f"{accuracy(selection.probe)} %"),
        *([("all blocks, same folds", f"{accuracy(selection.every)} %")] if selection.every else []),
        *([("all blocks", f"not tried: {selection.every_left_out}")] if selection.every_left_out else []),
        *([("greedy choice, given up", given_up)] if selection.replaced else []),
        ("Theorem 1's bound", str(selection.complexity)),
        *(("given up", reason) for reason in selection.dropped),
        ("test top-1", f"{percent(selection.patch.metrics['test_top1'])} %"),
    ]
    return facts_table(f"{selection.task} on {selection.backbone}", rows)


def _winner(selection: Selection) -> str:
    return "all blocks do" if selection.blocks else "the linear probe does"


def plot_profile(profile: Profile, path: Path) -> None:
    """Bars of accuracy by unit with standard errors and the linear probe as a line; for pairs a heat map."""
    if profile.kind == "pairs":
        _plot_pairs(profile, path)
        return
    rows, probe = profile.rows, profile.probe
    with figure(path, 2 + 0.45 * max(len(rows), 8), 4.5) as axes:
        heights = [100 * max(row.score.top1, 0) for row in rows]
        errors = [100 * (row.score.error or 0) for row in rows]
        colors = [ORANGE if row is profile.best else BLUE for row in rows]
        bars = axes.bar(range(len(rows)), heights, yerr=errors, color=colors, capsize=3)
        pale = [bar for bar, row in zip(bars, rows, strict=True) if _strength(profile, row) < 1]
        for bar in pale:
            bar.set(alpha=PALE, label="fewer epochs" if bar is pale[0] else "")
        axes.axhline(100 * max(probe.top1, 0), color=GREY, linestyle="--", label="linear probe")
        axes.set_xticks(range(len(rows)), [row.name for row in rows], **TICKS)
        tops = [100 * score.top1 for score in (probe, *(row.score for row in rows)) if score.top1s]
        axes.set_ylim(bottom=max(0, min(tops, default=0) - 10))
        axes.set(ylabel="held-out top-1, percent", title=_title(profile))


def _strength(profile: Profile, row: ProfileRow) -> float:
    """The opacity of a unit: pale if successive halving stopped it after fewer epochs."""
    return 1.0 if row.score.epochs == max(one.score.epochs for one in profile.rows) else PALE


def _plot_pairs(profile: Profile, path: Path) -> None:
    """Accuracy of every pair of blocks; the diagonal is empty, and pairs that halving left early are pale."""
    cells: Cells = {}
    for row in profile.rows:
        if row.score.top1s:
            first, second = (profile.blocks.index(block) for block in row.blocks)
            cells[first, second] = cells[second, first] = 100 * row.score.top1, _strength(profile, row)
    count = len(profile.blocks)
    side = 3 + 0.35 * count
    with figure(path, side + 1, side) as axes:
        _draw_cells(axes, cells, (count, count), "held-out top-1, percent", cmap="viridis")
        axes.set_xticks(range(count), profile.blocks, rotation=90, fontsize=7)
        axes.set_yticks(range(count), profile.blocks, fontsize=7)
        axes.set_title(_title(profile, " on pairs"), fontsize=10)


def plot_sizes(profiles: Sequence[Profile], path: Path) -> None:
    """Draw the gain of every unit over the linear probe, one row per number of training images, a dot on the best.

    Units that halving left early are pale.
    """
    names = [row.name for row in profiles[0].rows]
    cells = {
        (number, names.index(row.name)): (100 * (row.score.top1 - profile.probe.top1), _strength(profile, row))
        for number, profile in enumerate(profiles)
        for row in profile.rows
        if row.score.top1s
    }
    reach = max((abs(gain) for gain, _ in cells.values()), default=0.0) or 1.0
    with figure(path, 3 + 0.45 * max(len(names), 8), 2.4 + 0.45 * len(profiles)) as axes:
        style = {"cmap": "RdBu", "vmin": -reach, "vmax": reach, "aspect": "auto"}
        _draw_cells(axes, cells, (len(profiles), len(names)), "points over the linear probe", **style)
        for number, profile in enumerate(profiles):
            if (best := profile.best) is not None:
                axes.plot(names.index(best.name), number, "o", color="black", markersize=5)
        axes.set_xticks(range(len(names)), names, **TICKS)
        axes.set_yticks(range(len(profiles)), [f"{profile.images:,}" for profile in profiles])
        axes.set(ylabel="training images")
        axes.set_title(_title(profiles[0], "; dot: the best"), fontsize=10)


def _draw_cells(axes: Any, cells: Cells, shape: tuple[int, int], label: str, **style: Any) -> None:
    """Draw a heat map of the cells that are there, with a bar of its colours."""
    found = [[cells.get((row, column), (math.nan, 1.0)) for column in range(shape[1])] for row in range(shape[0])]
    values, strengths = ([[one[part] for one in line] for line in found] for part in (0, 1))
    axes.figure.colorbar(axes.imshow(values, alpha=strengths, **style), label=label)


def plot_order(selection: Selection, path: Path) -> None:
    """Draw the round of each chosen block (SubTuning's Figure 5), and the accuracy of every round."""
    with figure(path, 10, 4.5, columns=2) as (left, right):
        blocks = [step.block for step in selection.rounds[0].steps] if selection.rounds else []
        best = {one.number: one.steps[one.best] for one in selection.rounds if one.best is not None}
        chosen = {one.number: blocks.index(best[one.number].block) for one in selection.rounds if one.accepted}
        left.scatter(chosen.values(), chosen.keys(), color=BLUE, s=60)
        left.set_xticks(range(len(blocks)), blocks, **TICKS)
        if not chosen:
            left.text(0.5, 0.5, "no round took a block", ha="center", transform=left.transAxes, color=GREY)
        left.set(ylabel="round", title="chosen block", ylim=(0.5, len(selection.rounds) + 0.5))
        left.set_yticks([one.number for one in selection.rounds])
        scores = [step.score for step in best.values()]
        draw_scores(right, list(best), [(one.top1, one.error) if one else (0, 0) for one in scores], color=BLUE)
        right.axhline(100 * selection.probe.top1, color=GREY, linestyle="--", label="linear probe")
        if selection.every is not None:
            right.axhline(100 * selection.every.top1, color=ORANGE, linestyle=":", label="all blocks")
        right.set(xlabel="round", ylabel="held-out top-1, percent", title="best candidate", xticks=list(best))
        given_up = f"\ngiven up: {_winner(selection)} better on the folds" if selection.replaced else ""
        left.figure.suptitle(_title(selection, given_up))


def search_table(search: Search) -> Table:
    """A row a proposal, the longest trained and best first; the chosen one in bold, those of the Pareto front with a star."""
    front = {id(one) for one in search.front}
    notes = [str(search.effect)] if search.effect else []
    notes += [f"given up: {reason}" for reason in search.dropped]
    if search.chosen is not search.best:
        error = f"{100 * search.error:.1f} points"
        notes.append(f"{search.best.name} is more accurate by less than its error of {error}; --margin 0 takes it")
    shown = search.proposals[:SHOWN]
    rows = [
        (one.candidate.name, accuracy(one.score), f"{one.score.file_bytes:,}", f"{100 * one.latency:.1f}",
         str(one.score.epochs), "*" if id(one) in front else "")
        for one in shown
    ]  # fmt: skip
    return new_table(
        f"{search.task} on {search.backbone}",
        "\n".join(notes),
        texts=("proposal",),
        figures=("held-out\ntop-1", "file\nbytes", "added\ntime, %", "epochs", "Pareto"),
        rows=rows,
        bold=[number for number, one in enumerate(shown) if one.candidate is search.chosen],
    )


def left_out_table(search: Search) -> Table:
    """A row a proposal that was not trained, with the reason; where there are many the JSON has them all."""
    more = len(search.left_out) - SHOWN
    caption = f"and {more} more, see --json" if more > 0 else ""
    rows = list(search.left_out.items())[:SHOWN]
    return new_table("left out before training", caption, texts=("proposal", "reason"), rows=rows)


def plot_search(search: Search, path: Path) -> None:
    """Accuracy against bytes (log), the added time as colour; the Pareto front is joined, the limits are lines."""
    slowest = max(1, *(100 * one.latency for one in search.proposals))
    with figure(path, 9, 5.5) as axes:
        for kept, marker, label in ((False, "x", "given up early"), (True, "o", "trained to the end")):
            if chosen := [one for one in search.proposals if one.kept is kept]:
                colors = {"c": [100 * one.latency for one in chosen], "vmin": 0, "vmax": slowest, "cmap": "viridis"}
                points = axes.scatter(*_places(chosen), marker=marker, label=label, **colors)
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linewidth": 1, "zorder": 0}
        label = "Pareto front in accuracy, bytes and time"
        front = sorted(search.front, key=lambda one: one.score.file_bytes)
        axes.plot(*_places(front), color=ORANGE, label=label, **ring)
        if search.budget.bytes is not None:
            axes.axvline(search.budget.bytes / 1000, color=GREY, linestyle="--", label="limit of bytes")
        axes.set(xlabel="patch file, kB (log)", ylabel="held-out top-1, percent")
        axes.set(xscale="log", title=f"{search.task} on {search.backbone}")
        bar = axes.figure.colorbar(points, label="added time, percent of the base's")
        if search.budget.latency is not None and 100 * search.budget.latency <= slowest:
            bar.ax.axhline(100 * search.budget.latency, color=ORANGE, linewidth=2)
            bar.set_label("added time, percent of the base's; orange: limit")
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)


def _places(proposals: Sequence[Proposal]) -> tuple[list[float], list[float]]:
    """Kilobytes and accuracies in percent."""
    return [one.score.file_bytes / 1000 for one in proposals], [100 * one.score.top1 for one in proposals]


def picks_table(picks: Sequence[Pick], names: Sequence[str]) -> Table:
    """The images to label next, the least sure first."""
    rows = [(names[one.position], f"{one.first} and {one.second}", f"{one.margin:.3f}") for one in picks]
    return new_table("label next", texts=("image", "between"), figures=("margin",), rows=rows)


def curves_table(curves: Curves) -> Table:
    """Accuracy by number of labels and strategy."""
    rows = []
    for row, count in enumerate(curves.labels):
        cells = [
            percent(curves.mean(name)[row], curves.error(name)[row] if len(values) > 1 else None)
            for name, values in curves.top1s.items()
        ]
        rows.append((f"{count:,}", *cells))
    title = f"{curves.task} on {curves.backbone}: {curves.method}"
    return new_table(title, figures=("labels", *(f"{name}\ntop-1" for name in curves.top1s)), rows=rows)


def plot_curves(curves: Curves, path: Path) -> None:
    """Test accuracy against labels, a line a strategy with standard errors."""
    with figure(path, 6.5, 4.5) as axes:
        for name, color in zip(curves.top1s, (BLUE, ORANGE), strict=True):
            scores = zip(curves.mean(name), curves.error(name), strict=True)
            draw_scores(axes, curves.labels, scores, color=color, label=name)
        axes.set(xlabel="labelled images", ylabel="test top-1, percent", title=f"{curves.task} on {curves.backbone}")


def contact_sheet(picks: Sequence[Pick], images: Sequence[ImageSource], path: Path) -> None:
    """The picked images in rows of eight, with rank, margin and the two classes below each.

    Raises `ModelpatchError` where the picture cannot be written.
    """
    from modelpatch.backbone.preprocessing import open_image
    from modelpatch.report.sheets import Section, Tile, draw_sheet, write_picture

    tiles = [
        Tile(open_image(images[one.position]), [f"{rank}: {one.margin:.3f}", f"{one.first} / {one.second}"])
        for rank, one in enumerate(picks, 1)
    ]
    write_picture(draw_sheet([Section("", tiles)]), path)
