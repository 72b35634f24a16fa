"""Options that several verbs share, singly and in groups, and the devices, backbones and patches that they name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from typer import Option

import modelpatch as mp
from modelpatch.cli.console import check_file, check_out
from modelpatch.cli.runs import CURRENT
from modelpatch.cli.verb import option, spell_option, spell_setting
from modelpatch.errors import (
    BackboneError,
    CascadeError,
    CheckpointError,
    ForeignTensorError,
    MethodError,
    ModelpatchError,
    TrainingError,
    TrainingWarning,
    UnknownGraftError,
    WrongBackboneError,
)
from modelpatch.text import file_name, nearest

if TYPE_CHECKING:
    import torch

    from modelpatch.backbone.chain import Chain
    from modelpatch.backbone.tuning import Tuning
    from modelpatch.engine.cascade import Cascade
    from modelpatch.methods.vocabulary import Vocabulary

T = TypeVar("T")

LONGEST_NAME = 200  # characters of a file that is named after a task
LOCAL = "local"
TOY = "bundled:tiny"
NO_BACKBONE = (
    f"no --backbone is given: {TOY} is used, a toy of 0.8 million parameters that was trained on 32-pixel photos of CIFAR-10, "
    "for trying commands out. For work name a network with -b: timm:mobilenetv2_100.ra_in1k (fast), timm:resnet50.a1_in1k, "
    "timm:vit_small_patch14_dinov2.lvd142m; -b bundled:tiny hides this warning."
)
OWN = "own"  # --backbone own: the backbone that the patch names
MethodOption = Annotated[str, Option("--method", "-m", help="A method, or several with +; see `modelpatch methods`.")]
NETWORKS = "timm:NAME, torchvision:NAME, transformers:NAME_OR_FOLDER, openclip:NAME/TAG, file:PATH or bundled:NAME."
WeightsOption = Annotated[Path | None, Option(help="A checkpoint (safetensors or .pth) for the network of --backbone.")]
ArgumentOption = Annotated[list[str] | None, Option(help="KEY=VALUE for the backbone's constructor; may be repeated.")]
DeviceOption = Annotated[str, Option(help="cpu, cuda, cuda:1, mps, or auto for the fastest device of this machine.")]
AlphaOption = Annotated[float | None, Option(help="Strength of the patch, 0 (the base) to 1; by default the file's.")]
SetOption = Annotated[
    list[str] | None, Option("--set", help="KEY=VALUE, a hyperparameter (METHOD.KEY: of one of several); repeatable.")
]
ForceOption = Annotated[bool, Option("--force", help="Replace existing files.")]
LogOption = Annotated[Path | None, Option(help="A folder for metrics.csv, TensorBoard events and a picture of curves.")]
RestartOption = Annotated[bool, Option("--restart", help="Discard an interrupted run instead of resuming it.")]
AugmentOption = Annotated[str, Option(help="auto, none, light (no flip, for digits and signs), standard or strong.")]
SeedOption = Annotated[int, Option(help="Seed of every random choice, 0 or more.")]
RayAddressOption = Annotated[str, Option(help="The Ray cluster: 'local' starts one, 'auto' finds one, or HOST:PORT.")]


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`KEY=VALUE` strings as a dict; values are read as JSON where they are JSON. Raises `MethodError`."""
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


def make_method(spec: str, pairs: list[str] | None, **defaults: Any) -> mp.methods.Method:
    """The method with the hyperparameters of --set over `defaults`. Raises `MethodError`, also for a setting of the fit."""
    given = parse_pairs(pairs, "--set")
    for key, value in given.items():
        if advice := spell_setting(key, value, _taken() - {"set_"}):
            raise MethodError(f"{spec} has no hyperparameter {key!r}.{advice}")
    return mp.methods.make_method(spec, **{**defaults, **given})


def _taken() -> set[str]:
    """The names of the parameters of the verb that runs."""
    return set() if (run := CURRENT.get()) is None else set(run[1])


