"""Options that several verbs share, singly and in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from typer import Argument, Option

from modelpatch.cli.console import ForceOption, check_file, check_out, read_names
from modelpatch.cli.settings import fit_settings, parse_arguments
from modelpatch.cli.verb import option
from modelpatch.errors import MethodError, ModelpatchError

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.data.task import Task
    from modelpatch.methods.vocabulary import Vocabulary
    from modelpatch.patch.contents import Patch

T = TypeVar("T")

LOCAL = "local"
DataArgument = Annotated[
    str, Argument(help="The task's data: class folders, a manifest, hf:NAME or bundled:digits, as for fit.")
]
MethodOption = Annotated[
    str, Option("--method", "-m", help="A method, with + for several in one patch; `modelpatch methods` lists them.")
]
BackboneOption = Annotated[
    str, Option("--backbone", "-b", help="timm:NAME, torchvision:NAME, openclip:NAME/TAG, file:PATH or bundled:NAME.")
]
ArgumentOption = Annotated[
    list[str] | None, Option("--argument", help="KEY=VALUE for the backbone's constructor; may be repeated.")
]
DeviceOption = Annotated[
    str, Option("--device", help="cpu, cuda, cuda:1, mps, or auto for the fastest device of this machine.")
]
AlphaOption = Annotated[
    float | None, Option("--alpha", help="Strength of the patch, 0 (the base) to 1; by default the file's.")
]
SetOption = Annotated[
    list[str] | None,
    Option(
        "--set", help="KEY=VALUE, a hyperparameter (lr=0.003; METHOD.KEY=VALUE for one of several); may be repeated."
    ),
]
RestartOption = Annotated[bool, Option("--restart", help="Discard an interrupted run instead of resuming it.")]
SeedOption = Annotated[int, Option(help="Seed of every random choice, 0 or more.")]
RayAddressOption = Annotated[
    str, Option(help="The Ray cluster: 'local' starts one here, 'auto' finds a running one, or HOST:PORT.")
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
class Words:
    """The text tower and the words of a head that is made of class names."""

    panel: ClassVar[str] = "Words"
    text: str | None = option(None, help="The text tower: minilm, folder:PATH, own (an openclip: backbone's), or none.")
    names: Path | None = option(None, help='JSON of words for names that are no words: {"00014": "a stop sign"}.')
    template: list[str] | None = option(None, help="A prompt: 'a photo of a {}.' ({}: the name); may be repeated.")

    def open(self, backbone: Backbone) -> Vocabulary | None:
        """The vocabulary that makes heads, from --text or the backbone's own text tower; None for closed heads.

        Raises `MethodError` for words or prompts without a text tower.
        """
        from modelpatch.backbone.text_tower import OWN
        from modelpatch.methods.vocabulary import read_words, vocabulary_of

        text = OWN if self.text is None and backbone.text is not None else self.text
        if text is None or text == "none":
            if self.names is not None or self.template:
                raise MethodError("--names and --template are for heads made of words. Give --text as well.")
            return None
        words = {} if self.names is None else read_words(self.names)
        return vocabulary_of(backbone, text, self.template or (), words)


@dataclass(frozen=True)
class PatchNetwork:
    """The frozen network of a patch: by default the one that the patch's file names."""

    panel: ClassVar[str] = "Backbone"
    backbone: str | None = option(
        None, "--backbone", "-b", help="The frozen network; by default the one the patch names."
    )
    argument: ArgumentOption = None

    def open(self, patch: Patch, path: Path, device: str = "cpu") -> Backbone:
        """The backbone of the patch in the file `path`. Raises `BackboneError`, `WrongBackboneError`."""
        from modelpatch.cli.loading import backbone_of, find_device

        return backbone_of(patch, path, self.backbone, parse_arguments(self.argument), find_device(device))


@dataclass(frozen=True)
class Asked:
    """Facts about a task's data that its files do not tell. Raises `ModelpatchError` for invalid names."""

    panel: ClassVar[str] = "Data"
    kind: str | None = option(None, help="The kind of task, such as segmentation; by default what the data looks like.")
    classes: str | None = option(None, help="Names of the values of masks, comma-separated or a file with one a line.")
    ignore: int | None = option(None, help="A value of masks to ignore, beside 255.")

    def __post_init__(self) -> None:
        read_names("--classes", self.classes)

    def load(self, data: Sequence[str], seed: int) -> Task:
        """The task, several of them as one. Raises `DataError`."""
        from modelpatch.data.task import join_tasks, load_task

        kind: Any = self.kind  # checked there
        classes = read_names("--classes", self.classes) or None
        return join_tasks([load_task(one, seed=seed, kind=kind, classes=classes, ignore=self.ignore) for one in data])


@dataclass(frozen=True)
class Training:
    """The settings of a fit, the same for all verbs that train."""

    panel: ClassVar[str] = "Training"
    epochs: int = option(10, help="Passes over the training images, 1 or more, equal for all candidates.")
    batch_size: int = option(32, help="Images a step, 1 or more.")
    image_size: int | None = option(None, help="Pixels; by default the backbone's.")
    seed: SeedOption = 0
    option: list[str] | None = option(
        None, "--fit", help="KEY=VALUE, another setting (early_stopping=3): `modelpatch methods --settings` lists them."
    )

    def settings(self, **own: Any) -> dict[str, Any]:
        """The settings of a fit, with those that have options of the verb's `own`. Raises `TrainingError`."""
        named = {name: getattr(self, name) for name in ("epochs", "batch_size", "image_size", "seed")}
        return fit_settings(self.option, **named, **own)


@dataclass(frozen=True)
class Cluster:
    """Processes of a run: this one, or workers on Ray."""

    panel: ClassVar[str] = "Ray"
    ray_workers: int = option(0, min=0, help="Processes on Ray that share tasks and batches; 0: without Ray.")
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
    out: Path | None = option(None, "--out", "-o", help="The patch file; by default TASK.safetensors.")
    force: ForceOption = False

    def __post_init__(self) -> None:
        check_file("--out", self.out)

    def path(self, task: str) -> Path:
        """The file. Raises `ModelpatchError` if it cannot be written, and without --force for an existing one."""
        path = self.out or Path(f"{task}.safetensors")
        check_out(path, self.force)
        return path
