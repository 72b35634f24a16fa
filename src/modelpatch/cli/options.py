"""Options that several verbs share, singly and in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import typer

from modelpatch.cli.console import ForceOption, check_file, check_free, read_names
from modelpatch.cli.settings import fit_settings, parse_arguments
from modelpatch.errors import ModelpatchError

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.data.task import Task

T = TypeVar("T")

LOCAL = "local"
DataArgument = Annotated[
    str, typer.Argument(help="The task's data: class folders, a manifest, hf:NAME or bundled:digits, as for fit.")
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help="A method, with + for several in one patch; `modelpatch methods` lists them.",
    ),
]
BackboneOption = Annotated[
    str,
    typer.Option("--backbone", "-b", help="timm:NAME, torchvision:NAME, openclip:NAME/TAG, file:PATH or bundled:NAME."),
]
PatchBackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="The frozen network; by default the one the patch names."),
]
ArgumentOption = Annotated[
    list[str] | None, typer.Option("--argument", help="KEY=VALUE for the backbone's constructor; may be repeated.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto for the fastest device of this machine.")
]
AlphaOption = Annotated[
    float | None,
    typer.Option("--alpha", help="Strength of the patch, 0 (the base) to 1; by default the file's."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE, a hyperparameter of the method (lr=0.003; METHOD.KEY=VALUE for one of several); may be repeated.",
    ),
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Discard an interrupted run instead of resuming it.")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice, 0 or more.")]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="The text tower that makes a head of class names: minilm, folder:PATH of a sentence encoder, own "
        "(an openclip: backbone's), or none."
    ),
]
NamesOption = Annotated[
    Path | None, typer.Option(help='JSON of words for class names that are no words: {"00014": "a stop sign"}.')
]
TemplateOption = Annotated[
    list[str] | None, typer.Option(help="A prompt with {} for the name, such as 'a photo of a {}.'; may be repeated.")
]
RayAddressOption = Annotated[
    str, typer.Option(help="The Ray cluster: 'local' starts one here, 'auto' finds a running one, or HOST:PORT.")
]


@dataclass(frozen=True)
class Network:
    """The frozen network and its device. Raises `ModelpatchError` for impossible arguments or an absent device."""

    panel: ClassVar[str] = "Backbone"
    backbone: BackboneOption = "bundled:tiny"
    argument: ArgumentOption = None
    device: DeviceOption = "cpu"

    def __post_init__(self) -> None:
        from modelpatch.cli.loading import find_device

        parse_arguments(self.argument)
        find_device(self.device)

    def open(self) -> Backbone:
        """The backbone, on its device."""
        from modelpatch.cli.loading import find_device, open_backbone

        return open_backbone(self.backbone, parse_arguments(self.argument), find_device(self.device))


@dataclass(frozen=True)
class Asked:
    """Facts about a task's data that its files do not tell. Raises `ModelpatchError` for invalid names."""

    panel: ClassVar[str] = "Data"
    kind: Annotated[
        str | None,
        typer.Option(help="The kind of task, such as segmentation; by default the one that the data looks like."),
    ] = None
    classes: Annotated[
        str | None,
        typer.Option(help="Names of the values of masks from 0 on, comma-separated or a file with one a line."),
    ] = None
    ignore: Annotated[int | None, typer.Option(help="A value of masks to ignore, beside 255.")] = None

    def __post_init__(self) -> None:
        read_names("--classes", self.classes)

    def load(self, data: Sequence[str], seed: int) -> Task:
        """The task, several of them as one. Raises `DataError`."""
        from modelpatch.data.joining import join_tasks
        from modelpatch.data.task import load_task

        kind: Any = self.kind  # checked there
        classes = read_names("--classes", self.classes) or None
        return join_tasks([load_task(one, seed=seed, kind=kind, classes=classes, ignore=self.ignore) for one in data])


@dataclass(frozen=True)
class Training:
    """The settings of a fit, the same for all verbs that train."""

    panel: ClassVar[str] = "Training"
    epochs: Annotated[
        int, typer.Option(help="Passes over the training images, 1 or more, equal for all candidates.")
    ] = 10
    batch_size: Annotated[int, typer.Option(help="Images a step, 1 or more.")] = 32
    image_size: Annotated[int | None, typer.Option(help="Pixels; by default the backbone's.")] = None
    seed: SeedOption = 0
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--fit",
            help="KEY=VALUE, any other setting of fit (label_smoothing=0.1, early_stopping=3); "
            "`modelpatch methods --settings` lists them.",
        ),
    ] = None

    def settings(self, **own: Any) -> dict[str, Any]:
        """The settings of a fit, with those that have options of the verb's `own`. Raises `TrainingError`."""
        named = {name: getattr(self, name) for name in ("epochs", "batch_size", "image_size", "seed")}
        return fit_settings(self.option, **named, **own)


@dataclass(frozen=True)
class Cluster:
    """Processes of a run: this one, or workers on Ray."""

    panel: ClassVar[str] = "Ray"
    ray_workers: Annotated[
        int,
        typer.Option(min=0, help="Train on Ray with this many processes that share tasks and batches; 0: without Ray."),
    ] = 0
    ray_address: RayAddressOption = LOCAL

    def __post_init__(self) -> None:
        """Raise `ModelpatchError` for an address without workers."""
        if not self.ray_workers and self.ray_address != LOCAL:
            raise ModelpatchError(f"--ray-address {self.ray_address} is given without --ray-workers. Give both.")

    def run(self, work: Callable[[], T]) -> T:
        """Run the work here or on the cluster and return its result."""
        if not self.ray_workers:
            return work()
        from modelpatch.train.ray import run_on_ray

        return run_on_ray(work, self.ray_workers, address=self.ray_address)


@dataclass(frozen=True)
class PatchFile:
    """The file of a trained patch. Raises `ModelpatchError` for one that cannot be written."""

    panel: ClassVar[str] = "Files"
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The patch file; by default TASK.safetensors.")] = None
    force: ForceOption = False

    def __post_init__(self) -> None:
        check_file("--out", self.out)

    def path(self, task: str) -> Path:
        """The file. Raises `ModelpatchError` if it cannot be written, and without --force for an existing one."""
        path = self.out or Path(f"{task}.safetensors")
        check_file("--out", path)
        check_free("--out", [path], self.force)
        return path