def parse_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """--argument KEY=VALUE. Raises `BackboneError` for arguments that a command line cannot give."""
    arguments = parse_pairs(pairs, "--argument")
    for key in arguments.keys() & {"spec", "preprocessing"}:
        advice = "Name the backbone with --backbone." if key == "spec" else "Use Python: mp.load_backbone(...)."
        raise BackboneError(f"--argument {key}=... is not an argument of the network's constructor. {advice}")
    return arguments


def with_weights(pairs: list[str] | None, weights: Path | None) -> dict[str, Any]:
    """The arguments of --argument and --weights. Raises `BackboneError` for a checkpoint that both or neither file names."""
    arguments = parse_arguments(pairs)
    if weights is None:
        return arguments
    if "weights" in arguments:
        raise BackboneError("--weights and --argument weights=... both name a checkpoint. Give --weights alone.")
    if not weights.expanduser().exists():
        raise BackboneError(f"--weights {weights}: there is no such file. Expected a checkpoint, safetensors or .pth.")
    return {**arguments, "weights": weights}


def parse_counts(option: str, text: str) -> list[int]:
    """`N1,N2,...` of an option as numbers above 0. Raises `TrainingError`."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise TrainingError(f"{option} {text!r} is not N1,N2,...: whole numbers above 0.")
    return counts


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU, else the CPU. Raises `ModelpatchError` for one that is not there.

    A GPU without a number is the first, or under torchrun the one of this process's number on its machine.
    """
    import torch

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


def open_backbone(spec: str, arguments: Mapping[str, Any], device: torch.device) -> mp.Backbone:
    """Load the backbone that a command line names to a device. Raises `BackboneError`, also for a patch file."""
    from modelpatch.backbone.load import load_backbone

    try:
        backbone = load_backbone(spec, **arguments)
    except BackboneError as error:
        path = Path(spec.removeprefix("file:"))
        try:
            patch = mp.Patch.load(path)
        except ModelpatchError:
            raise error from None
        raise BackboneError(
            f"{path} is a patch, not a backbone. Its own backbone is {patch.backbone.spec}: name that with --backbone."
        ) from error
    return backbone if backbone.device == device else backbone.to(device)


def at_alpha(patch: mp.Patch, alpha: float | None) -> mp.Patch:
    """The patch at the strength that --alpha names. Raises `PatchError` for one that has no such strength."""
    return patch if alpha is None else patch.with_alpha(alpha)


def read_answering(path: Path, alpha: float | None) -> mp.Patch | Cascade:
    """The patch, at the strength that --alpha names, or the cascade in a file. Raises `PatchError`."""
    from modelpatch.engine.cascade import Cascade, is_cascade

    if not is_cascade(path):
        return at_alpha(mp.Patch.load(path), alpha)
    if alpha is not None:
        raise CascadeError(f"--alpha turns the strength of a patch; {path} is a cascade of fixed ones. Leave it out.")
    return Cascade.load(path)


def patch_of(loaded: mp.Patch | Cascade) -> mp.Patch:
    """The patch, or the first of a cascade."""
    return loaded if isinstance(loaded, mp.Patch) else loaded.patches[0]


