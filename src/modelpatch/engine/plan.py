"""Plans: which modules run on which streams so that many patches cost what differs between them.

    image ─ stem ─ block 1 ─┬─ block 2 (flowers) ──┐
                            └─ block 2 ─┬──────────┴─ block 3  both streams, concatenated ─┬─ head flowers
                                        └──────────────────────────────────────────────────┴─ heads birds, base

A *stream* is one activation on its way through the chain; two patches with the same history are one stream. Where several
meet the same module, they are concatenated along the batch axis if that pays, and split again after it (SubTuning, section
on inference). What is computed is the set of distinct (history, module) pairs, each on the rows that a task wants.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Protocol

from torch import Tensor, nn

from modelpatch.engine.describe import Branch, draw, flops_text
from modelpatch.heads.reading import Read, Stream
from modelpatch.text import count_of

Rows = tuple[int, ...]  # of the batch, in order
Batches = Mapping[Hashable, Tensor]  # images by root


class Link(Protocol):
    """One module of a patch's path: it stands for the segments `[span[0], span[1])`.

    `own` is True for a patch's variant and False for a segment of the backbone, `nbytes` are the bytes of the tensors that it
    reads and `output_bytes` those of its output for an image. `key` is equal for links that compute the same, `macs` are
    multiply-adds an image.
    """

    span: tuple[int, int]
    name: str
    own: bool
    nbytes: int
    output_bytes: int

    @property
    def key(self) -> str: ...

    @property
    def macs(self) -> int: ...

    def copy(self) -> nn.Module:
        """The module by itself in eval mode, over the frozen tensors."""
        ...


Pays = Callable[[Link, Sequence[int]], bool]


@dataclass(frozen=True)
class Take:
    """Rows of a stream, as places in it; None takes them all."""

    stream: int
    places: Rows | None = None


@dataclass(frozen=True)
class RunStep:
    """Run links one after another on the concatenated `inputs`; every input has its own output stream.

    `sizes` are the rows of the inputs, `scale` their pixels over the backbone's own.
    """

    links: tuple[Link, ...]
    inputs: tuple[Take, ...]
    outputs: tuple[int, ...]
    sizes: tuple[int, ...]
    scale: float = 1.0
    frees: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The names of its first and last link."""
        first, last = self.links[0], self.links[-1]
        return first.name if first is last else f"{first.name} ... {last.name}"

    def flops(self, place: int) -> int:
        """Floating point operations on one of its inputs."""
        return sum(round(2 * link.macs * self.sizes[place] * self.scale) for link in self.links)


@dataclass(frozen=True)
class PoolStep:
    """Pool the output of segment `tap` for heads that read it."""

    tap: int
    stream: int
    output: int
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeadStep:
    """The heads of `members`. Each reads its `takes`; several members are linear heads that read one stream."""

    members: tuple[str, ...]
    takes: tuple[tuple[Take, ...], ...]
    frees: tuple[int, ...] = ()


Step = RunStep | PoolStep | HeadStep


def reads(step: Step) -> tuple[int, ...]:
    """The streams a step reads."""
    if isinstance(step, PoolStep):
        return (step.stream,)
    takes = step.inputs if isinstance(step, RunStep) else chain.from_iterable(step.takes)
    return tuple(dict.fromkeys(take.stream for take in takes))


def describe_step(step: Step) -> str:
    """One line on what a step does."""
    if isinstance(step, RunStep):
        together = f", {len(step.outputs)} streams concatenated" if len(step.outputs) > 1 else ""
        return f"{step.name} -> {', '.join(f's{stream}' for stream in step.outputs)} ({sum(step.sizes)} rows{together})"
    if isinstance(step, PoolStep):
        return f"pool s{step.stream}"
    return f"{'heads' if len(step.members) > 1 else 'head'} {', '.join(step.members)}"


