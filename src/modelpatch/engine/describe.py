"""A plan's steps for people: a tree of streams as text, as facts for JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modelpatch.engine.steps import HeadStep, PoolStep, Roots, RunStep, Step, reads, run_flops
from modelpatch.errors import MissingExtraError, ModelpatchError


@dataclass(frozen=True)
class Branch:
    """A run on one of its streams: `stream` is its output, `others` are the streams it is concatenated with."""

    run: RunStep
    stream: int
    rows: int
    flops: int
    others: tuple[int, ...]


def branches(steps: Sequence[Step]) -> dict[int, list[Branch]]:
    """The runs that read every stream."""
    ways: dict[int, list[Branch]] = {}
    for run in (step for step in steps if isinstance(step, RunStep)):
        for place, (source, stream) in enumerate(zip(run.inputs, run.outputs, strict=True)):
            others = tuple(other for other in run.outputs if other != stream)
            branch = Branch(run, stream, run.sizes[place], run_flops(run, place), others)
            ways.setdefault(source.stream, []).append(branch)
    return ways


def answers(steps: Sequence[Step]) -> dict[int, list[str]]:
    """The tasks whose heads read every stream, pooled or as it is."""
    pooled = {step.output: step.stream for step in steps if isinstance(step, PoolStep)}
    found: dict[int, list[str]] = {}
    for step in steps:
        if isinstance(step, HeadStep):
            for stream in dict.fromkeys(pooled.get(stream, stream) for stream in reads(step)):
                names = found.setdefault(stream, [])
                names += [name for name in step.members if name not in names]
    return found


def outline(roots: Roots, steps: Sequence[Step]) -> Iterator[str]:
    """The lines of the tree of streams with the operations of every run."""
    ways, heads = branches(steps), answers(steps)
    for root, stream, rows in roots:
        size = getattr(root, "image_size", None)
        yield f"{len(rows)} images" + (f" at {size} px" if size else "")
        yield from _below(stream, ways, heads, "")


def _below(stream: int, ways: dict[int, list[Branch]], heads: dict[int, list[str]], indent: str) -> Iterator[str]:
    entries: list[Any] = [*ways.get(stream, []), *([heads[stream]] if stream in heads else [])]
    for number, entry in enumerate(entries):
        corner, bar = ("└─ ", "   ") if number == len(entries) - 1 else ("├─ ", "│  ")
        if isinstance(entry, Branch):
            facts = [f"{entry.rows} rows", flops_text(entry.flops)]
            facts += ["its own"] if entry.run.own else []
            facts += [f"concatenated with {', '.join(f's{other}' for other in entry.others)}"] if entry.others else []
            yield f"{indent}{corner}s{entry.stream}  {entry.run.name}  ({', '.join(facts)})"
            yield from _below(entry.stream, ways, heads, indent + bar)
        else:
            yield f"{indent}{corner}{'heads' if len(entry) > 1 else 'head'} {', '.join(entry)}"


def tree(roots: Roots, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The tree of streams as nested facts for JSON: a node an image size, below it one a run, with its tasks."""
    ways, heads = branches(steps), answers(steps)

    def below(stream: int) -> list[dict[str, Any]]:
        return [
            {
                "name": branch.run.name,
                "images": branch.rows,
                "flops": branch.flops,
                "own": branch.run.own,
                "tasks": heads.get(branch.stream, []),
                "children": below(branch.stream),
            }
            for branch in ways.get(stream, [])
        ]

    return [
        {
            "name": f"images at {root.image_size} px" if hasattr(root, "image_size") else "images",
            "images": len(rows),
            "flops": 0,
            "own": False,
            "tasks": heads.get(stream, []),
            "children": below(stream),
        }
        for root, stream, rows in roots
    ]


def describe_step(step: Step) -> str:
    """One line on what a step does."""
    if isinstance(step, RunStep):
        name = step.name
        together = f", {len(step.outputs)} streams concatenated" if len(step.outputs) > 1 else ""
        return f"{name} -> {', '.join(f's{stream}' for stream in step.outputs)} ({sum(step.sizes)} rows{together})"
    if isinstance(step, PoolStep):
        return f"pool s{step.stream}"
    return f"{'heads' if len(step.members) > 1 else 'head'} {', '.join(step.members)}"


def flops_text(flops: float) -> str:
    """Operations with a unit: `1.23 GFLOP`."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops:,.0f} FLOP"


def draw(roots: Roots, steps: Sequence[Step], path: str, title: str) -> None:
    """Streams from left to right along the chain, a lane a task; what a patch owns is coloured.

    Raises `MissingExtraError` without matplotlib, `ModelpatchError` for a path that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "drawing a plan") from error
    ways, heads = branches(steps), answers(steps)
    lanes: dict[int, float] = {}
    labels: list[tuple[float, str]] = []
    for _, stream, _ in roots:
        _place(stream, ways, heads, lanes, labels)
    length = max((link.span[1] for step in steps if isinstance(step, RunStep) for link in step.links), default=1)
    figure = Figure(figsize=(10, 1.2 + 0.45 * max(len(labels), 2)), layout="constrained")
    axes = figure.subplots()
    for source, found in ways.items():
        for branch in found:
            start, end = branch.run.links[0].span[0], branch.run.links[-1].span[1]
            lane = lanes[branch.stream]
            axes.plot([start, start], [lanes[source], lane], color="0.6", linewidth=1, zorder=1)
            colour = "tab:orange" if branch.run.own else "tab:blue"
            axes.barh(lane, end - start - 0.1, left=start + 0.05, height=0.6, color=colour, zorder=2)
            for other in branch.others:
                axes.plot([start + 0.3] * 2, [lane, lanes[other]], color="black", linestyle=":", zorder=3)
    for lane, label in labels:
        axes.text(length + 0.2, lane, label, va="center", fontsize=9)
    axes.set(
        xlim=(-0.2, length + 4),
        xlabel="segment of the chain",
        yticks=[],
        title=f"{title}\nblue: the backbone's, orange: a patch's own, dotted: concatenated",
    )
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ModelpatchError(
            f"cannot draw {path}: {error}. Use a .png, .svg or .pdf in a folder that exists."
        ) from error


def _place(
    stream: int,
    ways: dict[int, list[Branch]],
    heads: dict[int, list[str]],
    lanes: dict[int, float],
    labels: list[tuple[float, str]],
) -> float:
    """Give a stream and all that follow from it a lane; a stream that forks lies in the middle of its branches."""
    below = [_place(branch.stream, ways, heads, lanes, labels) for branch in ways.get(stream, [])]
    if not below or stream in heads:
        labels.append((float(len(labels)), ", ".join(heads.get(stream, []))))
        below.append(labels[-1][0])
    lanes[stream] = sum(below) / len(below)
    return lanes[stream]
