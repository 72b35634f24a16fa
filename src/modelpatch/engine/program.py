"""Plans with their modules, which calls of the engine run."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from modelpatch.backbone.fingerprint import hash_tensors
from modelpatch.backbone.tuning import Module, Tuning, lay, run_in_pieces
from modelpatch.engine.compiled import LinkRun, RunModule
from modelpatch.engine.plan import Batches, HeadStep, Link, Plan, PoolStep, RunStep, Step, Take, reads
from modelpatch.engine.task import EngineTask
from modelpatch.heads.reading import pool


@dataclass(frozen=True)
class Timing:
    """A step and the seconds it took."""

    step: Step
    seconds: float


class JoinedHeads:
    """Linear `heads` that read the same features for the same rows, as one matrix product: a link after the chain's last."""

    span, own, name, macs = (0, 0), True, "heads", 0

    def __init__(self, heads: tuple[nn.Module, ...]) -> None:
        weights = [head.get_parameter("weight").detach() for head in heads]
        self._widths = [len(weight) for weight in weights]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [getattr(head, "bias", None) for head in heads]
        zeros = map(Tensor.new_zeros, weights, self._widths)
        self._bias = torch.cat([zero if own is None else own.detach() for own, zero in zip(biases, zeros, strict=True)])
        self.nbytes, self.output_bytes = self._weight.nbytes + self._bias.nbytes, 4 * sum(self._widths)
        self.held = self.nbytes if len(weights) > 1 else self._bias.nbytes  # bytes beside the heads' own

    @cached_property
    def key(self) -> str:
        """A hash of the weights."""
        return f"heads {hash_tensors([('weight', self._weight), ('bias', self._bias)])}"

    def copy(self) -> nn.Module:
        """The heads as one module, of features or what flattens to them."""
        with torch.device("meta"):
            linear = nn.Linear(self._weight.shape[1], len(self._weight))
        for name, tensor in (("weight", self._weight), ("bias", self._bias)):
            setattr(
                linear, name, nn.Parameter(tensor.clone(), requires_grad=False)
            )  # tensors of a call allow no gradients
        return nn.Sequential(nn.Flatten(), linear).eval()

    def __call__(self, features: Tensor) -> Tensor:
        """Logits of all heads, one after another, for features (B, D) or what flattens to them."""
        return torch.addmm(self._bias, features.float().flatten(1), self._weight.t())

    def split(self, logits: Tensor) -> list[Tensor]:
        """Logits (B, K) of every head."""
        if len(self._widths) == 1:
            return [logits]
        return [one.contiguous() for one in logits.split(self._widths, 1)]