def chain_of(patch: mp.Patch, path: Path, arguments: Mapping[str, Any]) -> Chain | None:
    """The chain of the patch's own backbone, without downloading its weights; None if it cannot be built."""
    from modelpatch.patch.finding import find_backbone

    record = patch.backbone
    try:
        if record.spec.startswith(("timm:", "torchvision:")) and record.hub is None and not record.is_local:
            arguments = {**record.arguments, **arguments, "pretrained": False}
            chain = open_backbone(record.spec, arguments, find_device("cpu")).chain
        else:
            chain = find_backbone(patch, path, arguments).chain
        patch.blueprint.spans(chain)
    except ModelpatchError:
        return None
    return chain


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a patch or checkpoint that does not fit its backbone name its file."""
    try:
        yield
    except (WrongBackboneError, ForeignTensorError, UnknownGraftError, CheckpointError) as error:
        raise type(error)(f"{path}: {error}") from error


def _same_source(spec: str, recorded: str) -> bool:
    """True for the same zoo, or a file of the same name: recorded arguments hold for both."""
    kind, _, name = spec.partition(":")
    other, _, other_name = recorded.partition(":")
    return kind == other and (kind in ("timm", "torchvision", "openclip") or Path(name).name == other_name)


@dataclass(frozen=True)
class Network:
    """The frozen network and its device. Raises `ModelpatchError` for impossible arguments or an absent device."""

    panel: ClassVar[str] = "Backbone"
    backbone: str | None = option(None, "--backbone", "-b", help=NETWORKS)
    weights: WeightsOption = None
    argument: ArgumentOption = None
    device: DeviceOption = "cpu"

    def __post_init__(self) -> None:
        if self.weights is not None and self.backbone is None:
            raise BackboneError(
                f"--weights {self.weights} is given without the network that it is for. Give --backbone."
            )
        parse_arguments(self.argument)
        find_device(self.device)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of its constructor."""
        return with_weights(self.argument, self.weights)

    def open(self) -> mp.Backbone:
        """The backbone, on its device; without a name the bundled toy, which a warning says."""
        if self.backbone is None:
            warnings.warn(NO_BACKBONE, TrainingWarning, stacklevel=2)
        name = TOY if self.backbone is None else self.backbone
        return open_backbone(name, self.arguments, find_device(self.device))


@dataclass(frozen=True)
class GivenNetwork(Network):
    """The frozen network, which has no default."""

    backbone: str | None = option(..., "--backbone", "-b", help=NETWORKS)


@dataclass(frozen=True)
class FineTunedNetwork(Network):
    """The frozen network that a checkpoint was fine-tuned from."""

    backbone: str | None = option(
        ..., "--base", "--backbone", "-b", help="The network, with its weights before fine-tuning."
    )


