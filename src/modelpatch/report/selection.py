"""Profiles, rounds of a selection and searches as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from modelpatch.report.plots import BLUE, GREY, ORANGE, figure
from modelpatch.report.tables import NAME_WIDTH, new_table, percent
from modelpatch.select.greedy import Round, Selection
from modelpatch.select.profiling import Profile, ProfileRow
from modelpatch.select.study import Score


def accuracy(score: Score | None) -> str:
    """`71.3 ± 0.8`, in percent; a dash where nothing was measured."""
    if score is None or not score.top1s:
        return "–"
    return percent(score.top1) + ("" if score.error is None else f" ± {percent(score.error)}")


def profile_table(profile: Profile) -> Table:
    """A row a unit in the order of the chain, the best one in bold, the linear probe last."""
    notes = [f"{name} left out: {why}" for name, why in profile.skipped.items()]
    notes += [f"{row.name} failed: {row.score.failure}" for row in profile.rows if row.score.failure]
    notes += [str(profile.effect)] if profile.effect else []
    table = new_table(
        f"{profile.task} on {profile.backbone}: {profile.method} by {profile.kind}",
        "\n".join(notes),
        texts=("trained",),
        figures=("held-out\ntop-1", "parameters", "file\nbytes", "epochs", "seconds"),
    )
    for row in profile.rows:
        bold = "[b]{}[/b]" if row is profile.best else "{}"
        table.add_row(
            bold.format(escape(row.name)), bold.format(accuracy(row.score)), f"{row.parameters:,}", *_costs(row.score)
        )
    table.add_row("linear probe", accuracy(profile.probe), "0", *_costs(profile.probe))
    return table


def sizes_table(profiles: Sequence[Profile]) -> Table:
    """A row a unit, a column a number of training images; the best of every column in bold, the linear probe last."""
    first = profiles[0]
    table = new_table(f"{first.task} on {first.backbone}: {first.method} by {first.kind}, held-out top-1")
    table.add_column("trained", overflow="fold", min_width=NAME_WIDTH)
    for profile in profiles:
        table.add_column(f"{profile.images:,}\nimages", justify="right", no_wrap=True)
    for row in first.rows:
        found = [(one, next((r for r in one.rows if r.name == row.name), None)) for one in profiles]
        cells = [accuracy(own.score if own else None) for _, own in found]
        best = [own is not None and own is one.best for one, own in found]
        table.add_row(escape(row.name), *(f"[b]{c}[/b]" if b else c for c, b in zip(cells, best, strict=True)))
    table.add_row("linear probe", *(accuracy(profile.probe) for profile in profiles))
    return table


def _costs(score: Score) -> tuple[str, str, str]:
    return f"{score.file_bytes:,}", str(score.epochs), f"{score.seconds:.1f}"


def round_table(one: Round, task: str) -> Table:
    """A row a candidate, the best first; those that a limit leaves out say which."""
    taken = "taken" if one.accepted else "not taken: it does not improve enough"
    caption = "no candidate keeps the limits" if one.best is None else f"{one.steps[one.best].block}: {taken}"
    table = new_table(
        f"{task}, round {one.number}",
        "\n".join([caption, *([str(one.effect)] if one.effect else [])]),
        texts=("block",),
        figures=("held-out\ntop-1", "file\nbytes", "epochs", "seconds"),
    )
    table.add_column("left out", overflow="fold")
    order = sorted(range(len(one.steps)), key=lambda n: (n != one.best, -_top1(one.steps[n].score)))
    for n in order:
        step = one.steps[n]
        bold = "[b]{}[/b]" if n == one.best else "{}"
        costs = _costs(step.score) if step.score else ("", "", "")
        table.add_row(
            bold.format(escape(step.block)), bold.format(accuracy(step.score)), *costs, escape(step.left_out or "")
        )
    return table


def _top1(score: Score | None) -> float:
    return -2.0 if score is None else score.top1


def selection_table(selection: Selection) -> Table:
    """The choice and its scores."""
    table = new_table(f"{selection.task} on {selection.backbone}", header=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", overflow="fold")
    rows = [
        ("blocks, in the order chosen", ", ".join(selection.blocks) or "none: the linear probe is best"),
        ("cross-validation", f"{accuracy(selection.score)} %"),
        ("linear probe, same folds", f"{accuracy(selection.probe)} %"),
        *([("all blocks, same folds", f"{accuracy(selection.every)} %")] if selection.every else []),
        *([("all blocks", f"not tried: {selection.every_left_out}")] if selection.every_left_out else []),
        *([("greedy choice, given up", _replaced(selection))] if selection.replaced else []),
        ("Theorem 1's bound", str(selection.complexity)),
        *(("given up", reason) for reason in selection.dropped),
        ("test top-1", f"{percent(selection.patch.metrics['test_top1'])} %"),
    ]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def _replaced(selection: Selection) -> str:
    """The greedy choice, and the end that scored better."""
    assert selection.replaced is not None
    name, score = selection.replaced
    return f"{name}: {accuracy(score)} %; {_winner(selection)} better on the folds"


def _winner(selection: Selection) -> str:
    return "all blocks do" if selection.blocks else "the linear probe does"


def plot_profile(profile: Profile, path: Path) -> None:
    """Bars of accuracy by unit with standard errors and the linear probe as a line; for pairs a heat map."""
    if profile.kind == "pairs":
        _plot_pairs(profile, path)
        return
    with figure(path, 2 + 0.45 * max(len(profile.rows), 8), 4.5) as axes:
        best = profile.best
        places = range(len(profile.rows))
        bars = axes.bar(
            places,
            [100 * max(row.score.top1, 0) for row in profile.rows],
            yerr=[100 * (row.score.error or 0) for row in profile.rows],
            color=[ORANGE if row is best else BLUE for row in profile.rows],
            capsize=3,
        )
        for bar, row in zip(bars, profile.rows, strict=True):
            if (strength := _strength(profile, row)) < 1:
                bar.set(alpha=strength, label="fewer epochs")
        axes.axhline(100 * max(profile.probe.top1, 0), color=GREY, linestyle="--", label="linear probe")
        axes.set_xticks(places, [row.name for row in profile.rows], rotation=60, ha="right", fontsize=8)
        tops = [100 * score.top1 for score in (profile.probe, *(row.score for row in profile.rows)) if score.top1s]
        axes.set_ylim(bottom=max(0, min(tops, default=0) - 10))
        axes.set(ylabel="held-out top-1, percent", title=f"{profile.task} on {profile.backbone}: {profile.method}")
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        axes.legend(once.values(), once.keys(), frameon=False)


def _strength(profile: Profile, row: ProfileRow) -> float:
    """The opacity of a unit: pale if successive halving stopped it after fewer epochs."""
    return 1.0 if row.score.epochs == max(one.score.epochs for one in profile.rows) else 0.3


def _plot_pairs(profile: Profile, path: Path) -> None:
    """Accuracy of every pair of blocks; the diagonal is empty, and pairs that halving left early are pale."""
    count = len(profile.blocks)
    cells = [[float("nan")] * count for _ in range(count)]
    shown = [[1.0] * count for _ in range(count)]
    for row in profile.rows:
        if row.score.top1s:
            first, second = (profile.blocks.index(block) for block in row.blocks)
            cells[first][second] = cells[second][first] = 100 * row.score.top1
            shown[first][second] = shown[second][first] = _strength(profile, row)
    side = 3 + 0.35 * count
    with figure(path, side + 1, side) as axes:
        image = axes.imshow(cells, cmap="viridis", alpha=shown)
        axes.set_xticks(range(count), profile.blocks, rotation=90, fontsize=7)
        axes.set_yticks(range(count), profile.blocks, fontsize=7)
        axes.set_title(f"{profile.task} on {profile.backbone}: {profile.method} on pairs", fontsize=10)
        axes.figure.colorbar(image, shrink=0.7, label="held-out top-1, percent")


def plot_sizes(profiles: Sequence[Profile], path: Path) -> None:
    """Draw the gain of every unit over the linear probe, one row per number of training images, a dot on the best.

    Units that halving left early are pale.
    """
    names = [row.name for row in profiles[0].rows]
    cells = [[float("nan")] * len(names) for _ in profiles]
    shown = [[1.0] * len(names) for _ in profiles]
    for line, strengths, profile in zip(cells, shown, profiles, strict=True):
        for row in profile.rows:
            if row.score.top1s:
                line[names.index(row.name)] = 100 * (row.score.top1 - profile.probe.top1)
                strengths[names.index(row.name)] = _strength(profile, row)
    reach = max((abs(cell) for line in cells for cell in line if cell == cell), default=0.0) or 1.0
    with figure(path, 3 + 0.45 * max(len(names), 8), 2.4 + 0.45 * len(profiles)) as axes:
        image = axes.imshow(cells, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", alpha=shown)
        for number, profile in enumerate(profiles):
            if (best := profile.best) is not None:
                axes.plot(names.index(best.name), number, "o", color="black", markersize=5)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(profiles)), [f"{profile.images:,}" for profile in profiles])
        axes.set(ylabel="training images")
        axes.set_title(
            f"{profiles[0].task} on {profiles[0].backbone}: {profiles[0].method}; dot: the best", fontsize=10
        )
        axes.figure.colorbar(image, label="points over the linear probe")


def plot_order(selection: Selection, path: Path) -> None:
    """Draw the round of each chosen block (SubTuning's Figure 5), and the accuracy of every round.

    If no round took a block, the left picture says so.
    """
    with figure(path, 10, 4.5, columns=2) as (left, right):
        blocks = [step.block for step in selection.rounds[0].steps] if selection.rounds else []
        rounds = [one for one in selection.rounds if one.accepted and one.best is not None]
        chosen = [one.steps[one.best].block for one in rounds if one.best is not None]
        left.scatter([blocks.index(block) for block in chosen], [one.number for one in rounds], color=BLUE, s=60)
        left.set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", fontsize=7)
        if not chosen:
            left.text(0.5, 0.5, "no round took a block", ha="center", transform=left.transAxes, color=GREY)
        left.set(ylabel="round", title="chosen block", ylim=(0.5, len(selection.rounds) + 0.5))
        left.set_yticks([one.number for one in selection.rounds])
        numbers = [one.number for one in selection.rounds if one.best is not None]
        scores = [one.steps[one.best].score for one in selection.rounds if one.best is not None]
        errors = [100 * (score.error or 0) if score else 0 for score in scores]
        right.errorbar(
            numbers, [100 * score.top1 if score else 0 for score in scores], errors, color=BLUE, marker="o", capsize=3
        )
        right.axhline(100 * selection.probe.top1, color=GREY, linestyle="--", label="linear probe")
        if selection.every is not None:
            right.axhline(100 * selection.every.top1, color=ORANGE, linestyle=":", label="all blocks")
        right.set(xlabel="round", ylabel="held-out top-1, percent", title="best candidate")
        right.set_xticks(numbers)
        right.legend(frameon=False)
        title = f"{selection.task} on {selection.backbone}: {selection.method}"
        if selection.replaced is not None:
            title += f"\ngiven up: {_winner(selection)} better on the folds"
        left.figure.suptitle(title)
