"""Many tasks at once over one backbone: shared weights that all of them train, and a private patch for each.

    dL/dW   = sum_t s_t dL_t/dW       W shared, s_t the share of task t, adding up to 1
    dL/dP_t = dL_t/dP_t               P_t what the patch of task t owns: scale and bias, filters, a head, ...
    rate_t  = rate f(e / E_t)         e the epochs that task t has made, E_t those it will make

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning* (ICLR
2019), section 4.3 and 5.4. Here one batch of every task makes a round, after which the shared weights take one step.

    sampling        images of task t in a round                     s_t
    equal           the batch size                                  w_t / sum w             w_t the task's weight
    proportional    as its training images are to all tasks'        w_t b_t / sum w b       b_t the images

The result is a backbone of its own with a patch a task. Statistics of BatchNorm that no patch owns stay the base's.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from modelpatch.atomic import check_place
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import check_writable, save_backbone
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DataError, MethodError, TrainingError
from modelpatch.methods.method import METHODS, Method
from modelpatch.patch.blueprint import Graft
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import BackboneRecord
from modelpatch.patch.model import PatchedModel
from modelpatch.text import file_name
from modelpatch.train.callbacks import Checkpoint, MetricLogger
from modelpatch.train.distributed import Team
from modelpatch.train.evaluation import evaluate, store_as, with_result
from modelpatch.train.fitting import Fit, check_parts
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.settings import FitSettings, check_settings

Sampling = Literal["equal", "proportional"]
BACKBONE = "backbone.safetensors"
PRIVATE, SHARED = "scale-bias(lr=0.001)", "full-finetune"  # a rate for weights that move together
FOR_FROZEN = {  # settings that only make sense over a frozen backbone, or for a task that ends on its own
    **dict.fromkeys(("cache", "views"), "what lies before a patch moves"),
    **dict.fromkeys(("validation", "early_stopping"), "all tasks end together"),
    "layer_decay": "weights that tasks share have the method's rate",
    "swa": "an average of a patch belongs to no state of the weights that moved",
}


@dataclass(frozen=True)
class Multitask:
    """The backbone that the tasks trained together and their patches of it, measured, by the tasks' names.

    `shared_parameters` is the number of trained weights that all tasks read.
    """

    backbone: Backbone
    patches: Mapping[str, Patch]
    shared_parameters: int
    seconds: float

    @property
    def top1(self) -> float:
        """The mean of the tasks' test accuracies."""
        return fmean(patch.metrics["test_top1"] for patch in self.patches.values())

    @property
    def backbone_parameters(self) -> int:
        """Parameters of the backbone without its own classifier."""
        return sum(segment.parameters for segment in self.backbone.chain)

    @property
    def numbers(self) -> int:
        """All numbers that the tasks need, statistics included: their patches, and what at least one reads of the backbone."""
        replaced = [{name for name in patch.tensors if name.startswith("replace/")} for patch in self.patches.values()]
        nobody = set.intersection(*replaced)
        tensors = [named for segment in self.backbone.chain for named in segment.named_tensors()]
        read = {name: t.numel() for name, t in tensors if t.is_floating_point() and f"replace/{name}" not in nobody}
        return sum(read.values()) + sum(t.numel() for patch in self.patches.values() for t in patch.tensors.values())

    def as_dict(self) -> dict[str, Any]:
        tasks = {}
        for name, patch in self.patches.items():
            head = sum(tensor.numel() for tensor in patch.head_tensors.values())
            private = sum(tensor.numel() for tensor in patch.tensors.values()) - head
            tasks[name] = {**patch.metrics, "private_numbers": private, "head_numbers": head}
        figures = ("top1", "backbone_parameters", "shared_parameters", "numbers", "seconds")
        facts = {"backbone": self.backbone.spec, "fingerprint": self.backbone.fingerprint}
        return {"tasks": tasks, **facts, **{name: getattr(self, name) for name in figures}}


