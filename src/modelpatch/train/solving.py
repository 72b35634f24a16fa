"""A linear head over frozen features, trained until it has converged, with its penalty chosen on held-out images.

    min_A  mean_i loss(A z_i + b, y_i) + λ/2 |A|²        z = (x - mean) / deviation

L-BFGS follows a path of λ from strong to weak, each from the solution before, until the loss of held-out images has risen. It
works on B of A = B (c C + λ I)^(-1/2), C the covariance of z and c the curvature of the loss, in which all directions are
about alike: some ten evaluations a λ. W = A / deviation and b are the head that reads x.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.errors import DivergedError

PENALTIES = tuple(10.0 ** (-step / 2) for step in range(11))  # 1 to 1e-5
ABOVE = 5  # times the penalty of the solution that a path starts from
PATIENCE = 2  # penalties with a higher held-out loss after which weaker ones are not tried
ROUGH, EXACT = 1e-4, 1e-6  # changes of the loss that end a search along the path, and the last one
MOST_STEPS = 100
PIECE = 2**25  # numbers, of features and outputs, that are worked on at once
LEAST = 1e-2  # times the largest deviation: features that hardly differ are not blown up
ROUNDING = 1e-4  # times the largest mean, likewise: features that differ by rounding are one
SMALLEST = 1e-12  # below it all features are 0: those of a network without training may fade to nothing
FLATTEST = 1e-9  # a curvature, for losses that have none

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and targets (B, ...) to their mean loss
Weigh = Callable[[Tensor], Tensor]  # targets (B, ...) to how much each counts (B,)


@dataclass(frozen=True)
class Examples:
    """Parts (features (N, D), targets (N, ...)) on the CPU, read in pieces on `device`."""

    parts: Sequence[tuple[Tensor, Tensor]]
    device: torch.device

    def __len__(self) -> int:
        return sum(len(features) for features, _ in self.parts)

    @property
    def width(self) -> int:
        """The number of features, D."""
        return self.parts[0][0].shape[1]

    def take(self, rows: Tensor) -> Self:
        """Return the same rows of every part, copied."""
        return type(self)([(features[rows], targets[rows]) for features, targets in self.parts], self.device)

    def pieces(self, outputs: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield as many rows at a time as fit beside their outputs."""
        size = max(PIECE // (self.width + outputs), 1)
        for features, targets in self.parts:
            for x, y in zip(features.split(size), targets.split(size), strict=True):
                yield x.to(self.device), y


@dataclass(frozen=True)
class Scales:
    """Mean and deviation (D,) of features, and the eigenvalues (D,) and eigenvectors (D, D) of their correlations."""

    mean: Tensor
    deviation: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, examples: Examples) -> Self:
        count, width = len(examples), examples.width
        mean = torch.zeros(width, device=examples.device)
        for x, _ in examples.pieces():
            mean += x.sum(0) / count
        gram = torch.zeros(width, width, device=examples.device)
        for x, _ in examples.pieces(width):
            gram.addmm_((x - mean).T, x - mean, alpha=1 / count)
        deviation = gram.diagonal().clamp(min=0).sqrt()
        least = max(LEAST * float(deviation.max()), ROUNDING * float(mean.abs().max()))
        deviation = deviation.clamp(min=least) if least > SMALLEST else torch.ones_like(deviation)
        one = torch.eye(width, device=examples.device)  # without it the search fails where nothing is correlated
        values, vectors = torch.linalg.eigh(gram / deviation.outer(deviation) + one)
        return cls(mean, deviation, (values - 1).clamp(min=0), vectors)


@dataclass(frozen=True)
class Solution:
    """A head in the coordinates z: A (K, D) and offset (K,). `loss` is that of its examples, without the penalty."""

    penalty: float
    inner: Tensor
    offset: Tensor
    loss: float = math.inf

    @classmethod
    def start(cls, scales: Scales, outputs: int, penalty: float) -> Self:
        """The head that answers 0."""
        width = len(scales.mean)
        return cls(penalty, scales.mean.new_zeros(outputs, width), scales.mean.new_zeros(outputs))


