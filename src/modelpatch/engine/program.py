"""A plan with its modules: what a call of the engine runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelpatch.backbone.frozen import Module
from modelpatch.backbone.tuning import Tuning, lay, piece_rows
from modelpatch.engine.plan import Answer, Link, Plan, Pool, Run, Step, Take
from modelpatch.patch.heads import pool


@dataclass(frozen=True)
class Timing:
    """What a step took, in seconds."""

    step: Step
    seconds: float


class Program:
    """Runs a plan. `modules` says what runs a link now, `heads` are the members' heads, `axes` how segments are pooled."""

    def __init__(
        self,
        plan: Plan,
        modules: Callable[[Link], Module],
        heads: Mapping[str, nn.Module],
        axes: Mapping[int, tuple[int, ...]],
        tuning: Tuning,
    ) -> None:
        self.plan, self._modules, self._heads, self._axes, self._tuning = plan, modules, heads, axes, tuning
        self._joined = {step.members: _join(step, heads) for step in plan.steps if isinstance(step, Answer)}

    @torch.inference_mode()
    def __call__(self, images: Mapping[Hashable, Tensor], timings: list[Timing] | None = None) -> dict[str, Tensor]:
        """Logits by member, each for its rows in order, from the images (B, 3, H, W) of every root."""
        streams: list[Tensor | None] = [None] * self.plan.streams
        for root, stream, rows in self.plan.roots:
            whole = images[root]
            streams[stream] = lay(whole if len(rows) == len(whole) else whole[list(rows)], self._tuning)
        answers: dict[str, Tensor] = {}
        for step in self.plan.steps:
            start = time.perf_counter()
            if isinstance(step, Run):
                self._run(step, streams)
            elif isinstance(step, Pool):
                streams[step.output] = pool(_read(streams, step.stream).float(), self._axes[step.tap])
            else:
                answers |= self._answer(step, streams)
            for stream in step.frees:
                streams[stream] = None
            if timings is not None:
                timings.append(Timing(step, _now(images) - start))
        return answers

    def _run(self, step: Run, streams: list[Tensor | None]) -> None:
        taken = [_take(streams, take) for take in step.inputs]
        x = taken[0] if len(taken) == 1 else torch.cat(taken)
        modules = [self._modules(links[0]) for links in step.links]
        rows = piece_rows(
            max(x.nbytes // max(len(x), 1), *(links[0].output_bytes for links in step.links)), self._tuning
        )
        pieces = [_through(modules, piece) for piece in (x.split(rows) if 0 < rows < len(x) else (x,))]
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        outputs = (output,) if len(taken) == 1 else output.split(step.sizes)
        for stream, out in zip(step.outputs, outputs, strict=True):
            streams[stream] = out

    def _answer(self, step: Answer, streams: list[Tensor | None]) -> dict[str, Tensor]:
        joined = self._joined[step.members]
        if joined is None:
            inputs = [_take(streams, take).float() for take in step.takes[0]]
            features = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
            return {step.members[0]: self._heads[step.members[0]](features)}
        weight, bias, widths = joined
        features = _read(streams, step.takes[0][0].stream).float().flatten(1)
        logits = torch.addmm(bias, features, weight.t()).split(widths, 1)
        places = [takes[0].places for takes in step.takes]
        return {
            name: (out if rows is None else out[list(rows)]).contiguous()
            for name, out, rows in zip(step.members, logits, places, strict=True)
        }


def _join(step: Answer, heads: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor, list[int]] | None:
    """Several linear heads as one weight, one bias and their widths."""
    if len(step.members) == 1:
        return None
    linear = [heads[name] for name in step.members]
    weights: list[Tensor] = [head.get_parameter("weight") for head in linear]
    biases = [
        weight.new_zeros(len(weight)) if getattr(head, "bias", None) is None else head.get_parameter("bias")
        for head, weight in zip(linear, weights, strict=True)
    ]
    return torch.cat(weights).detach(), torch.cat(biases).detach(), [len(weight) for weight in weights]


def _through(modules: list[Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _read(streams: list[Tensor | None], stream: int) -> Tensor:
    x = streams[stream]
    assert x is not None, f"stream {stream} is read after it was freed"
    return x


def _take(streams: list[Tensor | None], take: Take) -> Tensor:
    x = _read(streams, take.stream)
    return x if take.places is None else x[list(take.places)]


def _now(images: Mapping[Hashable, Tensor]) -> float:
    if any(x.device.type == "cuda" for x in images.values()):
        torch.cuda.synchronize()
    return time.perf_counter()