@dataclass(frozen=True)
class ServedNetwork(Network):
    """The frozen network of a server. Raises `BackboneError` for arguments without the network that they are for."""

    backbone: str | None = option(None, "--backbone", "-b", help="The frozen network; by default that of the patches.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.argument and self.backbone is None:
            raise BackboneError("--argument is for a network that is named. Give --backbone.")


@dataclass(frozen=True)
class LabellingNetwork(Network):
    """The frozen network of a patch that is given, else one to train a patch of."""

    backbone: str | None = option(None, "--backbone", "-b", help="By default the patch's, or bundled:tiny.")

    def __post_init__(self) -> None:
        parse_arguments(self.argument)
        find_device(self.device)

    def opener(self, patch: mp.Patch | None, path: Path | None) -> Callable[[], mp.Backbone]:
        """Return a function that loads the backbone; the patch is that of the path. Raises `BackboneError`."""
        if patch is None or path is None:
            super().__post_init__()
            return self.open
        return partial(PatchNetwork(self.backbone, self.argument, self.weights).open, patch, path, self.device)


@dataclass(frozen=True)
class Words:
    """The text tower and the words of a head that is made of class names."""

    panel: ClassVar[str] = "Words"
    text: str | None = option(None, help="The text tower: minilm, folder:PATH, own (an openclip: backbone's), or none.")
    names: Path | None = option(None, help='JSON of words for names that are no words: {"00014": "a stop sign"}.')
    template: list[str] | None = option(None, help="A prompt: 'a photo of a {}.' ({}: the name); may be repeated.")

    def open(self, backbone: mp.Backbone) -> Vocabulary | None:
        """The vocabulary that makes heads; None for closed ones. Raises `MethodError` for words without a text tower."""
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
class NamedNetwork:
    """The frozen network of a patch: by default the one that the patch's file names. Raises `BackboneError`."""

    panel: ClassVar[str] = "Backbone"
    backbone: str | None = option(None, "--backbone", "-b", help="The frozen network; by default the patch's own.")
    argument: ArgumentOption = None

    def __post_init__(self) -> None:
        parse_arguments(self.argument)

    @property
    def checkpoint(self) -> Path | None:
        """A checkpoint to load into it."""
        return None

    def open(self, patch: mp.Patch | Cascade, path: Path, device: str = "cpu") -> mp.Backbone:
        """The backbone of the patch or cascade in a file: the one named, else the file's own, wherever this machine has it.

        Arguments override those that the patch records; the recorded ones hold for any network from the same source.
        Raises `BackboneError` where it cannot be loaded, `WrongBackboneError` where it is not the patch's.
        """
        from modelpatch.patch.finding import find_backbone

        first, place = patch_of(patch), find_device(device)
        spec, arguments = None if self.backbone == OWN else self.backbone, with_weights(self.argument, self.checkpoint)
        if spec is None and self.checkpoint is not None:
            spec = first.backbone.spec
        if spec is None:
            backbone = find_backbone(first, path, arguments)
            backbone = backbone if backbone.device == place else backbone.to(place)
        else:
            recorded = first.backbone.arguments if _same_source(spec, first.backbone.spec) else {}
            backbone = open_backbone(spec, {**recorded, **arguments}, place)
        with naming(path):
            first.check_backbone(backbone)
        return backbone


BackendOption = Annotated[
    str, Option("--backend", help="eager, onnxruntime, openvino or inductor; auto: a rule by device and libraries.")
]


def read_tuning(path: Path | None) -> Tuning | None:
    """The engine's settings in a file of `modelpatch tune`; None for no file."""
    from modelpatch.backbone.tuning import Tuning

    return None if path is None else Tuning.load(path)


@dataclass(frozen=True)
class PatchNetwork(NamedNetwork):
    """The frozen network of a patch, maybe with weights of its own."""

    weights: WeightsOption = None

    @property
    def checkpoint(self) -> Path | None:
        return self.weights


@dataclass(frozen=True)
class CheckedNetwork(PatchNetwork):
    """A frozen network to build a patch on, or none."""

    backbone: str | None = option(
        None, "--backbone", "-b", help="A network to build the patch on; own: the patch's. By default none is built."
    )


@dataclass(frozen=True)
class Training:
    """The settings of a fit, the same for all verbs that train."""

    panel: ClassVar[str] = "Training"
    epochs: int = option(10, help="Passes over the training images, 1 or more.")
    batch_size: int = option(32, help="Images a step, 1 or more.")
    image_size: int | None = option(None, help="Pixels; by default the backbone's.")
    seed: SeedOption = 0
    option: list[str] | None = option(
        None, "--fit", help="KEY=VALUE, another setting (early_stopping=3): `modelpatch methods --settings` lists them."
    )

    def settings(self, options: Sequence[str] = (), **own: Any) -> dict[str, Any]:
        """The settings of a fit: those above, the verb's `own`, and those of --fit, which may name `options` of `fit` too.

        Raises `TrainingError` for a --fit of a setting that has an option, or of no setting.
        """
        from modelpatch.train.settings import FitSettings

        own |= {name: getattr(self, name) for name in ("epochs", "batch_size", "image_size", "seed")}
        given = parse_pairs(self.option, "--fit")
        others = [name for name in (*FitSettings.__dataclass_fields__, *options) if name not in own]
        for key, value in given.items():
            if key in own:
                right = spell_option(key, value)
                raise TrainingError(f"--fit {key}=... is not taken, since {key} has an option of its own: {right}")
            if key not in others:
                hint = spell_setting(key, value, _taken()) or nearest(key, others)
                raise TrainingError(f"fit has no setting {key!r}.{hint} --fit takes: {', '.join(others)}.")
        return {**own, **given}


@dataclass(frozen=True)
class Cluster:
    """Processes of a run: this one, or workers on Ray. Raises `ModelpatchError` for an address without workers."""

    panel: ClassVar[str] = "Ray"
    ray_workers: int = option(0, min=0, help="Processes on Ray that share tasks and batches; 0: without Ray.")
    ray_address: RayAddressOption = LOCAL

    def __post_init__(self) -> None:
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
        path = self.out or Path(f"{file_name(task)[:LONGEST_NAME]}.safetensors")
        check_out(path, self.force)
        return path