@dataclass(frozen=True)
class PlannedTask:
    """A task in a plan: the links that cover the chain, and the reads of its head.

    Tasks of one `root` see the same pixels; those of one `shape` have activations that may be concatenated, and `scale` is
    their number of pixels over the backbone's own, by which operations and bytes grow. A head without `reads` reads the last
    output of the `path`; reads of the base follow `beside`, the base's own links. Heads that are `linear` can be one matrix
    product.
    """

    name: str
    path: tuple[Link, ...]
    root: Hashable = None
    shape: Hashable = None
    scale: float = 1.0
    reads: tuple[Read, ...] = ()
    linear: bool = True
    beside: tuple[Link, ...] = ()

    @property
    def inputs(self) -> tuple[Read, ...]:
        """The reads of the head, at least one."""
        return self.reads or (Read(self.path[-1].span[1] - 1),)

    @property
    def walks(self) -> dict[Stream, tuple[Link, ...]]:
        """The links of the patch's and of the base's stream up to the last segment that the head reads of it."""
        walks: dict[Stream, tuple[Link, ...]] = {"patch": self.path, "base": self.beside}
        for of, links in walks.items():
            end = max((read.segment + 1 for read in self.inputs if read.of == of), default=0)
            walks[of] = tuple(link for link in links if link.span[1] <= end)
        return walks


@dataclass(frozen=True)
class Plan:
    """Steps in order. `roots` are the streams of the images: preprocessing, number and rows. `notes` end its text."""

    steps: tuple[Step, ...]
    roots: tuple[tuple[Hashable, int, Rows], ...]
    members: tuple[PlannedTask, ...]
    rows: tuple[Rows, ...]
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Floating point operations of all links for the batch, heads left out."""
        return sum(step.flops(place) for step in self.runs for place in range(len(step.sizes)))

    @property
    def floor(self) -> int:
        """The operations of the distinct (history, module) pairs, each on the rows asked for: nothing can cost less."""
        return _operations(self.members, self.rows)

    @property
    def separate_flops(self) -> int:
        """The operations of the members one after another, each alone."""
        return sum(_operations([member], [rows]) for member, rows in zip(self.members, self.rows, strict=True))

    @cached_property
    def shared(self) -> float:
        """The share of the separate operations that the plan saves, in [0, 1]."""
        return 1 - self.flops / self.separate_flops if self.separate_flops else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of all modules that the plan reads, and of the streams that are alive at once at its peak."""
        links = {link.key: link.nbytes for step in self.runs for link in step.links}
        return sum(links.values()) + self.activation_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of the streams between steps at the peak, images and heads left out."""
        held: dict[int, int] = {}
        peak = 0
        for step in self.steps:
            if isinstance(step, RunStep):
                outputs = zip(step.outputs, step.sizes, strict=True)
                held |= {stream: round(rows * step.scale) * step.links[-1].output_bytes for stream, rows in outputs}
            peak = max(peak, sum(held.values()))
            for stream in step.frees:
                held.pop(stream, None)
        return peak

    @property
    def runs(self) -> Iterator[RunStep]:
        return (step for step in self.steps if isinstance(step, RunStep))

    def trees(self) -> list[Branch]:
        """The trees of streams, one for every root."""
        ways: dict[int, list[tuple[RunStep, int]]] = {}
        pooled = {step.output: step.stream for step in self.steps if isinstance(step, PoolStep)}
        heads: dict[int, list[str]] = {}
        for step in self.steps:
            if isinstance(step, RunStep):
                for place, source in enumerate(step.inputs):
                    ways.setdefault(source.stream, []).append((step, place))
            elif isinstance(step, HeadStep):
                for stream in dict.fromkeys(pooled.get(stream, stream) for stream in reads(step)):
                    names = heads.setdefault(stream, [])
                    names += [name for name in step.members if name not in names]

        def follow(before: int) -> list[Branch]:
            found = []
            for run, place in ways.get(before, []):
                stream, span = run.outputs[place], (run.links[0].span[0], run.links[-1].span[1])
                others = tuple(other for other in run.outputs if other != stream)
                own, rows, flops = any(link.own for link in run.links), run.sizes[place], run.flops(place)
                tasks, children = heads.get(stream, []), follow(stream)
                found.append(Branch(run.name, stream, rows, flops, own, others, span, tasks, children))
            return found

        trees = []
        for root, stream, rows in self.roots:
            name = f"images at {root.image_size} px" if hasattr(root, "image_size") else "images"
            trees.append(Branch(name, stream, len(rows), tasks=heads.get(stream, []), children=follow(stream)))
        return trees

    def __str__(self) -> str:
        images = max((len(rows) for rows in self.rows), default=0)
        count, size = count_of(len(self.members), "task"), self.bytes / 1e6
        lines = [f"{count}, up to {images} images each: {self._saving}; {size:.1f} MB of weights and activations"]
        for tree in self.trees():
            lines += [f"{tree.rows} {tree.name}", *tree.outline()]
        return "\n".join([*lines, *self.notes])

    def draw(self, path: str) -> None:
        """Draw the plan as a tree of streams into a picture (.png, .svg, .pdf). Needs matplotlib."""
        draw(self.trees(), path, self._saving)

    @property
    def _saving(self) -> str:
        separate = flops_text(self.separate_flops)
        return f"{flops_text(self.flops)} instead of {separate} one after another ({self.shared:.0%} shared)"


@dataclass(eq=False)
class _Stream:
    """A history: the link that ends it after its parent's, None at a root."""

    number: int
    parent: "_Stream | None"
    link: Link | None
    shape: Hashable
    scale: float
    rows: set[int] = field(default_factory=set)

    def places(self, rows: set[int]) -> Rows | None:
        """The places of `rows` in this stream's own; None for all of them."""
        if len(rows) == len(self.rows):
            return None
        own = {row: place for place, row in enumerate(sorted(self.rows))}
        return tuple(own[row] for row in sorted(rows))


