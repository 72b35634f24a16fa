"""Options that several verbs share, and how they become backbones, devices and settings."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.text_tower import OWN
from modelpatch.cli.outputs import ForceOption, check_file, check_free, read_names
from modelpatch.data.joining import join_tasks
from modelpatch.data.splits import split_seed
from modelpatch.data.task import Task, load_task
from modelpatch.engine.cascade import Cascade, is_cascade
from modelpatch.errors import (
    BackboneError,
    CascadeError,
    ForeignTensorError,
    MethodError,
    ModelpatchError,
    TrainingError,
    TrainingWarning,
    UnknownBackboneError,
    UnknownGraftError,
    WrongBackboneError,
)
from modelpatch.methods.vocabulary import Vocabulary, read_words, vocabulary_of
from modelpatch.patch.contents import Patch
from modelpatch.train.evaluation import facts_of
from modelpatch.train.fitting import FitSettings
from modelpatch.train.ray import LOCAL, run_on_ray

T = TypeVar("T")

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
    str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps, or auto for the fastest there is.")
]
AlphaOption = Annotated[
    float | None,
    typer.Option("--alpha", help="Apply this share of the change, 0 (the base) to 1; by default what the file says."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE, a hyperparameter of the method (lr=0.003), of one of several METHOD.KEY=VALUE; may be repeated.",
    ),
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Forget an interrupted run instead of resuming it.")]
SeedOption = Annotated[int, typer.Option(help="Every random choice follows it: a whole number from 0 on.")]
TextOption = Annotated[
    str | None,
    typer.Option(
        help="Answer by words: minilm, folder:PATH of a sentence encoder, own (an openclip: backbone's), or none."
    ),
]
NamesOption = Annotated[
    Path | None, typer.Option(help='JSON of words for classes whose names are none: {"00014": "a stop sign"}.')
]
TemplateOption = Annotated[
    list[str] | None, typer.Option(help="A prompt with {} for the name, such as 'a photo of a {}.'; may be repeated.")
]
RESERVED = {"spec", "preprocessing"}  # parameters of `load_backbone` that no text can give


# groups -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """The frozen network and where it computes. Raises `ModelpatchError` for arguments or a device that cannot be."""

    backbone: BackboneOption = "bundled:tiny"
    argument: ArgumentOption = None
    device: DeviceOption = "cpu"

    def __post_init__(self) -> None:
        parse_arguments(self.argument)
        find_device(self.device)

    def open(self) -> Backbone:
        """The backbone, on its device."""
        return open_backbone(self.backbone, parse_arguments(self.argument), find_device(self.device))


@dataclass(frozen=True)
class Asked:
    """What a task's data is, where that cannot be seen from it. Raises `ModelpatchError` for names that are none."""

    kind: Annotated[
        str | None, typer.Option(help="classification, segmentation or detection; by default what the data looks like.")
    ] = None
    classes: Annotated[
        str | None,
        typer.Option(help="Names of the values of masks from 0 on, comma-separated or a file with one a line."),
    ] = None
    ignore: Annotated[int | None, typer.Option(help="A value of masks that is no class, beside 255.")] = None

    def __post_init__(self) -> None:
        read_names("--classes", self.classes)

    def load(self, data: Sequence[str], seed: int) -> Task:
        """The task, several of them as one. Raises `DataError`."""
        kind: Any = self.kind  # checked there
        classes = read_names("--classes", self.classes) or None
        return join_tasks([load_task(one, seed=seed, kind=kind, classes=classes, ignore=self.ignore) for one in data])


@dataclass(frozen=True)
class Training:
    """How a fit runs, alike for all verbs that train."""

    epochs: Annotated[
        int, typer.Option(help="Passes over the training images, 1 or more, equal for all that is compared.")
    ] = 10
    batch_size: Annotated[int, typer.Option(help="Images a step, 1 or more.")] = 32
    image_size: Annotated[int | None, typer.Option(help="Pixels; by default the backbone's.")] = None
    seed: SeedOption = 0
    option: Annotated[
        list[str] | None,
        typer.Option("--fit", help="KEY=VALUE, any other setting of fit (label_smoothing=0.1, early_stopping=3, ...)."),
    ] = None

    def settings(self, **own: Any) -> dict[str, Any]:
        """The settings of a fit, with those for which the verb has options of its `own`. Raises `TrainingError`."""
        named = {name: getattr(self, name) for name in ("epochs", "batch_size", "image_size", "seed")}
        return fit_settings(self.option, **named, **own)


