"""Many tasks on one body: images are decoded once, features computed once a body, every task answered by its own head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.convert.merging import merge
from modelpatch.data.images import ImageStore
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.scale_bias import recompute_statistics
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.recipes.tradeoff import Accuracy, Point, Role
from modelpatch.train.cache import run_prefix
from modelpatch.train.evaluation import MEMORY
from modelpatch.train.probe import fit_probe

Norms = Literal["kept", "shared", "task"]
BATCH = 64
STATISTICS_IMAGES = 512  # of every task, at most, when BatchNorm's statistics are measured again


@dataclass(frozen=True)
class ScoredTask:
    """A task with held-out images and the head that answers it on the base's features."""

    data: Task
    role: Role
    head: nn.Module

    @property
    def name(self) -> str:
        return self.data.task.name


class Scorer:
    """Measures bodies on tasks.

    `refit` fits every linear head anew on each body's own training features (closed vocabularies only). `norms` says what
    BatchNorm's statistics are after weights were mixed: the mixed ones, measured again over all tasks' images together
    (`shared`), or over each task's own (`task`), always in random order.
    """

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Preprocessing,
        refit: bool = False,
        norms: Norms = "kept",
        seed: int = 0,
    ) -> None:
        self.backbone, self.preprocessing, self.seed = backbone, preprocessing, seed
        self.refit, self.norms = refit, norms
        self._stores: dict[int, ImageStore] = {}

    def store(self, split: Split) -> ImageStore:
        """The split's images, decoded once."""
        if id(split) not in self._stores:
            self._stores[id(split)] = ImageStore(split, self.preprocessing, MEMORY)
        return self._stores[id(split)]

    def features(self, model: PatchedModel, split: Split) -> Tensor:
        """The body's features (N, D) for the split's images, on the CPU."""
        return self._run(split, lambda images: run_prefix(model, images, model.end))

    def base_features(self, split: Split) -> Tensor:
        """The frozen base's."""
        return self._run(split, lambda images: self.backbone.chain(images.to(self.backbone.device)))

    @torch.no_grad()
    def _run(self, split: Split, body: Callable[[Tensor], Tensor]) -> Tensor:
        store = self.store(split)
        return torch.cat([body(store.plain(rows)).cpu() for rows in torch.arange(len(store)).split(BATCH)])

    def probe(self, data: Task) -> LinearHead:
        """A linear head on the base's features of the task's training images."""
        return fit_probe(self.base_features(data.train), torch.from_numpy(data.train.labels), len(data.classes))

    def labelled(self, split: Split, batch: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and their classes in a random order that follows the seed."""
        store = self.store(split)
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(self.seed))[:limit]
        for rows in order.split(batch):
            yield store.plain(rows).to(self.backbone.device), store.labels[rows]

    def point(
        self, patch: Patch, tasks: Sequence[ScoredTask], weights: Sequence[float], untouched: bool = False
    ) -> Point:
        """Every task's accuracy on the patched body; `untouched` leaves heads and statistics as they are."""
        model = self.backbone.patched(patch)
        norms = "kept" if untouched else self.norms
        if norms == "shared":
            self.measure_statistics(model, [task.data for task in tasks])
        accuracies = {}
        for task in tasks:
            if norms == "task":
                self.measure_statistics(model, [task.data])
            accuracies[task.name] = self._accuracy(model, task, self.refit and not untouched)
        return Point(tuple(weights), accuracies)

    def measure_statistics(self, model: PatchedModel, tasks: Sequence[Task]) -> None:
        """BatchNorm's statistics over training images of all tasks, as many of each, shuffled together (REPAIR's reset)."""
        count = min(STATISTICS_IMAGES, *(len(task.train) for task in tasks))
        generator = np.random.default_rng(self.seed)
        pool = [(task.train, row) for task in tasks for row in generator.permutation(len(task.train))[:count]]
        order = generator.permutation(len(pool))

        def batches() -> Iterator[Tensor]:
            for numbers in torch.from_numpy(order).split(BATCH):
                rows = [pool[number] for number in numbers.tolist()]
                images = [self.store(split).plain(torch.tensor([row])) for split, row in rows]
                yield torch.cat(images).to(self.backbone.device)

        recompute_statistics(model, batches)

    def _accuracy(self, model: PatchedModel, task: ScoredTask, refit: bool) -> Accuracy:
        head = task.head
        if refit and isinstance(head, LinearHead):
            features = self.features(model, task.data.train)
            head = fit_probe(features, torch.from_numpy(task.data.train.labels), len(task.data.classes))
        assert task.data.validation is not None
        shares = []
        for split in (task.data.validation, task.data.test):
            with torch.no_grad():
                answers = head(self.features(model, split)).argmax(1)
            shares.append(float((answers == self.store(split).labels).double().mean()))
        return Accuracy(task.role, *shares)


def mixed(backbone: Backbone, patches: Sequence[Patch], weights: Sequence[float]) -> Patch:
    """W + sum of weights times the patches' changes. One patch keeps its tensors and is only turned."""
    if len(patches) == 1 and 0 <= weights[0] <= 1:
        return patches[0].at_strength(weights[0])
    return merge(backbone, patches, weights=weights)


def with_statistics(backbone: Backbone, patch: Patch, model: PatchedModel) -> Patch:
    """The patch as one of strength 1 that owns the BatchNorm statistics its model has now."""
    baked = merge(backbone, [patch], weights=[1.0])
    owned = {}
    modules = dict(model.named_buffers())
    for number, segment in enumerate(backbone.chain):
        part = f"parts.{model.starts.index(number)}." if number in model.starts else None
        for local, name in segment.tensor_names.items():
            if part and local.endswith(("running_mean", "running_var")):
                owned[f"replace/{name}"] = modules[part + local].detach().cpu().float().clone()
    kept = {name: tensor for name, tensor in baked.tensors.items() if f"replace/{name.partition('/')[2]}" not in owned}
    return replace(patch, tensors={**kept, **owned}, strength=1.0, int8=frozenset())
