"""The options of verbs that train many candidates: limits, trials, workers, folds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from modelpatch.cli.console import check_file, tell
from modelpatch.cli.options import LOCAL, Network, PatchFile, RayAddressOption, Training
from modelpatch.cli.runs import QUIET
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from rich.console import Console

    from modelpatch.backbone.backbone import Backbone
    from modelpatch.data.task import Task

HalvingOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="N, 2 or more: successive halving. All candidates train for few epochs, the best 1/N for N times as many, and "
        "so on; 0: all train for all epochs.",
    ),
]
FoldsOption = Annotated[int, typer.Option(min=1, help="Folds of the training images; 1: one held-out split.")]


@dataclass(frozen=True)
class Limits:
    """Limits of a chosen patch. Raises `ModelpatchError` for invalid numbers of bytes or shares of time."""

    panel: ClassVar[str] = "Limits"
    max_bytes: Annotated[str | None, typer.Option(help="The largest patch file: 200KB, 1.5MB.")] = None
    max_latency: Annotated[str | None, typer.Option(help="Time that the patch may add to the base's: +15%.")] = None

    def __post_init__(self) -> None:
        self.read()

    def warn(self, console: Console) -> None:
        """Warn if times are to be measured on a busy machine."""
        from modelpatch.select.budget import is_busy

        if self.max_latency is not None and is_busy():
            tell(
                console,
                "this machine is busy: times measured now may be wrong. Use --max-latency on an idle machine.",
            )

    def read(self) -> dict[str, Any]:
        """The limits as numbers, for `select` and `search`."""
        from modelpatch.select.budget import parse_bytes, parse_latency

        return {
            "max_bytes": None if self.max_bytes is None else parse_bytes(self.max_bytes),
            "max_latency": None if self.max_latency is None else parse_latency(self.max_latency),
        }


@dataclass(frozen=True)
class Study:
    """Trials of candidates: images, seeds, workers, and the file of their outcomes."""

    panel: ClassVar[str] = "Trials"
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of training images to use, stratified; by default all.")
    ] = None
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each candidate and fold.")] = 1
    workers: Annotated[int, typer.Option(min=1, help="Processes that train candidates side by side.")] = 1
    ray: Annotated[bool, typer.Option("--ray", help="Run the workers on Ray (see --ray-address).")] = False
    ray_address: RayAddressOption = LOCAL
    trials: Annotated[
        Path | None,
        typer.Option(help="The file of outcomes, by default TASK.trials.jsonl; trials in it are not repeated."),
    ] = None
    same_steps: Annotated[
        bool,
        typer.Option(
            "--same-steps",
            help="Train candidates on their folds for the steps of the final patch instead of its epochs.",
        ),
    ] = False
    disk: Annotated[str, typer.Option(help="Temporary files for cached activations, at most.")] = "16GB"

    def __post_init__(self) -> None:
        """Raise `ModelpatchError` for an address without --ray and for an invalid --disk."""
        from modelpatch.select.budget import parse_bytes

        if not self.ray and self.ray_address != LOCAL:
            raise ModelpatchError(f"--ray-address {self.ray_address} is given without --ray. Give both.")
        parse_bytes(self.disk)
        check_file("--trials", self.trials)

    def open(self, data: str, network: Network, training: Training, file: PatchFile | None = None) -> OpenStudy:
        """Check everything, read the task and load the backbone: the checks that fail soonest come first."""
        from modelpatch.data.task import load_task
        from modelpatch.select.budget import parse_bytes

        settings = training.settings()
        task = load_task(data, seed=training.seed)
        if self.images is not None:
            task = task.subsample(self.images, training.seed)
        trials = self.trials or Path(f"{task.task.name}.trials.jsonl")
        options: dict[str, Any] = {} if file is None else {"out": file.path(task.task.name)}
        check_file("--trials", trials)
        options |= {
            "seeds": self.seeds,
            "workers": self.workers,
            "ray": self.ray_address if self.ray else None,
            "trials": trials,
            "disk": parse_bytes(self.disk),
            "same_steps": self.same_steps,
            "progress": not QUIET.get(),
        }
        return OpenStudy(network.open(), task, {**options, **settings})


@dataclass(frozen=True)
class OpenStudy:
    """A study about to begin; `options` are the common arguments of `profile`, `select` and `search`."""

    backbone: Backbone
    task: Task
    options: dict[str, Any]

    @property
    def kept(self) -> str:
        """A line with the files that were written."""
        written = f"wrote {self.options['out']}" if "out" in self.options else ""
        size = f" ({self.options['out'].stat().st_size:,} bytes); " if written else ""
        return f"{written}{size}outcomes kept in {self.options['trials']}"