Histories = dict[tuple[_Stream | None, Hashable], _Stream]  # by parent and link, or by root


def _histories(members: Sequence[PlannedTask], rows: Sequence[Rows]) -> tuple[Histories, list[list[_Stream]]]:
    """The distinct histories, each after its parent, and those that every member's head reads."""
    known: Histories = {}
    read: list[list[_Stream]] = []
    for member, wanted in zip(members, rows, strict=True):
        passed: dict[Stream, dict[int, _Stream]] = {"patch": {}, "base": {}}
        for of, links in member.walks.items():
            stream: _Stream | None = None
            for link in (None, *links) if links else ():
                turn = stream, member.root if link is None else (link.span, link.key)
                if turn not in known:
                    known[turn] = _Stream(len(known), stream, link, member.shape, member.scale)
                stream = known[turn]
                stream.rows.update(wanted)
                if link is not None:
                    passed[of][link.span[1] - 1] = stream
        read.append([passed[one.of][one.segment] for one in member.inputs])
    return known, read


def _operations(members: Sequence[PlannedTask], rows: Sequence[Rows]) -> int:
    streams = _histories(members, rows)[0].values()
    return sum(round(2 * one.link.macs * len(one.rows) * one.scale) for one in streams if one.link is not None)


def make_plan(members: Sequence[PlannedTask], rows: Sequence[Rows], pays: Pays = lambda link, sizes: True) -> Plan:
    """The plan for `members`, each on its `rows` of the batch: a pure function, which runs nothing and knows no tensor.

    `pays(link, sizes)` returns True if streams of these numbers of rows are to be concatenated where they meet `link`.
    """
    known, read = _histories(members, rows)
    kept = {stream.number for ends in read for stream in ends}
    answers = _answers(members, rows, read, len(known))
    roots = [(root, one.number, tuple(sorted(one.rows))) for (parent, root), one in known.items() if parent is None]
    steps = _schedule([*_fuse(_meet(known.values(), pays), kept), *answers])
    return Plan(steps, tuple(roots), tuple(members), tuple(rows))


