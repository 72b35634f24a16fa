"""One network for several resolutions: its weights shared by all, a scale and bias of its own for each.

    y = γ_r (W x - μ_r) / √(σ_r² + ε) + β_r         W and the head serve every resolution r; γ, β, μ, σ are private to r

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning*
(ICLR 2019), the experiment with several resolutions, and its two baselines: `shared` keeps nothing private, `independent`
shares nothing. A step sees the same images at every resolution, scaled bilinearly; gradients of what is shared are averaged.

What comes out is a backbone with the shared weights and one small patch a resolution, like any others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import check_writable, load_backbone, save_backbone
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DataError, MethodNotApplicableError, TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.scale_bias import norm_tensors
from modelpatch.patch.contents import Patch
from modelpatch.patch.header import BackboneRecord, MethodRecord
from modelpatch.patch.model import PatchedModel
from modelpatch.text import file_name
from modelpatch.train.distributed import Team
from modelpatch.train.evaluation import store_as
from modelpatch.train.fitting import Fit, FitSettings, State, check_settings
from modelpatch.train.inputs import Inputs
from modelpatch.train.logs import RunLog
from modelpatch.train.progress import Progress, quiet_progress

Sharing = Literal["private", "shared", "independent"]
SHARINGS: tuple[str, ...] = get_args(Sharing)
METHOD = FullFinetune(statistics="learned")


@dataclass(frozen=True)
class MultiResolution:
    """A task at several resolutions.

    `patches` are by pixels, in increasing order, and belong to `backbone`: the one with the shared weights, which answers
    the task itself at the largest resolution, or for `independent` the one that training began from.
    """

    sharing: str
    backbone: Backbone
    patches: Mapping[int, Patch]

    @property
    def top1(self) -> dict[int, float]:
        """Accuracy on the test images by resolution, in [0, 1]."""
        return {pixels: patch.metrics["test_top1"] for pixels, patch in self.patches.items()}

    @property
    def parameters(self) -> int:
        """What was trained for all resolutions together, each number once."""
        return next(iter(self.patches.values())).created["parameters"]

    @property
    def seconds(self) -> float:
        """What training all of them took."""
        return next(iter(self.patches.values())).created["seconds"]

    @property
    def file_bytes(self) -> int:
        """What is shipped: all patches, and the shared weights where there are any."""
        state = self.backbone.module.state_dict().values() if self.sharing != "independent" else ()
        return sum(tensor.nbytes for tensor in state) + sum(p.inspect().file_bytes for p in self.patches.values())


@dataclass(frozen=True)
class Files:
    """Where a run's results lie: `stem.safetensors` is the backbone, `stem-96px.safetensors` a patch."""

    folder: Path
    stem: str

    @classmethod
    def of(cls, folder: str | Path, data: Task, sharing: str, seed: int) -> Files:
        return cls(Path(folder), file_name(f"{data.task.name}-{sharing}-seed{seed}"))

    @property
    def backbone(self) -> Path:
        return self.folder / f"{self.stem}.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.stem}.training"

    def patch(self, pixels: int) -> Path:
        return self.folder / f"{self.stem}-{pixels}px.safetensors"