def fit_multitask(
    backbone: Backbone,
    tasks: Sequence[Task],
    private: Method | str = PRIVATE,
    *,
    shared: Method | str = SHARED,
    sampling: Sampling = "equal",
    weights: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Multitask:
    """Train a copy of the backbone on several tasks together, with a patch of the method `private` for each.

    `shared` says which weights the tasks share and how these train: a method that would own them in a patch, `FullFinetune()`
    for all, `Subset("layer4")` for some. What `private` owns is every task's own. `sampling` is that of the module's table,
    `weights` are the tasks' by name, 1 where none is given. `settings` are those of `FitSettings` that suit weights that
    move; `epochs` are passes over all tasks' images together, so that with equal sampling a small task makes more.

    `out` names a folder for `backbone.safetensors` and a patch file a task; `checkpoint`, `log` and `progress` are those of
    `fit`, logs in a folder a task. Where `torch.distributed` was started its processes share the tasks, and where there are
    more of them the batches, and all return the result; it equals that of one process but for rounding.

    Raises `MethodError` for methods that cannot be trained so, `DataError` for tasks that cannot be told apart,
    `TrainingError` for settings that cannot be, and what `fit` raises.
    """
    check_tasks(tasks)
    private, shared = (check_parts(backbone, tasks[0], method)[2] for method in (private, shared))
    if sampling not in get_args(Sampling):
        raise TrainingError(f"sampling is {sampling!r}; expected one of: {', '.join(get_args(Sampling))}.")
    chosen = check_joint_settings(settings)
    architecture = check_writable(backbone) if out is not None else ""
    files = {} if out is None else task_files(Path(out), [task.task.name for task in tasks])
    if out is not None:
        check_place(
            Path(out) / BACKBONE, sum(one.nbytes for one in backbone.module.state_dict().values()), makes_folder=True
        )
    team = Team.everyone()
    bar = Progress(f"{len(tasks)} tasks") if progress and team.leads else quiet_progress()
    with bar:
        run = _Run(backbone, tasks, private, shared, sampling, weights or {}, chosen, bar, checkpoint, team, log)
        result = run.run(f"module:{type(backbone.module).__name__}" if out is None else f"file:{BACKBONE}")
        if team.leads and out is not None:
            facts = {"base": backbone.spec, "base_fingerprint": backbone.fingerprint, "tasks": list(result.patches)}
            Path(out).mkdir(parents=True, exist_ok=True)
            save_backbone(result.backbone, Path(out) / BACKBONE, architecture, multitask=facts)
            for name, path in files.items():
                result.patches[name].save(path)
        if team.leads and run.checkpoint:
            run.checkpoint.clear()
        team.follow(None)  # nobody goes on before the files are as they will be
    return result


class _Run:
    """One run: a `Fit` a task over one copy of the backbone, taken step by step, and the weights that they share."""

    def __init__(
        self,
        backbone: Backbone,
        tasks: Sequence[Task],
        private: Method,
        shared: Method,
        sampling: Sampling,
        weights: Mapping[str, float],
        settings: FitSettings,
        bar: Progress,
        checkpoint: str | Path | None,
        team: Team,
        log: str | Path | None,
    ) -> None:
        self.base, self.private, self.settings, self.bar, self.team = backbone, private, settings, bar, team
        self.log, self.copy = log, backbone.around(copy.deepcopy(backbone.module))
        self.shared = SharedWeights(self.copy, shared)
        names = [task.task.name for task in tasks]
        sizes = batch_sizes(tasks, settings.batch_size, sampling)
        self.shares = shares(names, weights, sizes if sampling == "proportional" else [1] * len(tasks))
        self.fits = {
            name: Fit(self.copy, task, private, replace(settings, batch_size=size, cache=False), bar=bar, team=own)
            for name, task, size, own in zip(names, tasks, sizes, teams_of(team, len(tasks)), strict=True)
        }
        self.served = {name: fit for name, fit in self.fits.items() if team.rank in fit.team.ranks}
        self.rounds = max(1, round(settings.epochs * fmean(fit.per_epoch for fit in self.fits.values())))
        identity = {
            "tasks": {name: fit.identity for name, fit in self.fits.items()},
            "shared": {shared.name: shared.hyperparameters()},
            "sampling": sampling,
            "weights": dict(weights),
        }
        self.checkpoint = Checkpoint(checkpoint, identity, self.base) if checkpoint else None
        self.facts = {"shared": shared.name, "sampling": sampling, "shares": self.shares, "rounds": self.rounds}

    def run(self, spec: str) -> Multitask:
        """Train; the result's backbone is called `spec`."""
        began = time.perf_counter()
        saved = self.team.follow(self.checkpoint.load() if self.checkpoint and self.team.leads else None)
        self.models = {name: fit.build() for name, fit in self.served.items()}
        self.trainers = {}
        for name, fit in self.served.items():
            logs = [MetricLogger(Path(self.log) / file_name(name))] if self.log is not None and fit.team.leads else []
            self.trainers[name] = fit.make_trainer(self.models[name], logs, self.rounds)
        for name, trainer in self.trainers.items():
            trainer.begin(saved["tasks"][name] if saved else None)
            self.shared.join(self.models[name], self.private, self.shares[name])
        self.shared.begin(self.private, saved["shared"] if saved else None)
        self._train(saved["done"] if saved else 0)
        return self._finish(spec, time.perf_counter() - began)

    def _train(self, done: int) -> None:
        """Rounds from `done` on; all tasks' state is saved in one file, so that it is of one moment."""
        steps = [trainer.steps() for trainer in self.trainers.values()]
        with self.bar.task("training", self.rounds, done) as advance:
            for number in range(done, self.rounds):
                for step in steps:
                    next(step)
                self.shared.step(self.settings.factor(number, self.rounds), self.settings.clip, self.team)
                advance(1)
                if self.checkpoint and self.team.follow(self.checkpoint.due() or number + 1 == self.rounds):
                    tasks = self._collect(lambda name, _: self.trainers[name].state_dict())
                    if self.team.leads:
                        self.checkpoint.save({"tasks": tasks, "shared": self.shared.snapshot(), "done": number + 1})
        for step in steps:
            next(step, None)  # the end of the training

    def _collect(self, make: Callable[[str, Fit], Any]) -> dict[str, Any]:
        """Return what the leader of each task's team makes of it, in every process."""
        own = {name: make(name, fit) for name, fit in self.served.items() if fit.team.leads}
        return {name: made for part in self.team.collect(own) for name, made in part.items()}

    def _finish(self, spec: str, seconds: float) -> Multitask:
        plain = {key: value for key, value in self.base.arguments.items() if key not in ("pretrained", "seed")}
        trained = replace(self.copy, spec=spec, arguments=plain, about={})  # the base's facts are not this one's
        record = BackboneRecord.of(trained)
        patches = self._collect(lambda name, fit: self._patch(name, fit, trained, record, seconds))
        self.base.verify_tensors()
        count = sum(weight.numel() for weight in self.shared.weights.values())
        return Multitask(trained, {name: patches[name] for name in self.fits}, count, round(seconds, 2))

    def _patch(self, name: str, fit: Fit, trained: Backbone, record: BackboneRecord, seconds: float) -> Patch:
        """The task's patch, measured on the backbone as it will be loaded."""
        made = fit.make_patch(self.models[name], record, seconds)
        facts = {**self.facts, "with": list(self.fits), "epochs": round(self.rounds / fit.per_epoch, 3)}
        # no fit of this task alone may take the file for its own
        made = replace(made, created={**made.created, "multitask": facts, "run": f"multitask {fit.digest}"})
        made = with_result(made, evaluate(trained, made, fit.data))
        return store_as(trained, made, fit.data, self.settings.dtype)


# shared weights ---------------------------------------------------------------------------------------------


class SharedWeights:
    """The weights of `backbone`, a copy, which `method` would train in a patch, with its rates, weight decay and optimizer.

    Every task's model reads the same bytes; the gradients of all are added up here, and one step is taken when every task has
    taken its own. Raises `MethodError` for a method that trains anything but weights as they are.
    """

    origins: Mapping[str, Graft] = {}  # none of them was added

    def __init__(self, backbone: Backbone, method: Method) -> None:
        self.backbone, self.method = backbone, method
        owned, parameters = method.blueprint(backbone).owned, dict(backbone.module.named_parameters())
        able = all(one.shares_across_tasks and not getattr(one, "reinitialize", False) for one in method.members)
        if not able or set(owned) - parameters.keys():
            names = [kind.name for kind in METHODS.values() if kind.shares_across_tasks]
            raise MethodError(
                f"{method.name} with these options does more than train weights as they are, which is all that tasks can "
                f"share. Name as shared {', '.join(names)}, with frozen statistics."
            )
        self._candidates = {name: parameters[name] for name in owned}
        for parameter in self._candidates.values():
            parameter.requires_grad_()
        self.weights: dict[str, nn.Parameter] = {}  # those that a task's model reads

    def join(self, model: PatchedModel, private: Method, share: float) -> None:
        """Register gradient hooks on the shared weights of a task's model. Call it before the first step, for all tasks.

        Raises `MethodError` for a private method whose patches would not follow the weights as they move.
        """
        if model.reading.both:
            raise MethodError(f"{private.name}: a siamese head reads the base's own features, which move here.")
        if not all(cast(Reweighting, model.get_submodule(path)).follows for path in model.reweighted.values()):
            raise MethodError(f"{private.name} holds weights at the base's values, which move here. Choose another.")
        places = {parameter.data_ptr(): name for name, parameter in self._candidates.items()}
        for parameter in model.parameters():
            name = places.get(parameter.data_ptr())
            if name is not None and parameter.requires_grad:
                self.weights[name] = self._candidates[name]
                parameter.register_post_accumulate_grad_hook(partial(_add_gradient, self._candidates[name], share))

    def begin(self, private: Method, saved: Mapping[str, Any] | None) -> None:
        """After the last `join`: make the optimizer, or go on from a snapshot. Raises `MethodError` for nothing to share."""
        if not self.weights:
            raise MethodError(
                f"{private.name} makes everything private that {self.method.name} would share. Use `modelpatch fit` for "
                "tasks that share nothing, or choose a smaller private method."
            )
        self.optimizer = self.method.make_optimizer(self, self.backbone)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if saved is not None:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(saved["weights"][name])
            self.optimizer.load_state_dict(saved["optimizer"])

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"replace/{name}", weight) for name, weight in self.weights.items())

    def step(self, factor: float, clip: float, team: Team) -> None:
        """One step at `factor` times the method's learning rates with the gradients of all the team's processes."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        team.add_up_gradients(self.weights.values())
        if clip:
            nn.utils.clip_grad_norm_(self.weights.values(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> dict[str, Any]:
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}


def _add_gradient(weight: nn.Parameter, share: float, parameter: Tensor) -> None:
    """Move a task's share of its gradient to the shared weight."""
    assert parameter.grad is not None
    weight.grad = share * parameter.grad if weight.grad is None else weight.grad.add_(parameter.grad, alpha=share)
    parameter.grad = None