def _meet(streams: Iterable[_Stream], pays: Pays) -> list[RunStep]:
    """A run for every link that streams go on by, one for several streams where that pays."""
    groups: dict[Hashable, list[_Stream]] = {}
    for stream in streams:
        if stream.link is not None:
            groups.setdefault((stream.link.span, stream.link.key, stream.shape), []).append(stream)
    runs = []
    for group in groups.values():
        link = group[0].link
        assert link is not None
        together = len(group) > 1 and pays(link, [len(stream.rows) for stream in group])
        for part in [group] if together else [[stream] for stream in group]:
            takes = [Take(one.parent.number, one.parent.places(one.rows)) for one in part if one.parent is not None]
            sizes = tuple(len(one.rows) for one in part)
            runs.append(RunStep((link,), tuple(takes), tuple(one.number for one in part), sizes, part[0].scale))
    return sorted(runs, key=lambda run: run.links[0].span)


def _fuse(runs: list[RunStep], tapped: set[int]) -> list[RunStep]:
    """Join a run with the one that reads all of its outputs and nothing else, unless a head reads them too."""
    readers = Counter(take.stream for run in runs for take in run.inputs)
    fused: list[RunStep] = []
    ending: dict[tuple[int, ...], int] = {}  # the output streams of a fused run -> its place
    for run in runs:
        inputs = tuple(take.stream for take in run.inputs)
        plain = all(take.places is None and readers[take.stream] == 1 for take in run.inputs)
        if inputs in ending and plain and not tapped.intersection(inputs):
            place = ending.pop(inputs)
            before = fused[place]
            fused[place] = replace(run, links=(*before.links, *run.links), inputs=before.inputs)
        else:
            place = len(fused)
            fused.append(run)
        ending[run.outputs] = place
    return fused


def _answers(
    members: Sequence[PlannedTask], rows: Sequence[Rows], read: list[list[_Stream]], numbers: int
) -> Iterator[Step]:
    """The pools and the heads: linear ones that read the same stream are one."""
    pools: dict[int, int] = {}
    together: dict[int, tuple[list[str], list[tuple[Take, ...]]]] = {}
    for member, streams, wanted in zip(members, read, map(set, rows), strict=True):
        if member.linear and len(streams) == 1 and member.inputs[0].form == "features":
            names, features = together.setdefault(streams[0].number, ([], []))
            names.append(member.name)
            features.append((Take(streams[0].number, streams[0].places(wanted)),))
            continue
        takes = []
        for one, stream in zip(member.inputs, streams, strict=True):
            number = stream.number
            if one.form == "pooled":
                if number not in pools:
                    pools[number] = numbers + len(pools)
                    yield PoolStep(one.segment, number, pools[number])
                number = pools[number]
            takes.append(Take(number, stream.places(wanted)))
        yield HeadStep((member.name,), (tuple(takes),))
    for names, features in together.values():
        yield HeadStep(tuple(names), tuple(features))


def _schedule(steps: list[Step]) -> tuple[Step, ...]:
    """Depth first: steps run as soon as their streams are there, the latest first, and free those that none reads after."""
    makers: dict[int, int] = {}
    for index, step in enumerate(steps):
        if isinstance(step, RunStep):
            makers |= dict.fromkeys(step.outputs, index)
        elif isinstance(step, PoolStep):
            makers[step.output] = index
    waiting = [{makers[stream] for stream in reads(step) if stream in makers} for step in steps]
    followers: dict[int, list[int]] = {}
    for index, needs in enumerate(waiting):
        for maker in needs:
            followers.setdefault(maker, []).append(index)
    ready = [index for index in reversed(range(len(steps))) if not waiting[index]]
    order = []
    while ready:
        index = ready.pop()
        order.append(steps[index])
        released = []
        for follower in followers.get(index, ()):
            waiting[follower].discard(index)
            if not waiting[follower]:
                released.append(follower)
        ready += sorted(released, key=lambda i: isinstance(steps[i], RunStep), reverse=True)
    last = {stream: index for index, step in enumerate(order) for stream in reads(step)}
    frees = [tuple(stream for stream in reads(step) if last[stream] == index) for index, step in enumerate(order)]
    return tuple(replace(step, frees=streams) for step, streams in zip(order, frees, strict=True))
