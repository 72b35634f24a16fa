"""The trees of a plan's streams for people: as text, as facts for JSON and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelpatch.errors import ModelpatchError, require


@dataclass(frozen=True)
class Branch:
    """A run of the links `[span[0], span[1])` on one `stream`, the tasks whose heads read its output, and what follows.

    `others` are the streams that it is concatenated with. The images themselves are a branch without links.
    """

    name: str
    stream: int
    rows: int
    flops: int = 0
    own: bool = False
    others: tuple[int, ...] = ()
    span: tuple[int, int] = (0, 0)
    tasks: Sequence[str] = ()
    children: Sequence["Branch"] = ()

    def facts(self, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The branch and all that follows as nested facts for JSON, with the `names` of every task."""
        return {
            "name": self.name,
            "images": self.rows,
            "flops": self.flops,
            "own": self.own,
            "tasks": [name for task in self.tasks for name in names[task]],
            "children": [child.facts(names) for child in self.children],
        }

    def outline(self, indent: str = "") -> Iterator[str]:
        """The lines of the tree below the branch, with the operations of every run."""
        entries: list[Branch | Sequence[str]] = [*self.children, *([self.tasks] if self.tasks else [])]
        for number, entry in enumerate(entries):
            corner, bar = ("└─ ", "   ") if number == len(entries) - 1 else ("├─ ", "│  ")
            if isinstance(entry, Branch):
                facts = [f"{entry.rows} rows", flops_text(entry.flops), *["its own"] * entry.own]
                if entry.others:
                    facts.append(f"concatenated with {', '.join(f's{other}' for other in entry.others)}")
                yield f"{indent}{corner}s{entry.stream}  {entry.name}  ({', '.join(facts)})"
                yield from entry.outline(indent + bar)
            else:
                yield f"{indent}{corner}{'heads' if len(entry) > 1 else 'head'} {', '.join(entry)}"


def flops_text(flops: float) -> str:
    """Operations with a unit: `1.23 GFLOP`."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops:,.0f} FLOP"


def draw(trees: Sequence[Branch], path: str, title: str) -> None:
    """Draw streams from left to right along the chain, a lane a task; what a patch owns is coloured.

    Raises `MissingExtraError` without matplotlib, `ModelpatchError` for a path that cannot be written.
    """
    pictures = require("matplotlib.figure", "plots", "drawing a plan", "matplotlib")
    lanes: dict[int, float] = {}
    labels: list[tuple[float, str]] = []
    roots = [*trees]
    for root in roots:
        _place(root, lanes, labels)
    figure = pictures.Figure(figsize=(10, 1.2 + 0.45 * max(len(labels), 2)), layout="constrained")
    axes = figure.subplots()
    length = 1
    while roots:
        parent = roots.pop()
        roots += parent.children
        for branch in parent.children:
            (start, end), lane = branch.span, lanes[branch.stream]
            length = max(length, end)
            axes.plot([start, start], [lanes[parent.stream], lane], color="0.6", linewidth=1, zorder=1)
            colour = "tab:orange" if branch.own else "tab:blue"
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
        advice = "Use a .png, .svg or .pdf in a folder that exists."
        raise ModelpatchError(f"cannot draw {path}: {error}.", advice) from error


def _place(branch: Branch, lanes: dict[int, float], labels: list[tuple[float, str]]) -> float:
    """Give a stream and all that follow from it a lane; a stream that forks lies in the middle of its branches."""
    below = [_place(child, lanes, labels) for child in branch.children]
    if not below or branch.tasks:
        labels.append((float(len(labels)), ", ".join(branch.tasks)))
        below.append(labels[-1][0])
    lanes[branch.stream] = sum(below) / len(below)
    return lanes[branch.stream]