# tasks, settings and files ----------------------------------------------------------------------------------


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises `DataError` for what is no task, for none, and for two of one name."""
    if isinstance(tasks, Task) or not tasks or not all(isinstance(task, Task) for task in tasks):
        raise DataError(f"{str(tasks)[:200]} is not tasks' data. Expected a list: [mp.load_task(...), ...].")
    for task in tasks:
        check_classification(task, "multitask")
    names = [task.task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two tasks are called {twice[0]!r}. Name them: mp.load_task(..., name=...).")


def batch_sizes(tasks: Sequence[Task], size: int, sampling: Sampling) -> list[int]:
    """Images of every task in a round: `size` of each, or their sum shared out by the tasks' training images, 2 at least."""
    if sampling == "equal":
        return [size] * len(tasks)
    images = [len(task.train) for task in tasks]
    return [max(2, round(size * len(tasks) * count / sum(images))) for count in images]


def shares(names: Sequence[str], weights: Mapping[str, float], sizes: Sequence[int]) -> dict[str, float]:
    """Return every task's share of the shared gradient, 1 together. Raises `TrainingError` for impossible weights."""
    if not isinstance(weights, Mapping):
        raise TrainingError(f"the weights are {weights!r}; expected a number by task: {{{names[0]!r}: 2}}.")
    if unknown := sorted(weights.keys() - set(names)):
        raise TrainingError(f"there is no task {unknown[0]!r} to weigh. The tasks: {', '.join(names)}.")
    able = [isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights.values()]
    if wrong := [name for name, good in zip(weights, able, strict=True) if not good]:
        raise TrainingError(f"the weight of {wrong[0]} is {weights[wrong[0]]!r}; expected a number above 0.")
    heavy = [weights.get(name, 1.0) * size for name, size in zip(names, sizes, strict=True)]
    return {name: weight / sum(heavy) for name, weight in zip(names, heavy, strict=True)}


