"""The linear head of a frozen network: features computed once, its penalty and views chosen on held-out images.

    features of plain images, and of augmented ones ─ path of penalties on 80 % ─ least held-out loss ─ solved for all images

With `augment="auto"` plain features alone are weighed against plain and augmented ones.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelpatch.data.splits import drawn
from modelpatch.data.task import Task
from modelpatch.patch.model import PatchedModel
from modelpatch.tasks.kind import Kind
from modelpatch.train.inputs import CachedInputs, OwnInputs, SharedInputs
from modelpatch.train.progress import Progress
from modelpatch.train.settings import FitSettings
from modelpatch.train.solving import Examples, Scales, Solution, Solver
from modelpatch.train.trainer import Figures

HELD_OUT = 0.2  # of the training images, where no validation images are named
MOST_WEIGHED = 25_000  # images by which penalties are chosen, those held out included
FEWEST = 5  # images, below which none is held out
PENALTY = 0.1  # where none is held out
PLAIN = "none"  # the augmentation of plain images


@dataclass(frozen=True)
class Solved:
    """Figures of all heads that were tried, facts for the patch, and the `best` score on named validation images."""

    history: list[Figures]
    facts: Mapping[str, Any]
    best: Figures


@dataclass(frozen=True)
class HeadProbe:
    """The parts of a fit that solve its head; `facts` are what the kind prepared."""

    data: Task
    kind: Kind
    facts: Mapping[str, Any]
    settings: FitSettings
    source: OwnInputs | SharedInputs
    loss: Callable[[Any, Any], Tensor]
    class_weights: Tensor | None
    bar: Progress

    def solve(self, model: PatchedModel, augmentation: str, validates: bool) -> Solved:
        """Set the head of a model, chosen on the data's validation images if it `validates`, else on a share of its own.

        Raises `DivergedError` where the loss has no finite solution.
        """
        head: Any = model.head
        plain = self.read(model, "train", False)
        candidates = self.list_candidates(model, plain, augmentation)
        if validates:
            trained, held_out = torch.arange(len(plain)), self.read(model, "validation", False)
        else:
            trained, held = self.cut(plain)
            held_out = plain.take(held)
        shares = {name: examples.take(trained) for name, examples in candidates.items()}
        solver = Solver(Scales.of(list(shares.values())[-1]), head.out_features, self.measure_loss, self.weigh)
        history: list[Figures] = []
        name, best = next(iter(candidates)), Solution.start(solver.scales, head.out_features, PENALTY)
        if len(held_out):
            name, best = self.choose(solver, shares, held_out, history)
        penalty = best.penalty * len(trained) / len(plain)
        with self.bar.task("solving the head", 1):
            final = solver.solve(candidates[name], penalty, best)
        with torch.no_grad():
            for tensor, found in zip((head.weight, head.bias), solver.fold(final), strict=True):
                tensor.copy_(found)
        facts = {"penalty": penalty, "views": name, "loss": final.loss, "held_out_images": len(held_out)}
        return Solved(history, {"solved": facts}, self.best_of(history) if validates else {})

    def list_candidates(self, model: PatchedModel, plain: Examples, augmentation: str) -> dict[str, Examples]:
        """The examples that a head may be solved from, by their augmentation, the fewest first."""
        split, views = self.data.train, min(self.settings.views, self.settings.epochs)
        if split.changes:  # by a transform that stands in place of the augmentation
            return {augmentation: self.read(model, "train", True, views)}
        weighs = self.settings.augment == "auto" and not split.is_stream
        if augmentation == PLAIN or (weighs and views == 1):
            return {PLAIN: plain}
        augmented = self.read(model, "train", True, max(views - 1, 1))
        both = Examples([*plain.parts, *augmented.parts], plain.device)
        return {PLAIN: plain, augmentation: both} if weighs else {augmentation: both}

    def choose(
        self, solver: Solver, shares: Mapping[str, Examples], held_out: Examples, history: list[Figures]
    ) -> tuple[str, Solution]:
        """The augmentation and the solution with the least held-out loss; `history` gets a row for all that is tried."""
        found: list[tuple[float, str, Solution]] = []
        with self.bar.task("choosing the head's penalty", len(shares)) as advance:
            for name, examples in shares.items():
                start = min(found, key=lambda one: one[0])[2] if found else None
                for at, loss in solver.follow(examples, held_out, start):
                    found.append((loss, name, at))
                    scores = self.score(solver, at, held_out)
                    figures = {"penalty": at.penalty, "loss": at.loss, "validation_loss": loss, **scores}
                    history.append({"epoch": len(found), "views": len(examples.parts), **figures})
                    self.bar.note("  ".join(f"{key} {value:.4g}" for key, value in history[-1].items()))
                advance(1)
        return min(found, key=lambda one: one[0])[1:]

    def score(self, solver: Solver, solution: Solution, held_out: Examples) -> Figures:
        """The kind's figures of a solution on held-out images."""
        weight, bias = solver.fold(solution)

        def answer() -> Iterator[tuple[Tensor, Tensor]]:
            for x, targets in held_out.pieces(solver.outputs):
                yield self.kind.to_answers(F.linear(x, weight, bias).cpu(), self.facts), targets

        figures = self.kind.measure(self.data.classes, answer(), self.facts).figures
        return {f"validation_{name}": figures[name] for name in self.kind.metrics if name in figures}

    def best_of(self, history: list[Figures]) -> Figures:
        """The score of the row with the least held-out loss."""
        name = f"validation_{self.kind.metric}"
        row = min(history, key=lambda one: one["validation_loss"])
        return {name: row[name]}

    def measure_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a piece."""
        return self.loss(outputs, self.kind.move(targets, outputs.device))

    def weigh(self, targets: Tensor) -> Tensor:
        """The weight of each image in the mean loss (B,)."""
        device = None if self.class_weights is None else self.class_weights.device
        return self.kind.weigh_images(
            targets if device is None else self.kind.move(targets, device), self.class_weights
        )

    def cut(self, plain: Examples) -> tuple[Tensor, Tensor]:
        """Rows to solve on and rows held out, of every class in proportion; all and none where there are too few."""
        targets, seed = plain.parts[0][1], self.settings.seed
        strata = targets.numpy() if targets.ndim == 1 else np.zeros(len(targets), dtype=np.int64)
        weighed = drawn(strata, min(len(strata), MOST_WEIGHED), seed)
        count = len(weighed) - round(HELD_OUT * len(weighed)) if len(weighed) >= FEWEST else len(weighed)
        trained = weighed[drawn(strata[weighed], count, seed)]
        return torch.from_numpy(trained), torch.from_numpy(np.setdiff1d(weighed, trained))

    def read(self, model: PatchedModel, split: str, augmented: bool, views: int = 1) -> Examples:
        """The cached features of a split, a part a view."""
        inputs = self.source.inputs(model, split, augmented, views)
        assert isinstance(inputs, CachedInputs), "features are cached"
        rows = slice(None) if inputs.rows is None else inputs.rows
        parts = [(x[rows].flatten(1), y[rows]) for x, y in zip(inputs.values, inputs.labels, strict=True)]
        known = [self.kind.weigh_images(y) > 0 for _, y in parts]  # nothing is known of some
        parts = [(x[kept], y[kept]) if not kept.all() else (x, y) for (x, y), kept in zip(parts, known, strict=True)]
        return Examples(parts, next(model.parameters()).device)