@dataclass(frozen=True)
class Cluster:
    """Whether a run is done here or on Ray."""

    ray_workers: Annotated[
        int, typer.Option(min=0, help="Train on Ray, with this many processes that share tasks and batches; 0: here.")
    ] = 0
    ray_address: Annotated[
        str, typer.Option(help="The cluster: 'local' starts one here, 'auto' finds a running one, or HOST:PORT.")
    ] = LOCAL

    def __post_init__(self) -> None:
        """Raises `ModelpatchError` for an address without workers."""
        if not self.ray_workers and self.ray_address != LOCAL:
            raise ModelpatchError(f"--ray-address {self.ray_address} is given without --ray-workers. Give both.")

    def run(self, work: Callable[[], T]) -> T:
        """What the work returns, here or there."""
        return run_on_ray(work, self.ray_workers, address=self.ray_address) if self.ray_workers else work()


@dataclass(frozen=True)
class PatchFile:
    """Where a trained patch is written. Raises `ModelpatchError` if it cannot be."""

    out: Annotated[Path | None, typer.Option("--out", "-o", help="The patch file; by default TASK.safetensors.")] = None
    force: ForceOption = False

    def __post_init__(self) -> None:
        check_file("--out", self.out)

    def path(self, task: str) -> Path:
        """The file. Raises `ModelpatchError` if it cannot be written, or stands there already and is not to be replaced."""
        path = self.out or Path(f"{task}.safetensors")
        check_file("--out", path)
        check_free("--out", [path], self.force)
        return path


# pairs ------------------------------------------------------------------------------------------------------


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`KEY=VALUE` strings to a dict; values are read as JSON where they are JSON. Raises `MethodError`."""
    result: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key:
            raise MethodError(f"{option} {pair!r} is not KEY=VALUE.")
        if key in result:
            raise MethodError(f"{option} {key}=... is given twice. Give it once.")
        try:
            result[key] = json.loads(value)
        except ValueError:
            result[key] = value
    return result


def fit_settings(pairs: list[str] | None, **own: Any) -> dict[str, Any]:
    """The settings of a fit: those with an option of their `own`, and --fit KEY=VALUE for the others.

    Raises `TrainingError` for a key that has an option of its own or that no fit knows.
    """
    given = parse_pairs(pairs, "--fit")
    others = [name for name in FitSettings.__dataclass_fields__ if name not in own]
    for key, value in given.items():
        if key in own:
            option = key.replace("_", "-")
            right = f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}"
            raise TrainingError(f"--fit {key}=... is not taken, since {key} has an option of its own: {right}")
        if key not in others:
            raise TrainingError(f"fit has no setting {key!r}. --fit takes: {', '.join(others)}.")
    return {**own, **given}


def parse_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """--argument KEY=VALUE. Raises `BackboneError` for what no backbone can be given on a command line."""
    arguments = parse_pairs(pairs, "--argument")
    for key in arguments.keys() & RESERVED:
        advice = "Name the backbone with --backbone." if key == "spec" else "Use Python: mp.load_backbone(...)."
        raise BackboneError(f"--argument {key}=... is not an argument of the network's constructor. {advice}")
    return arguments


# devices ----------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU, else the CPU. Raises `ModelpatchError` for one that is not there.

    A GPU without a number is the first, or under torchrun the one of this process's number on its machine.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    own = gpus[int(os.environ.get("LOCAL_RANK", "0")) % len(gpus)] if gpus else ""
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        name = own or (gpus[0] if gpus else "cpu")
    known = {"cpu": "cpu", **{gpu: gpu for gpu in gpus}, **({"cuda": own} if own else {})}
    if name in known:
        return torch.device(known[name])
    why = " This PyTorch was built without CUDA." if name.startswith("cuda") and torch.version.cuda is None else ""
    raise ModelpatchError(f"there is no device {name!r} here.{why} Expected one of: auto, {', '.join(known)}.")


# backbones --------------------------------------------------------------------------------------------------


def open_backbone(spec: str, arguments: Mapping[str, Any], device: torch.device) -> Backbone:
    """The backbone a command line names, on a device. Raises `BackboneError` for a patch that is taken for one."""
    try:
        backbone = load_backbone(spec, **arguments)
    except BackboneError as error:
        path = Path(spec.removeprefix("file:"))
        if (patch := _read_patch(path)) is None:
            raise
        raise BackboneError(
            f"{path} is a patch, not a backbone. Its own backbone is {patch.backbone.spec}: name that with --backbone."
        ) from error
    return backbone if backbone.device == device else backbone.to(device)


def open_vocabulary(
    backbone: Backbone, text: str | None, names: Path | None, templates: Sequence[str] | None
) -> Vocabulary | None:
    """What makes heads of words, if --text or the backbone has a text tower; None for closed vocabularies.

    Raises `MethodError` for words or prompts without a text tower.
    """
    if text is None and backbone.text is not None:
        text = OWN
    if text is None or text == "none":
        if names is not None or templates:
            raise MethodError("--names and --template are for heads made of words. Give --text as well.")
        return None
    words = {} if names is None else read_words(names)
    return vocabulary_of(backbone, text, templates or (), words)


def backbone_of(
    patch: Patch,
    patch_path: Path,
    spec: str | None,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> Backbone:
    """The backbone a patch belongs to: the one named, else the one its file names (a file is sought beside the patch).

    `arguments` override those that the patch records; the recorded ones hold for any network from the same source.
    Raises a `BackboneError` where it cannot be loaded, `WrongBackboneError` where it is not the patch's.
    """
    record = patch.backbone
    if spec is None or _same_source(spec, record.spec):
        arguments = {**record.arguments, **arguments}
    backbone = open_backbone(spec or locate(patch, patch_path), arguments, device)
    with naming(patch_path):
        patch.check_backbone(backbone)
    return backbone


def at_alpha(patch: Patch, alpha: float | None) -> Patch:
    """The patch at the strength that --alpha names. Raises `PatchError` for one that has no such strength."""
    return patch if alpha is None else patch.with_alpha(alpha)


def read_answering(path: Path, alpha: float | None) -> Patch | Cascade:
    """The patch, at the strength that --alpha names, or the cascade in a file. Raises `PatchError`."""
    if not is_cascade(path):
        return at_alpha(Patch.load(path), alpha)
    if alpha is not None:
        raise CascadeError(
            f"--alpha turns the strength of a patch; {path} is a cascade, whose thresholds hold for its own."
        )
    return Cascade.load(path)


def load_own(patch: Patch, data: Sequence[str], seed: int | None) -> Task:
    """The data of a patch's task, or of its tasks, read as for the fit, as far as the file says. Raises `DataError`."""
    facts = facts_of(patch)
    names, ignore = facts.get("classes"), facts.get("ignore")
    classes = [str(name) for name in names] if isinstance(names, list) else None
    chosen = fitted_seed(patch) if seed is None else seed
    kind = patch.task.kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)  # what is unusual about the data was said before the fit
        return join_tasks([load_task(one, seed=chosen, kind=kind, classes=classes, ignore=ignore) for one in data])


