"""The plan: which modules run on which streams so that many patches cost what differs between them.

    image ─ stem ─ block 1 ─┬─ block 2 (flowers) ──┐
                            └─ block 2 ─┬──────────┴─ block 3  both streams, concatenated ─┬─ head flowers
                                        └──────────────────────────────────────────────────┴─ heads birds, base

A *stream* is one activation on its way through the chain; two patches with the same history are one stream. A step runs
a stretch of modules on one or several streams; where several meet the same module, they are concatenated along the
batch axis if that pays, and split again after it (SubTuning, section on inference). What is computed is then the set
of distinct (history, module) pairs, each on the rows that a task wants.

`make_plan` is a pure function of what the patches are made of: it runs nothing and knows no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from modelpatch.engine.describe import draw, flops_text, grow
from modelpatch.engine.steps import HeadStep, Link, PoolStep, Roots, Rows, RunStep, Step, Take, reads, run_flops, writes
from modelpatch.heads.reading import Read, Stream
from modelpatch.text import count_of

Pays = Callable[[Link, Sequence[int]], bool]


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

    def needed(self, stream: Stream = "patch") -> tuple[Link, ...]:
        """The links up to the last segment that the head reads of a stream."""
        end = max((read.segment + 1 for read in self.inputs if read.of == stream), default=0)
        return tuple(link for link in (self.path if stream == "patch" else self.beside) if link.span[1] <= end)

    @property
    def walks(self) -> tuple[tuple[Link, ...], ...]:
        """The links of the streams that the head reads."""
        return self.needed("patch"), self.needed("base")


@dataclass(frozen=True)
class Plan:
    """Steps in order. `roots` are the streams of the images, by what they are seen through; `streams` counts all."""

    steps: tuple[Step, ...]
    roots: Roots
    streams: int
    members: tuple[PlannedTask, ...]
    rows: tuple[Rows, ...]

    @property
    def flops(self) -> int:
        """Floating point operations of all links for the batch, heads left out."""
        return sum(run_flops(step, place) for step in self.runs for place in range(len(step.sizes)))

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

    def __str__(self) -> str:
        images = max((len(rows) for rows in self.rows), default=0)
        count, size = count_of(len(self.members), "task"), self.bytes / 1e6
        lines = [f"{count}, up to {images} images each: {self._saving}; {size:.1f} MB of weights and activations"]
        for tree in grow(self.roots, self.steps):
            lines += [f"{tree.rows} {tree.name}", *tree.outline()]
        return "\n".join(lines)

    def draw(self, path: str) -> None:
        """Draw the plan as a tree of streams into a picture (.png, .svg, .pdf). Needs matplotlib."""
        draw(grow(self.roots, self.steps), path, self._saving)

    @property
    def _saving(self) -> str:
        separate = flops_text(self.separate_flops)
        return f"{flops_text(self.flops)} instead of {separate} one after another ({self.shared:.0%} shared)"


def _operations(members: Sequence[PlannedTask], rows: Sequence[Rows]) -> int:
    wanted: dict[tuple[Hashable, ...], tuple[int, float, set[int]]] = {}
    for member, own in zip(members, rows, strict=True):
        for walk in member.walks:
            history: tuple[Hashable, ...] = (member.root,)
            for link in walk:
                history = (*history, (link.span, link.key))
                wanted.setdefault(history, (link.macs, member.scale, set()))[2].update(own)
    return sum(round(2 * macs * len(rows) * scale) for macs, scale, rows in wanted.values())


@dataclass
class _Stream:
    """A history: the link that ends it after its parent's. The children are the ways it goes on."""

    number: int
    parent: _Stream | None
    link: Link | None
    shape: Hashable
    scale: float
    rows: set[int] = field(default_factory=set)
    children: dict[Hashable, _Stream] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.link.span[1] if self.link else 0

    def places(self, rows: set[int]) -> Rows | None:
        """The places of `rows` in this stream's own; None for all of them."""
        if len(rows) == len(self.rows):
            return None
        own = {row: place for place, row in enumerate(sorted(self.rows))}
        return tuple(own[row] for row in sorted(rows))


def always(link: Link, rows: Sequence[int]) -> bool:
    """Return True: concatenate all streams that meet."""
    return True


