"""One network for several resolutions: its weights shared by all, a scale and bias of its own for each.

    y = γ_r (W x - μ_r) / √(σ_r² + ε) + β_r         W and the head serve every resolution r; γ, β, μ, σ are private to r

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning*
(ICLR 2019), the experiment with several resolutions, and its two baselines: `shared` keeps nothing private, `independent`
shares nothing. A step sees the same images at every resolution, scaled bilinearly; gradients of what is shared are averaged.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from modelpatch.atomic import check_place
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import check_writable, save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import MethodNotApplicableError, TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.method import Method
from modelpatch.methods.scale_bias import norm_tensors
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import BackboneRecord, MethodRecord
from modelpatch.patch.model import PatchedModel
from modelpatch.text import digest_of, file_name
from modelpatch.train.batches import Minibatch
from modelpatch.train.callbacks import CheckpointSaver, MethodEvents, MetricLogger, ProgressBar, make_folder
from modelpatch.train.distributed import Team
from modelpatch.train.evaluation import read_patch, store_as
from modelpatch.train.fitting import Fit, PatchTrainer, check_parts
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitSettings, check_settings
from modelpatch.train.trainer import Callback

SHARINGS = ("private", "shared", "independent")
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
        """The number of trained parameters of all resolutions together, each once."""
        return next(iter(self.patches.values())).created["parameters"]

    @property
    def seconds(self) -> float:
        """Seconds of the training of all of them."""
        return next(iter(self.patches.values())).created["seconds"]

    @property
    def file_bytes(self) -> int:
        """Bytes of all patches, and of the shared weights where there are any."""
        state = self.backbone.module.state_dict().values() if self.sharing != "independent" else ()
        return sum(tensor.nbytes for tensor in state) + sum(p.inspect().file_bytes for p in self.patches.values())


class Files:
    """Files of a run's results in a folder: `stem.safetensors` is the backbone, `stem-96px.safetensors` a patch."""

    def __init__(self, folder: str | Path, data: Task, sharing: str, seed: int) -> None:
        self.folder, self.stem = Path(folder), file_name(f"{data.task.name}-{sharing}-seed{seed}")
        self.backbone = self.folder / f"{self.stem}.safetensors"
        self.checkpoint = self.folder / f"{self.stem}.training"

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
    backbone, data, tuning = check_parts(backbone, data, method)
    _check(data, resolutions, sharing, tuning, chosen)
    if out is not None and sharing != "independent":
        check_writable(backbone)
    files = None if out is None else Files(out, data, sharing, chosen.seed)
    if files is not None:
        make_folder(files.folder, "results")
        check_place(files.backbone)
    bar = Progress(f"{sharing} weights at {_spelled(resolutions)} px") if progress else quiet_progress()
    with bar:
        run = ResolutionRun(backbone, data, cast(FullFinetune, tuning), chosen, resolutions, sharing, files, bar)
        if reuse and (written := run.read()):
            return written
        return run.run([ProgressBar(bar), *([MetricLogger(log)] if log is not None else [])])


def _check(data: Task, resolutions: Sequence[int], sharing: str, method: Method, settings: FitSettings) -> None:
    check_classification(data, "multires")
    if not Team.everyone().alone:
        raise TrainingError("several resolutions are trained in one process. Start it without torchrun.")
    several = isinstance(resolutions, Sequence) and not isinstance(resolutions, str)
    whole = several and all(type(pixels) is int for pixels in resolutions)
    if not whole or len(set(resolutions)) < max(2, len(resolutions)):
        given = _spelled(resolutions) if several else repr(resolutions)
        raise TrainingError(f"the resolutions are {given}; expected at least two different ones, in pixels: (96, 128).")
    if settings.image_size is not None:
        raise TrainingError(f"image_size={settings.image_size} is given beside resolutions. Give one of them.")
    if sharing not in SHARINGS:
        raise TrainingError(f"sharing is {sharing!r}; expected one of: {', '.join(SHARINGS)}.")
    if not isinstance(method, FullFinetune):
        raise TrainingError(f"{method!r} does not train all weights. Expected a FullFinetune(...).")


def _spelled(resolutions: Sequence[int]) -> str:
    return ", ".join(map(str, resolutions))


