"""The workbench that a recipe runs on: its data, backbones and fits at one scale, and its finished jobs on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from rich.console import Console
from rich.progress import track

import modelpatch
from modelpatch import Backbone, Patch, Task, fit, load_backbone
from modelpatch.errors import TrainingError
from modelpatch.methods import Method, make_method
from modelpatch_studies.data import Sources
from modelpatch_studies.recipe import Figures, Job, Recipe
from modelpatch_studies.results import Results
from modelpatch_studies.scoring import Reader

T = TypeVar("T")
JOBS = "jobs.jsonl"


class Workbench:
    """Loads what a recipe needs at one scale and runs its jobs. Objects made by `once` are kept until the recipe ends.

    `backbone` replaces the scale's backbones by one specification; `seeds` the number of its seeds, which start at `seed`.
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
        chosen = recipe.scales[scale]
        chosen = chosen if backbone is None else replace(chosen, backbones=(backbone,))
        self.scale = chosen if seeds is None else replace(chosen, seeds=seeds)
        self.scale.check()
        self.recipe = replace(
            recipe, scales={**recipe.scales, scale: self.scale}
        )  # the report shows the scale that ran
        self.scale_name, self.sources, self.progress = scale, sources, progress
        self.seeds = range(seed, seed + self.scale.seeds)
        self.device = device or torch.device("cpu")
        self._made: dict[Hashable, Any] = {}

    # for recipes ----------------------------------------------------------------------------------------------

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, which is called at the first use of the key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def latest(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make` for the key; only that of the latest key is kept under each name, to save memory."""
        kept = self._made.get(("latest", name))
        if kept is None or kept[0] != key:
            kept = self._made["latest", name] = (key, make())
        return cast(T, kept[1])

    def task(self, name: str) -> Task:
        """A data set of the scale, cut to the scale's numbers of images."""
        return self.once(("task", name), lambda: self._load(name))

    def tasks(self) -> dict[str, Task]:
        """All data sets of the scale, by name."""
        return {name: self.task(name) for name in self.scale.data}

    def backbone(self, number: int = 0) -> Backbone:
        """One of the scale's backbones, with initial weights if the scale's options have `pretrained=False`."""
        spec = self.scale.backbones[number]
        pretrained = self.scale.options.get("pretrained", True)
        return self.once(("backbone", spec), lambda: load_backbone(spec, pretrained=pretrained).to(self.device))

    def method(self, row: str) -> Method:
        """The method of a row."""
        return make_method(self.scale.methods[row])

    def settings(self, data: Task, seed: int) -> dict[str, Any]:
        """The settings of a fit on this data; the scale's number of steps, if it has one, becomes epochs."""
        given = {**self.scale.fit, "seed": seed}
        if self.scale.steps is not None:
            given["epochs"] = max(1, math.ceil(self.scale.steps * self.batch_size / len(data.train)))
        return given

    def fit(self, backbone: Backbone, data: Task, method: Method, seed: int) -> Patch:
        """A patch trained with the scale's settings."""
        return fit(backbone, data, method, **self.settings(data, seed))

    def accuracy(self, backbone: Backbone, data: Task, method: Method, seed: int) -> float:
        """Top-1 in percent on the test images of a patch trained with the scale's settings."""
        return 100 * self.fit(backbone, data, method, seed).metrics["test_top1"]

    def reader(self, backbone: Backbone, seed: int) -> Reader:
        """A reader of images at the scale's size, and of their features."""
        return Reader(backbone, backbone.preprocessing.with_image_size(self.scale.fit.get("image_size")), seed)

    @property
    def batch_size(self) -> int:
        return self.scale.fit.get("batch_size", 32)

    def _load(self, name: str) -> Task:
        data = self.sources.load(name)
        if self.scale.images is not None:
            data = data.subsample(self.scale.images)
        tested = self.scale.tested
        if tested is not None and tested < len(data.test):
            whole = replace(data, train=data.test, validation=None).with_validation(tested / len(data.test), seed=0)
            assert whole.validation is not None
            data = replace(data, test=whole.validation)
        return data

    # running ------------------------------------------------------------------------------------------------

    def run(self, folder: Path) -> Results:
        """Run all jobs that `folder` does not hold yet and return the results of all. Raises what a fit raises."""
        folder.mkdir(parents=True, exist_ok=True)
        identity, file = self._identity(), folder / JOBS
        done = read_jobs(file)
        figures: dict[tuple[str, str], dict[int, float]] = {}
        seconds = 0.0
        jobs = list(self.recipe.jobs(self))
        console = Console(stderr=True, quiet=not self.progress)
        for job in track(jobs, self.recipe.name, console=console, transient=True, disable=not console.is_terminal):
            what = {**identity, "row": job.row, "columns": list(job.columns), "seed": job.seed}
            key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
            if key not in done:
                done[key] = self._run(job)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": key, "job": job.name, **done[key]}) + "\n")
            for column in job.columns:
                figures.setdefault((job.row, column), {})[job.seed] = done[key]["figures"][column]
            seconds += done[key]["seconds"]
        self._made.clear()
        return Results(self.recipe, self.scale_name, figures, round(seconds, 1), self._facts())

    def _run(self, job: Job) -> dict[str, Any]:
        """The job's figures and seconds. Raises `TrainingError` if they are not those of its columns."""
        begin = time.perf_counter()
        measured: Figures = {column: float(value) for column, value in job.work().items()}
        if measured.keys() != set(job.columns):
            raise TrainingError(f"{self.recipe.name}: {job.name} gave figures for {sorted(measured)}.")
        return {"figures": measured, "seconds": round(time.perf_counter() - begin, 2)}

    def _identity(self) -> dict[str, Any]:
        """All that a finished job depends on: the scale, every image, every weight, the version."""
        return {
            "recipe": self.recipe.name,
            "modelpatch": modelpatch.__version__,
            "settings": {name: value for name, value in self.scale.as_dict().items() if name != "seeds"},
            "data": {name: [data.train.digest, data.test.digest] for name, data in self.tasks().items()},
            "backbones": [self.backbone(number).fingerprint for number in range(len(self.scale.backbones))],
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "images": {name: [len(data.train), len(data.test)] for name, data in self.tasks().items()},
            "backbones": list(self.scale.backbones),
            "seeds": list(self.seeds),
            "torch": torch.__version__,
            "modelpatch": modelpatch.__version__,
            "device": self.device.type,
        }


def read_jobs(file: Path) -> dict[str, dict[str, Any]]:
    """Finished jobs by key; a last line that a killed run left incomplete is dropped. Raises `TrainingError`."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        file.write_bytes(whole)
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = {"figures": entry["figures"], "seconds": entry["seconds"]}
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{file}, line {number} is not a finished job. Name another --out, or remove it."
            ) from error
    return found