def make_plan(members: Sequence[PlannedTask], rows: Sequence[Rows], pays: Pays = always) -> Plan:
    """The plan for `members`, each on its `rows` of the batch.

    `pays(link, sizes)` returns True if streams of these numbers of rows are to be concatenated where they meet `link`.
    """
    streams: list[_Stream] = []
    roots: dict[Hashable, _Stream] = {}
    read: list[list[_Stream]] = []

    def new(parent: _Stream | None, link: Link | None, member: PlannedTask) -> _Stream:
        streams.append(_Stream(len(streams), parent, link, member.shape, member.scale))
        return streams[-1]

    def walk(member: PlannedTask, links: tuple[Link, ...], wanted: Rows) -> dict[int, _Stream]:
        """The streams along links from the member's root, by the last segment of each."""
        stream = roots.setdefault(member.root, roots.get(member.root) or new(None, None, member))
        stream.rows.update(wanted)
        passed = {}
        for link in links:
            turn = (link.span, link.key)
            stream.children.setdefault(turn, stream.children.get(turn) or new(stream, link, member))
            stream = stream.children[turn]
            stream.rows.update(wanted)
            passed[stream.end - 1] = stream
        return passed

    for member, wanted in zip(members, rows, strict=True):
        own, base = (walk(member, links, wanted) if links else {} for links in member.walks)
        read.append([(own if one.of == "patch" else base)[one.segment] for one in member.inputs])
    kept = {stream.number for ends in read for stream in ends}
    runs = _fuse(_meet(streams, pays), kept)
    steps = _schedule(runs, list(_answers(members, rows, read, len(streams))))
    pools = sum(isinstance(step, PoolStep) for step in steps)
    return Plan(
        _free(steps),
        tuple((root, stream.number, tuple(sorted(stream.rows))) for root, stream in roots.items()),
        len(streams) + pools,
        tuple(members),
        tuple(rows),
    )


def _meet(streams: list[_Stream], pays: Pays) -> list[RunStep]:
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
    readers: dict[int, int] = {}
    for run in runs:
        for take in run.inputs:
            readers[take.stream] = readers.get(take.stream, 0) + 1
    fused: list[RunStep] = []
    ending: dict[tuple[int, ...], int] = {}  # the output streams of a fused run -> its place
    for run in runs:
        inputs = tuple(take.stream for take in run.inputs)
        place = ending.pop(inputs, None)
        plain = all(take.places is None and readers[take.stream] == 1 for take in run.inputs)
        if place is not None and plain and not tapped.intersection(inputs):
            before = fused[place]
            fused[place] = RunStep((*before.links, *run.links), before.inputs, run.outputs, run.sizes, run.scale)
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
    together: dict[int, list[int]] = {}
    for index, member in enumerate(members):
        streams, wanted = read[index], set(rows[index])
        if member.linear and len(streams) == 1 and member.inputs[0].form == "features":
            together.setdefault(streams[0].number, []).append(index)
            continue
        takes = []
        for one, stream in zip(member.inputs, streams, strict=True):
            number = stream.number
            if one.form == "pooled":
                if number not in pools:
                    pools[number] = numbers + len(pools)
                    yield PoolStep(stream.end - 1, number, pools[number])
                number = pools[number]
            takes.append(Take(number, stream.places(wanted)))
        yield HeadStep((member.name,), (tuple(takes),))
    for stream_number, indices in together.items():
        end = read[indices[0]][0]
        yield HeadStep(
            tuple(members[index].name for index in indices),
            tuple((Take(stream_number, end.places(set(rows[index]))),) for index in indices),
        )


def _schedule(runs: list[RunStep], answers: list[Step]) -> list[Step]:
    """Depth first: a step runs as soon as its streams are there, the latest ones first, so that few are alive at once."""
    steps: list[Step] = [*runs, *answers]
    makers = {stream: index for index, step in enumerate(steps) for stream in writes(step)}
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
    return order


def _free(steps: list[Step]) -> tuple[Step, ...]:
    """Every step with the streams that no step reads after it."""
    last = {stream: index for index, step in enumerate(steps) for stream in reads(step)}
    frees: dict[int, list[int]] = {}
    for stream, index in last.items():
        frees.setdefault(index, []).append(stream)
    return tuple(replace(step, frees=tuple(frees.get(index, ()))) for index, step in enumerate(steps))
