"""Load the backbones, patches, tasks and devices that options name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelpatch.errors import (
    BackboneError,
    CascadeError,
    ForeignTensorError,
    ModelpatchError,
    TrainingWarning,
    UnknownBackboneError,
    UnknownGraftError,
    WrongBackboneError,
)
from modelpatch.patch.contents import Patch

if TYPE_CHECKING:
    from modelpatch.backbone.backbone import Backbone
    from modelpatch.data.task import Task
    from modelpatch.engine.cascade import Cascade

OWN = "own"  # --backbone own: the backbone that the patch names


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


def open_backbone(spec: str, arguments: Mapping[str, Any], device: torch.device) -> Backbone:
    """Load the backbone that a command line names to a device. Raises `BackboneError`, also for a patch file."""
    from modelpatch.backbone.load import load_backbone

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


def backbone_of(
    patch: Patch, patch_path: Path, spec: str | None, arguments: Mapping[str, Any], device: torch.device
) -> Backbone:
    """The backbone a patch belongs to: the one named, else the one its file names (a file is sought beside the patch).

    `arguments` override those that the patch records; the recorded ones hold for any network from the same source.
    Raises a `BackboneError` where it cannot be loaded, `WrongBackboneError` where it is not the patch's.
    """
    record = patch.backbone
    spec = None if spec == OWN else spec
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
    from modelpatch.engine.cascade import Cascade, is_cascade

    if not is_cascade(path):
        return at_alpha(Patch.load(path), alpha)
    if alpha is not None:
        raise CascadeError(f"--alpha turns the strength of a patch; {path} is a cascade of fixed ones. Leave it out.")
    return Cascade.load(path)


def load_own(patch: Patch, data: Sequence[str], seed: int | None) -> Task:
    """The data of a patch's task, or of its tasks, read as for the fit, as far as the file says. Raises `DataError`."""
    from modelpatch.data.task import join_tasks, load_task
    from modelpatch.train.evaluation import facts_of

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
    from modelpatch.data.splits import split_seed
    from modelpatch.train.evaluation import facts_of

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
    raise UnknownBackboneError(f"{patch_path} needs the backbone file {name}. Name it: --backbone file:PATH/{name}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a patch that does not fit its backbone name the patch's file."""
    try:
        yield
    except (WrongBackboneError, ForeignTensorError, UnknownGraftError) as error:
        raise type(error)(f"{path}: {error}") from error


def _same_source(spec: str, recorded: str) -> bool:
    """True for the same zoo, or a file of the same name: recorded arguments hold for both."""
    kind, _, name = spec.partition(":")
    other, _, other_name = recorded.partition(":")
    return kind == other and (kind in ("timm", "torchvision", "openclip") or Path(name).name == other_name)


def _read_patch(path: Path) -> Patch | None:
    try:
        return Patch.load(path)
    except ModelpatchError:
        return None
