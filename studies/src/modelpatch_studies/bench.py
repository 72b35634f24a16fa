"""Where recipes run: their data, backbones and fits at one scale, and the parts that are done, kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

import modelpatch
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Split, Task, stratified
from modelpatch.errors import TrainingError
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.patch.contents import Patch
from modelpatch.recipes.scoring import Scorer
from modelpatch.select.journal import Journal
from modelpatch.train import fit
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch_studies.data import Sources
from modelpatch_studies.outcome import Outcome
from modelpatch_studies.recipe import Recipe

T = TypeVar("T")
PARTS = "parts.jsonl"


@dataclass(frozen=True)
class Measured:
    """What a part gave."""

    figures: dict[str, float]
    seconds: float


class Bench:
    """A recipe's surroundings at one scale. What is loaded or made `once` is kept until the recipe is done.

    `backbone` replaces the scale's backbones by one specification; `seeds` their number of seeds, counted from `seed`.
    """

    def __init__(
        self,
        recipe: Recipe,
        scale: str,
        sources: Sources,
        *,
        seed: int = 0,
        seeds: int | None = None,
        backbone: str | None = None,
        device: torch.device | None = None,
        progress: bool = False,
    ) -> None:
        if scale not in recipe.scales:
            raise TrainingError(f"{recipe.name} has no scale {scale!r}. Expected one of: {', '.join(recipe.scales)}.")
        self.scale_name, self.scale = scale, recipe.scales[scale]
        if backbone is not None:
            self.scale = replace(self.scale, backbones=(backbone,))
        if seeds is not None:
            self.scale = replace(self.scale, seeds=seeds)
        self.scale.check()
        self.recipe = replace(recipe, scales={**recipe.scales, scale: self.scale})  # what is reported is what ran
        self.sources, self.progress = sources, progress
        self.seeds = range(seed, seed + self.scale.seeds)
        self.device = device or torch.device("cpu")
        self._made: dict[Hashable, Any] = {}

    # what recipes use ---------------------------------------------------------------------------------------

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made when it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def latest(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives for the key, until another key is asked for under this name: for what is large."""
        kept = self._made.get(("latest", name))
        if kept is None or kept[0] != key:
            kept = self._made["latest", name] = (key, make())
        return cast(T, kept[1])

    def task(self, name: str) -> Task:
        """A data set of the scale, with as many images as it takes."""
        return self.once(("task", name), lambda: self._load(name))

    def tasks(self) -> dict[str, Task]:
        """All data sets of the scale, by name."""
        return {name: self.task(name) for name in self.scale.data}

    def backbone(self, number: int = 0) -> Backbone:
        """One of the scale's backbones, with random weights where its options have `pretrained=False`."""
        spec = self.scale.backbones[number]
        pretrained = self.scale.options.get("pretrained", True)
        return self.once(("backbone", spec), lambda: load_backbone(spec, pretrained=pretrained).to(self.device))

    def method(self, row: str) -> Method:
        """The method behind a row."""
        return make_method(self.scale.methods[row])

    def settings(self, data: Task, seed: int) -> dict[str, Any]:
        """The settings of a fit on this data; as many epochs as make the scale's steps, if it has any."""
        given = {**self.scale.fit, "seed": seed}
        if self.scale.steps is not None:
            given["epochs"] = max(1, math.ceil(self.scale.steps * given.get("batch_size", 32) / len(data.train)))
        return given

    def fit(self, backbone: Backbone, data: Task, method: Method, seed: int) -> Patch:
        """A patch under the scale's settings."""
        return fit(backbone, data, method, **self.settings(data, seed))

    def accuracy(self, backbone: Backbone, data: Task, method: Method, seed: int) -> float:
        """Top-1 in percent on the test images of a patch under the scale's settings."""
        return 100 * self.fit(backbone, data, method, seed).metrics["test_top1"]

    def scorer(self, backbone: Backbone, seed: int) -> Scorer:
        """What yields a split's normalised images at the scale's size, and probes of the base's features."""
        return Scorer(backbone, backbone.preprocessing.with_image_size(self.scale.fit.get("image_size")), seed=seed)

    @property
    def batch_size(self) -> int:
        return self.scale.fit.get("batch_size", 32)

    def _load(self, name: str) -> Task:
        data = self.sources.load(name)
        if self.scale.images is not None:
            data = data.subsample(self.scale.images)
        if self.scale.tested is not None and self.scale.tested < len(data.test):
            data = replace(data, test=_sample(data.test, self.scale.tested))
        return data

    # running ------------------------------------------------------------------------------------------------

    def run(self, folder: Path) -> Outcome:
        """All parts that `folder` does not hold yet, and the outcome of all. Raises what fits raise."""
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(Measured, folder / PARTS)
        identity, facts = self._identity(), self._facts()
        figures: dict[tuple[str, str], dict[int, float]] = {}
        seconds = 0.0
        parts = list(self.recipe.parts(self))
        bar = Progress(self.recipe.name) if self.progress else quiet_progress()
        with bar, bar.task("parts", len(parts)) as advance:
            for part in parts:
                what = {**identity, "row": part.row, "columns": list(part.columns), "seed": part.seed}
                key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
                if key not in journal.outcomes:
                    bar.note(part.name)
                    began = time.perf_counter()
                    measured = {column: float(value) for column, value in part.work().items()}
                    if measured.keys() != set(part.columns):
                        raise TrainingError(f"{self.recipe.name}: {part.name} gave figures for {sorted(measured)}.")
                    took = round(time.perf_counter() - began, 2)
                    journal.add(key, {"part": part.name}, Measured(measured, took))
                done = journal.outcomes[key]
                for column in part.columns:
                    figures.setdefault((part.row, column), {})[part.seed] = done.figures[column]
                seconds += done.seconds
                advance(1)
        self._made.clear()
        return Outcome(self.recipe, self.scale_name, figures, round(seconds, 1), facts)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a part to be taken as done: the scale, every image, every weight."""
        settings = {name: value for name, value in self.scale.as_dict().items() if name != "seeds"}
        return {
            "recipe": self.recipe.name,
            "modelpatch": modelpatch.__version__,
            "settings": settings,
            "data": {name: [data.train.digest, data.test.digest] for name, data in self.tasks().items()},
            "backbones": [self.backbone(number).fingerprint for number in range(len(self.scale.backbones))],
        }

    def _facts(self) -> dict[str, Any]:
        counts = {name: [len(data.train), len(data.test)] for name, data in self.tasks().items()}
        return {
            "images": counts,
            "backbones": list(self.scale.backbones),
            "seeds": list(self.seeds),
            "torch": torch.__version__,
            "modelpatch": modelpatch.__version__,
            "device": self.device.type,
        }


def _sample(split: Split, count: int) -> Split:
    """About `count` images, as many of each class as it has of all."""
    _, rows = stratified(split.labels, count / len(split), seed=0)
    return split.take(rows)