def fit_multires(
    backbone: Backbone,
    data: Task,
    resolutions: Sequence[int] = (96, 128, 160),
    *,
    sharing: str = "private",
    method: FullFinetune = METHOD,
    out: str | Path | None = None,
    reuse: bool = False,
    log: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> MultiResolution:
    """Train one network for a task at several resolutions, in pixels, and measure each on the test images.

    `sharing` says what every resolution has of its own: `private` the scale, bias and statistics of normalisation layers,
    `shared` nothing, `independent` everything. All weights are trained, as `method` says; `settings` are the fields of
    `FitSettings` but `image_size`. `out` names a folder for the backbone's file and one patch a resolution, and for the
    training state from which an interrupted run goes on; with `reuse` what the very same run wrote there is read instead.
    `log` names a folder for `metrics.csv`.

    Raises `TrainingError` for resolutions or an `out` that cannot be, `MethodNotApplicableError` for a network without
    normalisation layers, and what `fit` raises.
    """
    chosen = check_settings(settings)
    _check(backbone, data, resolutions, sharing, method, chosen, out)
    files = None if out is None else Files.of(out, data, sharing, chosen.seed)
    if files is not None:
        files.folder.mkdir(parents=True, exist_ok=True)
    bar = Progress(f"{sharing} weights at {_spelled(resolutions)} px") if progress else quiet_progress()
    with bar, RunLog(log) as run_log:
        run = MultiResolutionFit(backbone, data, method, chosen, bar, run_log, sorted(resolutions), sharing, files)
        return run.read() if reuse and run.written else run.run_all()


def _check(
    backbone: Any,
    data: Any,
    resolutions: Sequence[int],
    sharing: str,
    method: Any,
    settings: FitSettings,
    out: str | Path | None,
) -> None:
    if not isinstance(backbone, Backbone):
        raise TrainingError(f"{backbone!r} is not a backbone. Load it first: mp.load_backbone(...).")
    if not isinstance(data, Task):
        raise DataError(f"{data!r} is not a task's data. Load it first: mp.load_task(...).")
    check_classification(data, "multires")
    if not Team.everyone().alone:
        raise TrainingError("several resolutions are trained in one process. Start it without torchrun.")
    if not isinstance(resolutions, Sequence) or isinstance(resolutions, str):
        raise TrainingError(f"the resolutions are {resolutions!r}; expected several, in pixels: (96, 128).")
    whole = [type(pixels) is int for pixels in resolutions]
    if len(set(resolutions)) < 2 or len(set(resolutions)) < len(resolutions) or not all(whole):
        raise TrainingError(
            f"the resolutions are {_spelled(resolutions)}; expected at least two different ones, in pixels."
        )
    if settings.image_size is not None:
        raise TrainingError(f"image_size={settings.image_size} is given beside resolutions. Give one of them.")
    if sharing not in SHARINGS:
        raise TrainingError(f"sharing is {sharing!r}; expected one of: {', '.join(SHARINGS)}.")
    if not isinstance(method, FullFinetune):
        raise TrainingError(f"{method!r} does not train all weights. Expected a FullFinetune(...).")
    if out is not None and sharing != "independent":
        check_writable(backbone)


def _spelled(resolutions: Sequence[int]) -> str:
    return ", ".join(map(str, resolutions))


class TiedModels(nn.Module):
    """Models of one structure whose tensors are the same objects, but for those in `private` (names in a patch file)."""

    def __init__(self, models: Sequence[PatchedModel], private: frozenset[str]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        first, *others = models
        self.private = private
        for model in others:
            for name in model.names.keys() - private:
                owner, _, leaf = model.names[name].rpartition(".")
                setattr(model.get_submodule(owner), leaf, _tensor(first, name))

    @property
    def reweighted(self) -> Mapping[str, str]:
        """No weight of these models is made from another."""
        return {}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by its name in a patch file."""
        seen: set[int] = set()
        for model in self.models:
            for name, parameter in model.trainable():  # type: ignore[operator]
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    @property
    def averaged(self) -> list[nn.Parameter]:
        """The parameters that all models have."""
        models: Any = self.models
        return [parameter for name, parameter in models[0].trainable() if name not in self.private]

    def state(self) -> dict[str, Tensor]:
        """Everything that training may change, shared tensors once, detached."""
        models: Any = self.models
        return {
            f"{number}.{name}": _tensor(model, name).detach()
            for number, model in enumerate(models)
            for name in model.names
            if number == 0 or name in self.private
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _tensor(model: PatchedModel, name: str) -> Tensor:
    owner, _, leaf = model.names[name].rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


class AllResolutions:
    """A batch of the same images from every one of `inputs`."""

    start = 0

    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self.inputs = inputs

    def batch(self, rows: Tensor, epoch: int, step: int) -> Any:
        """A list of batches, one a resolution."""
        return [own.batch(rows, epoch, step) for own in self.inputs]


class MultiResolutionFit(Fit):
    """The loop of `fit` over several fits at once, one a resolution, whose models are tied."""

    eager = False  # shared gradients are complete only when all resolutions have given theirs
    model: TiedModels  # type: ignore[assignment]

    def __init__(
        self,
        backbone: Backbone,
        data: Task,
        method: FullFinetune,
        settings: FitSettings,
        bar: Progress,
        log: RunLog,
        resolutions: Sequence[int],
        sharing: str,
        files: Files | None = None,
    ) -> None:
        self.resolutions, self.sharing, self.files = tuple(resolutions), sharing, files
        super().__init__(backbone, data, method, settings, bar, log, None if files is None else files.checkpoint)
        seen = self.preprocessing.model_copy(update={"interpolation": "bilinear"})
        self.parts = {
            pixels: Fit(backbone, self.data, method, replace(self.settings, image_size=pixels), bar, log, None)
            for pixels in self.resolutions
        }
        for pixels, part in self.parts.items():
            part.preprocessing = seen.with_image_size(pixels)
            part.source = part._own_inputs()

    @cached_property
    def private(self) -> frozenset[str]:
        """The names in a patch file of what every resolution has of its own. Raises `MethodNotApplicableError` for nothing."""
        blueprint = self.method.blueprint(self.backbone)
        if self.sharing == "shared":
            return frozenset()
        if self.sharing == "independent":
            head = self.method.make_head(self.backbone, 1).state_dict()
            return frozenset([f"replace/{name}" for name in blueprint.owned] + [f"head.{name}" for name in head])
        norms = {name for segment in self.backbone.chain for name in norm_tensors(segment, True, True)}
        if not norms:
            raise MethodNotApplicableError(f"{self.backbone.spec} has no normalisation layers to keep private.")
        return frozenset(f"replace/{name}" for name in norms & set(blueprint.owned))

    # training -----------------------------------------------------------------------------------------------

    def draft(self, start: Mapping[str, Tensor] | None = None) -> None:
        """A model for each resolution, all alike at first, tied."""
        for part in self.parts.values():
            part.draft(start)
            part.state = State()
        self.model = TiedModels([part.model for part in self.parts.values()], self.private)

    def open_inputs(self) -> None:
        """The images at every resolution."""
        for part in self.parts.values():
            part.open_inputs()
            part.scaler = self.scaler
        self.inputs = AllResolutions([part.inputs for part in self.parts.values()])
        first = self.parts[self.resolutions[0]]
        self.labels, self._held = first.labels, first._held

    def train_mode(self) -> None:
        for part in self.parts.values():
            part.train_mode()

    def _backward(self, rows: Tensor, inputs: Any, targets: Any, weights: Tensor | None) -> Tensor:
        """Gradients of all resolutions for the same images: private ones as they are, shared ones averaged."""
        losses = [
            part._backward(rows, own, targets, weights) for part, own in zip(self.parts.values(), inputs, strict=True)
        ]
        for parameter in self.model.averaged:
            if parameter.grad is not None:
                parameter.grad /= len(self.parts)
        return torch.stack(losses).mean()

    def _score(self, inputs: Inputs, labels: Tensor) -> float:
        """Mean top-1 of all resolutions on what is held out."""
        held = [(part, part._held) for part in self.parts.values()]
        return sum(part._score(*own) for part, own in held if own is not None) / len(held)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "resolutions": list(self.resolutions), "sharing": self.sharing}

    # results ------------------------------------------------------------------------------------------------

    def run_all(self) -> MultiResolution:
        """Train, measure and write. The backbone that training began from stays as it was."""
        seconds = self.train()
        if self.state.best:
            self.model.load_state(self.state.best)
        whole = {pixels: part._make_patch(seconds) for pixels, part in self.parts.items()}
        self.backbone.verify()
        shared = self.backbone if self.sharing == "independent" else self._shared(whole[self.resolutions[-1]])
        trained = dict(self.parts[self.resolutions[0]].model.trainable())
        own = sum(trained[name].numel() for name in trained.keys() & self.private if not name.startswith("head."))
        total = sum(parameter.numel() for _, parameter in self.model.trainable())
        facts = {"run": self.digest, "trainable_parameters": own, "parameters": total}
        record = BackboneRecord.of(shared)
        patches = {pixels: self._own(patch, record, facts) for pixels, patch in whole.items()}
        if self.settings.dtype != "float32":
            dtype = self.settings.dtype
            patches = {pixels: store_as(shared, patch, self.data, dtype) for pixels, patch in patches.items()}
        if self.files is not None:
            for pixels, patch in patches.items():
                patch.save(self.files.patch(pixels))
        self.finish()
        return MultiResolution(self.sharing, shared, patches)

    def _own(self, patch: Patch, backbone: BackboneRecord, facts: Mapping[str, Any]) -> Patch:
        """What a resolution has of its own, and the head, over the backbone with the rest."""
        hyperparameters = {"sharing": self.sharing, "resolutions": list(self.resolutions)}
        return replace(
            patch,
            backbone=backbone,
            method=MethodRecord(name="multires", hyperparameters={**hyperparameters, **patch.method.hyperparameters}),
            tensors={n: t for n, t in patch.tensors.items() if n in self.private or n.startswith("head.")},
            created={**patch.created, **facts},
        )

    def _shared(self, patch: Patch) -> Backbone:
        """The network with what the largest resolution's patch holds, as a backbone of its own, written if it is to be."""
        base = self.backbone
        module = copy.deepcopy(base.module)
        tensors = {name.removeprefix("replace/"): tensor for name, tensor in patch.tensors.items() if "/" in name}
        if base.classifier is not None:
            module.set_submodule(base.classifier, nn.Linear(patch.head.features, patch.head.outputs).to(base.device))
            tensors |= {f"{base.classifier}.{name}": patch.tensors[f"head.{name}"] for name in ("weight", "bias")}
            if hasattr(module, "num_classes"):
                module.num_classes = patch.head.outputs  # type: ignore[assignment]
        module.load_state_dict({**module.state_dict(), **tensors})
        arguments = {name: value for name, value in base.arguments.items() if name not in ("pretrained", "seed")}
        if base.classifier is not None and base.architecture is not None:
            arguments["num_classes"] = patch.head.outputs
        shared = Backbone(
            module,
            patch.preprocessing,
            f"module:{type(module).__name__}" if self.files is None else f"file:{self.files.backbone.name}",
            arguments,
            base.classifier,
            base.segment_names,
            self.data.classes if base.classifier is not None else (),
            {"task": self.data.task.name, "sharing": self.sharing, "resolutions": list(self.resolutions)},
        )
        if self.files is not None:
            save_backbone(shared, self.files.backbone, check_writable(base))
        return shared

    @property
    def written(self) -> bool:
        """Whether there are files for all results."""
        if self.files is None:
            return False
        patches = [self.files.patch(pixels).exists() for pixels in self.resolutions]
        return all(patches) and (self.sharing == "independent" or self.files.backbone.exists())

    def read(self) -> MultiResolution:
        """The results from their files. Raises `CheckpointMismatchError` for those of another run."""
        assert self.files is not None
        shared = self.backbone
        if self.sharing != "independent":
            shared = load_backbone(f"file:{self.files.backbone}").to(self.device)
        patches = {pixels: self.finished(self.files.patch(pixels)) for pixels in self.resolutions}
        for patch in patches.values():
            patch.check_backbone(shared)
        return MultiResolution(self.sharing, shared, patches)
