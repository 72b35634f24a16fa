"""Options that the verbs which choose share: folds, seeds, workers, and the file of outcomes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelpatch.errors import ModelpatchError
from modelpatch.select.budget import parse_bytes
from modelpatch.select.cluster import LOCAL
from modelpatch.train import TaskData, load_task

MethodOption = Annotated[
    str, typer.Option("--method", "-m", help="What is done to the chosen blocks; any method, with + for several.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE, a hyperparameter of the method (lr=0.003); may be repeated."),
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training images of every candidate.")]
BatchSizeOption = Annotated[int, typer.Option(help="Images a step.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Pixels; by default the backbone's.")]
FitOption = Annotated[list[str] | None, typer.Option("--fit", help="KEY=VALUE, any other setting of fit.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Trials a candidate and fold, with this many seeds.")]
HalvingOption = Annotated[
    int,
    typer.Option(help="N: train all candidates for few epochs, the best of N for N times as many, and so on; 0: off."),
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Processes that train candidates side by side.")]
RayOption = Annotated[bool, typer.Option("--ray", help="Run the workers on Ray (see --ray-address).")]
RayAddressOption = Annotated[
    str,
    typer.Option(
        "--ray-address", help="The cluster: 'local' starts one here, 'auto' finds a running one, or HOST:PORT."
    ),
]
TrialsOption = Annotated[
    Path | None,
    typer.Option(help="A file of outcomes: what is in it is not trained again. By default TASK.trials.jsonl."),
]
ImagesOption = Annotated[
    int | None, typer.Option(min=1, help="Use this many of the training images, stratified; by default all.")
]
DiskOption = Annotated[str, typer.Option(help="The most that cached activations may take in temporary files.")]


def ray_address(ray: bool, address: str) -> str | None:
    """The address of the cluster to use, None for none. Raises `ModelpatchError` for an address without --ray."""
    if not ray and address != LOCAL:
        raise ModelpatchError(f"--ray-address {address} is given without --ray. Give both.")
    return address if ray else None


def trials_file(path: Path | None, task: str) -> Path:
    """Where outcomes are kept."""
    return path or Path(f"{task}.trials.jsonl")


def load_images(data: str, images: int | None, seed: int) -> TaskData:
    """The task, with a sample of its training images if a number is given."""
    task = load_task(data, seed=seed)
    return task if images is None else task.subsample(images, seed)


def read_disk(text: str) -> int:
    """--disk in bytes."""
    return parse_bytes(text)