class TiedModels(nn.Module):
    """Models of one structure as one, which answers images by their size in pixels.

    Their tensors are the same objects, but for those in `private` (names in a patch file). Gradients of private parameters are
    multiplied by the number of models: in a step over a batch of every resolution they are then as large as in a step of one
    model alone, while gradients of shared parameters are averaged.
    """

    reweighted: Mapping[str, str] = {}  # no weight of these models is made from another

    def __init__(self, models: Mapping[int, PatchedModel], private: frozenset[str]) -> None:
        super().__init__()
        self.sizes, self.private = tuple(models), private
        self.models = nn.ModuleList(models.values())
        first, *others = models.values()
        self.backbone = first.backbone
        for model in others:
            for name in model.names.keys() - private:
                owner, _, leaf = model.names[name].rpartition(".")
                setattr(model.get_submodule(owner), leaf, getattr(first.get_submodule(owner), leaf))
        for name, parameter in self.trainable():
            if name in private:
                parameter.register_hook(partial(torch.mul, len(models)))

    def forward(self, images: Tensor) -> Tensor:
        return self.model_of(images)(images)

    def model_of(self, images: Tensor) -> Any:
        return self.models[self.sizes.index(images.shape[-1])]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by its name in a patch file."""
        models: Any = self.models
        yield from {id(one): (name, one) for model in models for name, one in model.trainable()}.values()

    def state(self) -> dict[str, Tensor]:
        """Everything that training may change, shared tensors once, detached."""
        models: Any = self.models
        return {
            f"{number}.{name}": tensor
            for number, model in enumerate(models)
            for name, tensor in model.portable_state().items()
            if number == 0 or name in self.private
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class ResolutionBatches:
    """Batches of the same images at every resolution, one after another; all of one resolution first unless `together`."""

    def __init__(self, sources: Sequence[Any], together: bool) -> None:
        self.sources, self.together = sources, together

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def batches(self, epoch: int, first: int = 0) -> Iterator[Minibatch]:
        """The batches of an epoch, beginning with batch `first`, which is of the smallest resolution."""
        epochs = [source.batches(epoch, first // len(self.sources)) for source in self.sources]
        return chain.from_iterable(zip(*epochs, strict=True) if self.together else epochs)


class ResolutionRun:
    """One run of `fit_multires`: a `Fit` for each resolution, whose models are tied and trained by one trainer."""

    def __init__(
        self,
        backbone: Backbone,
        data: Task,
        method: FullFinetune,
        settings: FitSettings,
        resolutions: Sequence[int],
        sharing: str,
        files: Files | None = None,
        bar: Progress | None = None,
    ) -> None:
        self.backbone, self.method, self.sharing, self.files = backbone, method, sharing, files
        self.resolutions = tuple(sorted(resolutions))
        self.whole = Fit(backbone, data, method, settings, bar=bar)
        self.data, self.settings = self.whole.data, self.whole.settings
        seen = self.whole.preprocessing.model_copy(update={"interpolation": "bilinear"})
        self.fits = {}
        for pixels in self.resolutions:
            own, size = replace(self.settings, image_size=pixels), seen.with_image_size(pixels)
            self.fits[pixels] = Fit(backbone, self.data, method, own, preprocessing=size, bar=bar)
        self.identity = {**self.whole.identity, "resolutions": list(self.resolutions), "sharing": sharing}
        self.digest = digest_of(self.identity)

    @cached_property
    def private(self) -> frozenset[str]:
        """The names in a patch file of what every resolution has of its own. Raises `MethodNotApplicableError` for nothing."""
        blueprint = self.method.blueprint(self.backbone)
        if self.sharing == "shared":
            return frozenset()
        if self.sharing == "independent":
            head = self.method.make_head(self.backbone, 1).state_dict()
            return frozenset([f"replace/{name}" for name in blueprint.owned] + [f"head.{name}" for name in head])
        norms = set(norm_tensors(self.backbone.chain, affine=True, statistics=True))
        if not norms:
            raise MethodNotApplicableError(f"{self.backbone.spec} has no normalisation layers to keep private.")
        return frozenset(f"replace/{name}" for name in norms & set(blueprint.owned))

    def build(self) -> TiedModels:
        """Return a model for each resolution, all alike at first, tied."""
        return TiedModels({pixels: fit.build() for pixels, fit in self.fits.items()}, self.private)

    def make_trainer(self, model: TiedModels, callbacks: Sequence[Callback] = ()) -> PatchTrainer:
        """Return the trainer of tied models: a step sees a batch at every resolution."""
        pairs: list[tuple[Fit, Any]] = list(zip(self.fits.values(), model.models, strict=True))
        data = ResolutionBatches([fit.batches(one, "train") for fit, one in pairs], together=True)
        held = None
        if self.whole.validates:
            held = ResolutionBatches([fit.batches(one, "validation") for fit, one in pairs], together=False)
        events = MethodEvents(self.method, [(one, fit.plain_batches) for fit, one in pairs])
        return PatchTrainer(self.whole, model, data, held, [events, *callbacks], len(pairs))

    def run(self, callbacks: Sequence[Callback] = ()) -> MultiResolution:
        """Train, measure and write. The backbone that training began from stays as it was."""
        record, began = BackboneRecord.of(self.backbone), time.perf_counter()
        model = self.build()
        savers = [CheckpointSaver(self.files.checkpoint, self.identity)] if self.files is not None else []
        self.make_trainer(model, [*callbacks, *savers]).train()
        seconds = time.perf_counter() - began
        models, whole = cast(list[PatchedModel], list(model.models)), {}
        for (pixels, fit), one in zip(self.fits.items(), models, strict=True):
            whole[pixels] = fit.measure(one, fit.make_patch(one, record, seconds))
        self.backbone.verify_tensors()
        shared = self.backbone if self.sharing == "independent" else self._shared(whole[self.resolutions[-1]])
        trained = dict(models[0].trainable())
        count = sum(trained[name].numel() for name in trained.keys() & self.private if not name.startswith("head."))
        total = sum(parameter.numel() for _, parameter in model.trainable())
        facts = {"run": self.digest, "trainable_parameters": count, "parameters": total}
        own = {"sharing": self.sharing, "resolutions": list(self.resolutions)}
        record, patches = BackboneRecord.of(shared), {}
        for pixels, patch in whole.items():
            made = replace(
                patch,
                backbone=record,
                method=MethodRecord(name="multires", hyperparameters={**own, **patch.method.hyperparameters}),
                tensors={n: t for n, t in patch.tensors.items() if n in self.private or n.startswith("head.")},
                created={**patch.created, **facts},
            )
            patches[pixels] = store_as(shared, made, self.data, self.settings.dtype)
            if self.files is not None:
                patches[pixels].save(self.files.patch(pixels))
        for saver in savers:
            saver.clear()
        return MultiResolution(self.sharing, shared, patches)

    def _shared(self, patch: Patch) -> Backbone:
        """The network with what the largest resolution's patch holds, as a backbone of its own, written if it is to be."""
        base = self.backbone
        module = copy.deepcopy(base.module)
        tensors = {name.removeprefix("replace/"): tensor for name, tensor in patch.tensors.items() if "/" in name}
        arguments = {name: value for name, value in base.arguments.items() if name not in ("pretrained", "seed")}
        if base.classifier is not None:
            module.set_submodule(base.classifier, nn.Linear(patch.head.features, patch.head.outputs).to(base.device))
            tensors |= {f"{base.classifier}.{name}": tensor for name, tensor in patch.head_tensors.items()}
            if hasattr(module, "num_classes"):
                module.num_classes = patch.head.outputs  # type: ignore[assignment]
            if base.architecture is not None:
                arguments["num_classes"] = patch.head.outputs
        module.load_state_dict({**module.state_dict(), **tensors})
        shared = Backbone(
            module,
            patch.preprocessing,
            f"module:{type(module).__name__}" if self.files is None else f"file:{self.files.backbone.name}",
            arguments,
            base.classifier,
            base.segments,
            self.data.classes if base.classifier is not None else (),
            {"task": self.data.task.name, "sharing": self.sharing, "resolutions": list(self.resolutions)},
        )
        if self.files is not None:
            save_backbone(shared, self.files.backbone, check_writable(base))
        return shared

    def read(self) -> MultiResolution | None:
        """Return the results from their files, if all are there. Raises `CheckpointMismatchError` for those of another run."""
        files, shares = self.files, self.sharing != "independent"
        if files is None:
            return None
        needed = [*map(files.patch, self.resolutions), *([files.backbone] if shares else [])]
        if not all(file.exists() for file in needed):
            return None
        shared = load_backbone(f"file:{files.backbone}").to(self.backbone.device) if shares else self.backbone
        patches = {pixels: read_patch(files.patch(pixels), self.digest, shared) for pixels in self.resolutions}
        for patch in patches.values():
            patch.check_backbone(shared)
        return MultiResolution(self.sharing, shared, patches)