def teams_of(team: Team, tasks: int) -> list[Team]:
    """Who trains each task: processes take turns through the tasks, or tasks through the processes, if there are fewer."""
    count = len(team.ranks)
    if count <= tasks:
        return [Team((task % count,), team.rank) for task in range(tasks)]
    return [team.some([rank for rank in team.ranks if rank % tasks == task]) for task in range(tasks)]


def check_joint_settings(values: dict[str, Any]) -> FitSettings:
    """Settings of a fit that suit weights that move. Raises `TrainingError` for others."""
    for name, reason in FOR_FROZEN.items():
        if name in values:
            raise TrainingError(f"tasks trained together have no setting {name!r}: {reason}. Leave it out.")
    chosen = check_settings(values)
    if chosen.precision == "float16":
        raise TrainingError("tasks trained together cannot share float16's loss scale. Use precision='bfloat16'.")
    return chosen


def task_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The patch file of every task. Raises `DataError` for names that give one file, or the backbone's."""
    files = {name: folder / f"{file_name(name)}.safetensors" for name in names}
    taken = [BACKBONE, *(path.name for path in files.values())]
    if twice := sorted({name for name in taken if taken.count(name) > 1}):
        raise DataError(f"two of the files would be called {twice[0]}. Name the tasks: mp.load_task(..., name=...).")
    return files