class Solver:
    """Solves heads of `outputs` numbers for the loss of one task. `scales` hold for all of its examples."""

    def __init__(self, scales: Scales, outputs: int, loss: Loss, weigh: Weigh) -> None:
        self.scales, self.outputs, self.loss, self.weigh = scales, outputs, loss, weigh

    def fold(self, solution: Solution) -> tuple[Tensor, Tensor]:
        """Return the weight (K, D) and bias (K,) that read features as they are."""
        weight = solution.inner / self.scales.deviation
        return weight, solution.offset - weight @ self.scales.mean

    def follow(
        self, examples: Examples, held_out: Examples, start: Solution | None = None
    ) -> Iterator[tuple[Solution, float]]:
        """Yield solutions for weaker and weaker penalties with their held-out loss, until that has risen `PATIENCE` times.

        The path begins a little above the penalty of `start`.
        """
        best, worse, at = math.inf, 0, start
        for penalty in PENALTIES if start is None else [one for one in PENALTIES if one <= ABOVE * start.penalty]:
            at = self.solve(examples, penalty, at, ROUGH)
            with torch.no_grad():
                loss = self.add_up(held_out, *self.fold(at))
            yield at, loss
            best, worse = (loss, 0) if loss < best else (best, worse + 1)
            if worse >= PATIENCE:
                return

    def solve(
        self, examples: Examples, penalty: float, start: Solution | None = None, tolerance: float = EXACT
    ) -> Solution:
        """Return the head with the least penalised loss. Raises `DivergedError` for one that is not finite."""
        at = start or Solution.start(self.scales, self.outputs, penalty)
        curvature = self.curvature(examples, *self.fold(at))
        sizes, vectors = (curvature * self.scales.values + penalty).rsqrt(), self.scales.vectors
        b = (at.inner @ vectors / sizes).requires_grad_()
        c = (at.offset * curvature**0.5).requires_grad_()
        rules: dict[str, Any] = {"tolerance_grad": tolerance / 10, "tolerance_change": tolerance}
        search = torch.optim.LBFGS([b, c], max_iter=MOST_STEPS, line_search_fn="strong_wolfe", **rules)
        losses: list[float] = []

        def unfold() -> Solution:
            return Solution(penalty, (b * sizes) @ vectors.T, c / curvature**0.5)

        def measure() -> float:
            search.zero_grad()
            head = self.fold(unfold())
            leaves = [one.detach().requires_grad_() for one in head]
            losses.append(self.add_up(examples, *leaves))
            size = penalty / 2 * (b * sizes).square().sum()
            torch.autograd.backward([*head, size], [*(leaf.grad for leaf in leaves), torch.ones_like(size)])
            return losses[-1] + float(size.detach())

        with torch.enable_grad():
            search.step(measure)
        with torch.no_grad():
            found = unfold()
        if not (found.inner.isfinite().all() and found.offset.isfinite().all()):
            raise DivergedError("the head has no finite solution. Set solver='steps', or choose another loss.")
        return replace(found, loss=losses[-1])

    def add_up(self, examples: Examples, weight: Tensor, bias: Tensor) -> float:
        """Return the mean loss of a head; where gradients are enabled, add its own to those of weight and bias."""
        shares = [float(self.weigh(y).sum()) for _, y in examples.pieces(self.outputs)]
        whole, total = max(sum(shares), 1e-12), 0.0
        for (x, y), share in zip(examples.pieces(self.outputs), shares, strict=True):
            loss = self.loss(F.linear(x, weight, bias), y) * (share / whole)
            if torch.is_grad_enabled():
                loss.backward()
            total += float(loss.detach())
        return total

    def curvature(self, examples: Examples, weight: Tensor, bias: Tensor) -> float:
        """Return the mean second derivative of the loss by an output, estimated with random signs (Hutchinson, 1989)."""
        x, y = next(examples.pieces(self.outputs))
        outputs = F.linear(x, weight, bias).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self.loss(outputs, y), outputs, create_graph=True)
        if slopes.grad_fn is None:
            return FLATTEST
        signs = torch.randint(0, 2, outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs) * 2 - 1
        (product,) = torch.autograd.grad(slopes, outputs, signs, allow_unused=True)
        return FLATTEST if product is None else max(float((product * signs).sum()) / self.outputs, FLATTEST)
