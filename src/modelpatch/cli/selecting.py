"""What the verbs that choose what to patch share: the options of a study, and its opening."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modelpatch.backbone.backbone import Backbone
from modelpatch.cli.options import Network, PatchFile, Training
from modelpatch.cli.outputs import check_file, tell
from modelpatch.data.task import Task, load_task
from modelpatch.errors import ModelpatchError
from modelpatch.select.budget import parse_bytes, parse_latency
from modelpatch.select.cluster import LOCAL
from modelpatch.select.latency import is_busy

MethodOption = Annotated[
    str, typer.Option("--method", "-m", help="What is done to the chosen blocks; any method, with + for several.")
]
HalvingOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="N, 2 or more: train all candidates for few epochs, one of N, the best, for N times as many, and so on; "
        "0: all for all epochs.",
    ),
]
FoldsOption = Annotated[int, typer.Option(min=1, help="Folds of the training images; 1: one held-out split.")]


@dataclass(frozen=True)
class Limits:
    """What a chosen patch may cost at most. Raises `ModelpatchError` for what is no number of bytes or share of time."""

    max_bytes: Annotated[str | None, typer.Option(help="The largest file: 200KB, 1.5MB.")] = None
    max_latency: Annotated[str | None, typer.Option(help="The most time the patch may add to the base's: +15%.")] = None

    def __post_init__(self) -> None:
        self.read()

    def warn(self, console: Console) -> None:
        """Say so where times are to be measured beside other work."""
        if self.max_latency is not None and is_busy():
            tell(
                console,
                "this machine is busy: times measured now may be wrong. Choose within --max-latency while it rests.",
            )

    def read(self) -> dict[str, Any]:
        """The limits as numbers, for `select` and `search`."""
        return {
            "max_bytes": None if self.max_bytes is None else parse_bytes(self.max_bytes),
            "max_latency": None if self.max_latency is None else parse_latency(self.max_latency),
        }


@dataclass(frozen=True)
class Study:
    """How candidates are trained side by side, and where their outcomes are kept."""

    images: Annotated[
        int | None, typer.Option(min=1, help="Use this many of the training images, stratified; by default all.")
    ] = None
    seeds: Annotated[int, typer.Option(min=1, help="Trials a candidate and fold, with this many seeds.")] = 1
    workers: Annotated[int, typer.Option(min=1, help="Processes that train candidates side by side.")] = 1
    ray: Annotated[bool, typer.Option("--ray", help="Run the workers on Ray (see --ray-address).")] = False
    ray_address: Annotated[
        str, typer.Option(help="The cluster: 'local' starts one here, 'auto' finds a running one, or HOST:PORT.")
    ] = LOCAL
    trials: Annotated[
        Path | None,
        typer.Option(help="A file of outcomes: what is in it is not trained again. By default TASK.trials.jsonl."),
    ] = None
    same_steps: Annotated[
        bool,
        typer.Option(
            "--same-steps",
            help="Candidates train longer on their folds, about the steps of the patch; else its epochs.",
        ),
    ] = False
    disk: Annotated[str, typer.Option(help="The most that cached activations may take in temporary files.")] = "16GB"

    def __post_init__(self) -> None:
        """Raises `ModelpatchError` for an address without --ray, or a --disk that is no number of bytes."""
        if not self.ray and self.ray_address != LOCAL:
            raise ModelpatchError(f"--ray-address {self.ray_address} is given without --ray. Give both.")
        parse_bytes(self.disk)

    def open(self, data: str, network: Network, training: Training, file: PatchFile | None = None) -> OpenStudy:
        """Everything checked, the task's images read and the backbone loaded, in the order of what fails soonest."""
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
            "progress": True,
        }
        return OpenStudy(network.open(), task, {**options, **settings})


@dataclass(frozen=True)
class OpenStudy:
    """A study about to begin; `options` are what `profile`, `select` and `search` take alike."""

    backbone: Backbone
    task: Task
    options: dict[str, Any]

    @property
    def kept(self) -> str:
        """For people: what was written, and where the outcomes are."""
        written = f"wrote {self.options['out']}" if "out" in self.options else ""
        size = f" ({self.options['out'].stat().st_size:,} bytes); " if written else ""
        return f"{written}{size}outcomes kept in {self.options['trials']}"


def parse_counts(option: str, text: str) -> list[int]:
    """`N1,N2,...` of an option as numbers above 0. Raises `ModelpatchError`."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ModelpatchError(f"{option} {text!r} is not N1,N2,...: whole numbers above 0.")
    return counts