def fitted_seed(patch: Patch) -> int:
    """The seed of the split that was fitted on, as far as the file says: another would test images that were trained on.

    It is that of the data, which the fit's own seed need not be.
    """
    if (split := split_seed(facts_of(patch))) is not None:
        return split
    settings = patch.created.get("settings")
    seed = settings.get("seed") if isinstance(settings, dict) else None
    return seed if type(seed) is int and seed >= 0 else 0


def locate(patch: Patch, patch_path: Path) -> str:
    """The spec of the patch's own backbone on this machine. Raises `UnknownBackboneError` where it cannot be known."""
    kind, _, name = patch.backbone.spec.partition(":")
    if kind == "module":
        raise UnknownBackboneError(
            f"{patch_path} was made for a module ({name}) that only your own code can build. Use Python: "
            "mp.load_backbone(module).patched(mp.Patch.load(path))."
        )
    if patch.backbone.hub is not None:
        raise UnknownBackboneError(
            f"{patch_path} asks for a network of the hub, where anybody may have put it: {patch.backbone.hub}. If you trust "
            f"it: --backbone {patch.backbone.spec}"
        )
    if kind != "file":
        return patch.backbone.spec
    for folder in (patch_path.parent, Path.cwd()):
        if (folder / name).is_file():
            return f"file:{folder / name}"
    raise UnknownBackboneError(
        f"{patch_path} needs the backbone file {name}. Say where it is: --backbone file:PATH/{name}"
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a patch that does not fit its backbone name the patch's file."""
    try:
        yield
    except (WrongBackboneError, ForeignTensorError, UnknownGraftError) as error:
        raise type(error)(f"{path}: {error}") from error


def _same_source(spec: str, recorded: str) -> bool:
    """Whether what was recorded about one holds for the other: the same zoo, or a file of the same name."""
    kind, _, name = spec.partition(":")
    other, _, other_name = recorded.partition(":")
    return kind == other and (kind in ("timm", "torchvision", "openclip") or Path(name).name == other_name)


def _read_patch(path: Path) -> Patch | None:
    try:
        return Patch.load(path)
    except ModelpatchError:
        return None