class Program:
    """Run a plan.

    `tasks` are its members, `modules` gives the module of a link (the second argument is True while a compiled one is made),
    `join` makes several heads one, and `axes` gives the axes over which a segment is pooled. `prepare` is told of images
    before any module runs, and not of the activations that other roots stand for. `find` gives the compiled module of a run
    for an input, if there is one; its third argument is True where it is to be made at once. Linear heads are runs as well
    if it `compiles`, and the base's own is one with the backbone's last segments where nothing else reads these.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: Iterable[EngineTask],
        modules: Callable[[Link, bool], Module],
        join: Callable[[tuple[nn.Module, ...]], JoinedHeads],
        axes: Callable[[int], tuple[int, ...]],
        tuning: Tuning,
        prepare: Callable[[Tensor], None],
        find: Callable[[LinkRun, Tensor, bool], RunModule] = lambda run, x, now: RunModule(),
        compiles: bool = False,
    ) -> None:
        self.plan, self._modules, self._axes, self._tuning, self._prepare = plan, modules, axes, tuning, prepare
        self._find = find
        self.tasks = {task.name: task for task in tasks}
        starts = (
            (member.root, links[0].span[0]) for member in plan.members for links in member.walks.values() if links
        )
        self._images = {root for root, segment in starts if segment == 0}
        linear = {member.name for member in plan.members if member.linear}
        self._joined = {
            step.members: join(tuple(self.tasks[name].head for name in step.members))
            for step in plan.steps
            if isinstance(step, HeadStep)
            and (len(step.members) > 1 or (compiles and step.members[0] in linear))
            and all(takes[0].places is None for takes in step.takes)
        }
        self._fused = set[tuple[str, ...]]()
        self._runs = {step.outputs: LinkRun.split(step.links) for step in plan.runs}
        self._heads = {members: LinkRun.of((heads,)) for members, heads in self._joined.items()} if compiles else {}
        for step in plan.steps:
            if isinstance(step, HeadStep) and step.members in self._heads:
                self._fuse(step)

    @property
    def runs(self) -> list[LinkRun]:
        """All runs that may be compiled."""
        apart = [run for members, run in self._heads.items() if members not in self._fused]
        return [*chain.from_iterable(self._runs.values()), *apart]

    def _fuse(self, step: HeadStep) -> None:
        """Make the backbone's own head one with the run before it, if it alone reads that: no patch's run is another's."""
        stream = step.takes[0][0].stream
        readers = [other for other in self.plan.steps if stream in reads(other)]
        runs = self._runs.get((stream,), ())
        if self.tasks[step.members[0]].bound is None and len(step.members) == len(readers) == len(runs) == 1:
            self._runs[(stream,)] = (LinkRun.of((*runs[0].links, self._joined[step.members])),)
            self._fused.add(step.members)

    @torch.inference_mode()
    def __call__(self, images: Batches, timings: list[Timing] | None = None, *, now: bool = False) -> dict[str, Tensor]:
        """Answers by member, each for its rows in order, from the images (B, 3, H, W) of every root.

        Runs that are not compiled yet begin to be where `now` is True.
        """
        streams: dict[int, Tensor] = {}
        for root, stream, rows in self.plan.roots:
            whole = images[root]
            if root in self._images:
                self._prepare(whole)
            streams[stream] = whole if len(rows) == len(whole) else whole[list(rows)]
        return self.follow(streams, timings, now)

    def follow(
        self, streams: dict[int, Tensor], timings: list[Timing] | None = None, now: bool = False
    ) -> dict[str, Tensor]:
        """Answers by member, from the images (B, 3, H, W) of every root's stream; streams that are read no more are freed."""
        cuda = any(x.device.type == "cuda" for x in streams.values())
        answers: dict[str, Tensor] = {}
        for step in self.plan.steps:
            start = 0.0 if timings is None else _now(cuda)
            if isinstance(step, RunStep):
                self._run(step, streams, now)
            elif isinstance(step, PoolStep):
                streams[step.output] = pool(streams[step.stream].float(), self._axes(step.tap))
            else:
                answers |= self._answer(step, streams, now)
            for stream in step.frees:
                del streams[stream]
            if timings is not None:
                timings.append(Timing(step, _now(cuda) - start))
        return answers

    def _run(self, step: RunStep, streams: dict[int, Tensor], now: bool) -> None:
        taken = [_take(streams, take) for take in step.inputs]
        x = taken[0] if len(taken) == 1 else torch.cat(taken)
        for run in self._runs[step.outputs]:
            compiled, waits = self._find(run, x, now)
            x = self._run_eager(run, x, step.scale, waits) if compiled is None else compiled(x)
        outputs = (x,) if len(taken) == 1 else x.split(step.sizes)
        for stream, out in zip(step.outputs, outputs, strict=True):
            streams[stream] = out

    def _run_eager(self, run: LinkRun, x: Tensor, scale: float, waits: bool) -> Tensor:
        x = lay(x, self._tuning)  # a compiled run before gives rows channel by channel
        modules = [link if isinstance(link, JoinedHeads) else self._modules(link, waits) for link in run.links]
        if not self._tuning.piece_bytes:
            return reduce(lambda made, module: module(made), modules, x)
        sides = [x.nbytes // max(len(x), 1), *(round(link.output_bytes * scale) for link in run.links)]
        return run_in_pieces(modules, [max(pair) for pair in pairwise(sides)], x, self._tuning)

    def _answer(self, step: HeadStep, streams: Mapping[int, Tensor], now: bool) -> dict[str, Tensor]:
        if step.members in self._joined:
            heads, logits = self._joined[step.members], streams[step.takes[0][0].stream]
            if step.members not in self._fused:
                run = self._heads.get(step.members)
                compiled = None if run is None else self._find(run, logits, now).module
                logits = (compiled or heads)(logits)
            return dict(zip(step.members, heads.split(logits), strict=True))
        answers = {}
        for name, takes in zip(step.members, step.takes, strict=True):
            inputs = [_take(streams, take).float() for take in takes]
            task = self.tasks[name]
            answers[name] = task.head(inputs[0] if task.reading is None else task.reading.join(inputs, pooled=True))
        return answers


def _take(streams: Mapping[int, Tensor], take: Take) -> Tensor:
    x = streams[take.stream]
    return x if take.places is None else x[list(take.places)]


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
