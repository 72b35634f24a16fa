"""Train a patch with any method: check, build the model and its inputs, run the trainer, measure.

    images -> [frozen prefix, cached] -> patched spans and frozen rest -> head -> the loss of the task's kind

The backbone is hashed before and after; a fit that would change it fails. Every random choice follows `seed`, and each
batch's order and augmentation follow (seed, epoch, step) alone, so that a run killed at any moment resumes from its last
checkpoint to the same patch.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from modelpatch.atomic import check_place
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.augmentation import choose_augmentation
from modelpatch.data.images import NO_AUGMENTATION, pieces
from modelpatch.data.task import Task
from modelpatch.errors import DataError, MethodError, TrainingError, warn_caller
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.method import Batch, Method
from modelpatch.methods.registry import make_method
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import BackboneRecord
from modelpatch.patch.model import PatchedModel
from modelpatch.provenance import describe_making
from modelpatch.tasks.kind import Kind, balance, kind_of
from modelpatch.text import brief, digest_of
from modelpatch.train.batches import BatchSource, Minibatch, place
from modelpatch.train.callbacks import (
    CheckpointSaver,
    EagerSteps,
    EarlyStopping,
    MethodEvents,
    MetricLogger,
    ProgressBar,
    RisingLoss,
    averages,
    check_folder,
)
from modelpatch.train.distributed import ALONE, Team
from modelpatch.train.evaluation import read_patch, store_as, with_result
from modelpatch.train.inputs import OwnInputs, RowBatches, SharedInputs, cut_rows
from modelpatch.train.probing import HeadProbe
from modelpatch.train.progress import Progress, quiet_progress
from modelpatch.train.regularising import by_depth, check_recipe, set_drop_path, train_batches, with_rates
from modelpatch.train.remade import RemadeWeights
from modelpatch.train.settings import Every, FitOptions, FitSettings, check_callbacks, check_settings
from modelpatch.train.trainer import Callback, Figures, Trainer, get_state, load_state

HELD = 64  # images of a batch that is measured


def fit(
    backbone: Backbone,
    data: Task | tuple[Any, Any],
    method: Method | str,
    *,
    out: str | Path | None = None,
    reuse: bool = False,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    optimizer: Callable[..., Optimizer] | None = None,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    schedule_every: Every | None = None,
    loss: Callable[..., Any] | str | None = None,
    transform: Callable[..., Any] | None = None,
    accumulate: int = 1,
    monitor: str | None = None,
    ema: float | None = None,
    checkpoint_activations: bool = False,
    created: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Patch:
    """Train a patch of `method` (or of its spelling, see `make_method`) for the task and measure it on the test images.

    `data` is a `Task`, or a pair of data sets for `Task.from_datasets`. `settings` are the fields of `FitSettings`:
    epochs=10, batch_size=32, seed=0, image_size=None (the backbone's, pixels), augment="auto", framing="auto", decoder=None,
    taps=(), views=4, cache=True, memory=2 * 2**30 (bytes), schedule="cosine", drops=(2/3, 5/6), warmup=0.05 (share of the
    steps), loss="auto", label_smoothing=0.0, class_weights="none", validation=0.0 (share of the images), early_stopping=0
    (epochs), clip=0.0, sampling="plain", mixup=0.0, cutmix=0.0, drop_path=0.0, layer_decay=1.0, swa=0 (epochs),
    precision="auto", dtype="float32". `out` names the patch's file; with `reuse` a file that the very
    same run wrote earlier is read instead. `checkpoint` names a folder of training state, saved every minute and every
    epoch, from which an interrupted run resumes exactly; it is emptied at the end. `log` names a folder for `metrics.csv`, a
    row an epoch, and for TensorBoard's events where it is installed. `progress` draws a bar on a terminal.

    `optimizer` is a class or a function from the method's parameter groups to an optimizer, `scheduler` a function from it to
    a scheduler, stepped `schedule_every` epoch or step, in place of the settings' schedule; `loss` a function of (answers,
    targets) in place of the kind's, or the name of one of those; `transform` a torchvision transform in place of the
    augmentation. `accumulate` batches make a step. `monitor` names the figure by which the best epoch is chosen, such as
    "validation_loss". `ema` is the decay of an average of the weights. `checkpoint_activations` saves memory and takes longer.
    `created` are facts of your own for the patch's record.
    For everything else give `callbacks`, or use `Trainer`.

    With `torch.distributed` started, its processes share every batch and all return the patch that one alone would
    have trained, but for rounding; the first writes the files.

    Returns the patch with its measured test accuracy in `metrics`. Raises `MethodError`, `MethodNotApplicableError`,
    `DataError`, `CheckpointMismatchError` for a checkpoint or a reused file of another run, `DivergedError` for a loss
    that is not finite, other `TrainingError`s, and `BackboneChangedError` if anything wrote to the frozen tensors.
    """
    if isinstance(loss, str):
        settings, loss = {**settings, "loss": loss}, None
    options = FitOptions(
        optimizer=optimizer,
        scheduler=scheduler,
        schedule_every=schedule_every,
        loss=loss,
        transform=transform,
        accumulate=accumulate,
        monitor=monitor,
        ema=ema,
        checkpoint_activations=checkpoint_activations,
    )
    chosen = check_settings(settings)
    callbacks = check_callbacks(callbacks, Callback)
    backbone, task, method = check_parts(backbone, data, method)
    team = Team.everyone()
    bar = Progress(f"{method.name} on {task.task.name}") if progress and team.leads else quiet_progress()
    with bar:
        out = None if out is None else Path(out)
        run = Fit(backbone, task, method, chosen, options=options, bar=bar, team=team, out=out)
        run.told = dict(created or {})
        if out is not None and team.follow(reuse and out.exists()):
            return read_patch(out, run.digest, backbone)
        for purpose, folder in (("checkpoint", checkpoint), ("log", log)):
            if folder is not None and team.leads:
                check_folder(Path(folder), purpose)
        savers = [CheckpointSaver(checkpoint, run.identity)] if checkpoint else []
        loggers = [MetricLogger(log)] if log is not None and team.leads else []
        patch = store_as(backbone, run.run([RisingLoss(), *callbacks, *loggers, *savers]), task, chosen.dtype)
        if team.leads:
            if out is not None:
                patch.save(out)
            for saver in savers:
                saver.clear()
        team.follow(None)  # no process continues before the files are written
    return patch


def check_parts(backbone: Any, data: Any, method: Any) -> tuple[Backbone, Task, Method]:
    """Return the three parts of a fit, a method's spelling read. Raises the error of what is none of them."""
    if not isinstance(backbone, Backbone):
        raise TrainingError(f"{brief(backbone)} is not a backbone. Load it first: mp.load_backbone(...).")
    if isinstance(data, tuple):
        data = Task.from_datasets(*data)
    if not isinstance(data, Task):
        raise DataError(
            f"{brief(data)} is not a task's data. Load it first: mp.load_task(...), or mp.Task.from_datasets(train, test) for "
            "data sets, which a pair (train, test) stands for."
        )
    if isinstance(method, str):
        method = make_method(method)
    if not isinstance(method, Method):
        raise MethodError(f"{brief(method)} is not a method. Expected one like ScaleBias(lr=0.003), or its spelling.")
    return backbone, data, method


class Fit:
    """One fit, checked and ready to run: its data, preprocessing, objective and identity."""

    def __init__(
        self,
        backbone: Backbone,
        data: Task,
        method: Method,
        settings: FitSettings,
        *,
        options: FitOptions | None = None,
        preprocessing: Preprocessing | None = None,
        source: OwnInputs | SharedInputs | None = None,
        bar: Progress | None = None,
        team: Team = ALONE,
        out: Path | None = None,
    ) -> None:
        self.out = out
        self.options = options = options or FitOptions()
        self.backbone, self.method, self.team = backbone, method, team
        self.told: dict[str, Any] = {}  # more facts for the patch
        self.bar = bar or quiet_progress()
        if settings.early_stopping and data.validation is None and not settings.validation:
            settings = replace(settings, validation=0.1)
        self.settings = settings
        data = data.with_transform(options.transform)
        self.kind = kind_of(data.task.kind)
        self.kind.check_libraries()
        held = settings.validation or (0.0 if data.train.is_stream else self.kind.held_out)
        self.data = data.with_validation(held, settings.seed) if held else data
        self.kind.check_loss(settings.class_weights != "none", settings.label_smoothing > 0)
        check_recipe(settings, options, self.kind, self.data)
        if isinstance(settings.class_weights, tuple) and len(settings.class_weights) != len(data.classes):
            given, expected = len(settings.class_weights), len(data.classes)
            raise TrainingError(
                f"class_weights has {given} numbers; {data.task.name} has {expected} {self.kind.nouns}. Give one for each."
            )
        self.targets = self.read_targets()
        self.facts = self.kind.prepare(self.targets, data.classes)
        self.kind.make_loss(settings.loss, self.facts)  # refuses one of another name
        self.preprocessing = preprocessing or settings.seen(backbone.preprocessing, data.task.kind)
        backbone.check_image_size(self.preprocessing.image_size)
        self.augmentation = choose_augmentation(settings.augment, self.data.train)
        self.device = backbone.device
        self.source = source or OwnInputs(
            backbone, self.data, self.preprocessing, self.augmentation, settings, self.bar
        )
        self.validates = self.data.validation is not None and bool(settings.early_stopping or settings.validation)
        if options.monitor and not self.validates:
            raise TrainingError(f"monitor={options.monitor!r} picks an epoch. Give validation= or early_stopping= too.")
        self.identity = {  # all that must be equal for a checkpoint to be continued, or a patch's file to be of this run
            "backbone": backbone.fingerprint,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "task": self.data.task.model_dump(mode="json"),
            "images": self.data.train.digest,
            "validation": self.data.validation.digest if self.data.validation is not None else None,
            "method": method.name,
            "hyperparameters": method.hyperparameters(),
            "settings": asdict(settings),
            **options.described,
        }
        self.digest = digest_of(self.identity)

    @property
    def per_epoch(self) -> int:
        """The number of batches in an epoch."""
        return len(cut_rows(len(self.data.train), self.settings.batch_size, self.settings.seed))

    def run(self, callbacks: Sequence[Callback] = (), start: Mapping[str, Tensor] | None = None) -> Patch:
        """Train from the base, or from `start` (see `PatchedModel.start_from`), and measure on the test images."""
        record, began = BackboneRecord.of(self.backbone), time.perf_counter()
        self.model = self.build(start)
        best = self.train(self.model, callbacks)
        patch = self.measure(self.model, self.make_patch(self.model, record, time.perf_counter() - began))
        self.backbone.verify_tensors()
        return patch.with_metrics(**best)

    def train(self, model: PatchedModel, callbacks: Sequence[Callback] = (), steps: int | None = None) -> Figures:
        """Train a model that `build` made for the epochs or a number of `steps`. Returns its score on validation images."""
        if self.solves_head(model, callbacks):
            return self.solve_head(model, [one for one in callbacks if isinstance(one, MetricLogger)])
        trainer = self.make_trainer(model, [ProgressBar(self.bar), *callbacks], steps)
        trainer.train()
        return {str(o.monitor): o.best_value for o in trainer.callbacks if isinstance(o, EarlyStopping) and o.best}

    def build(self, start: Mapping[str, Tensor] | None = None) -> PatchedModel:
        """Return the model before the first step; all that is random in it follows the seed."""
        torch.manual_seed(self.settings.seed)
        classes, size = len(self.data.classes), self.preprocessing.image_size
        decoder = self.kind.make_head(self.backbone, classes, size, self.settings.decoder, self.settings.taps)
        model = self.method.draft(self.backbone, classes, decoder).to(self.device)
        self.check_savable(model)
        self.kind.check_head(model.head, self.settings.dtype, self.facts)
        self.kind.start_head(model.head)
        set_drop_path(model, self.settings.drop_path)
        self.source.prepare(model)
        if start is not None:
            model.start_from(start)
        return model

    def check_savable(self, model: PatchedModel) -> None:
        """Check, before the first step, that a file can hold the model's patch and that `out` has room for it.

        Raises what `Patch.check_savable` and `check_place` do.
        """
        facts = {
            "data": dict(self.data.facts),
            "settings": asdict(self.settings),
            **self.options.described,
            **self.told,
        }
        patch = model.to_patch(self.data.task, preprocessing=self.preprocessing, method=self.method, created=facts)
        size = patch.astype(self.settings.dtype).check_savable()
        if self.out is not None and self.team.leads:
            check_place(self.out, size)

    def solves_head(self, model: PatchedModel, callbacks: Sequence[Callback] = ()) -> bool:
        """Return True where nothing but a linear head is trained, on cached features, and nothing says how to take steps."""
        plain = type(model.head) is LinearHead and model.head.weight.requires_grad and not model.spans
        silent = all(isinstance(one, MetricLogger | CheckpointSaver | RisingLoss) for one in callbacks)
        stepwise = self.settings.rules_steps or self.options.rules_steps or not self.settings.cache
        return self.method.solves_head and plain and silent and not stepwise

    def solve_head(self, model: PatchedModel, loggers: Sequence[MetricLogger] = ()) -> Figures:
        """Set the head of a model to the best one on its features. Returns its score on named validation images."""
        weights = self.weigh_classes()
        loss = self.kind.make_loss(self.settings.loss, self.facts, weights, self.settings.label_smoothing)
        probe = HeadProbe(self.data, self.kind, self.facts, self.settings, self.source, loss, weights, self.bar)
        solved = probe.solve(model, self.augmentation.name, self.validates)
        load_state(model, self.team.follow(get_state(model)))
        self.told |= solved.facts
        for logger in loggers:
            logger.write(solved.history)
        return solved.best

    def make_trainer(
        self, model: PatchedModel, callbacks: Sequence[Callback] = (), steps: int | None = None
    ) -> "PatchTrainer":
        """Return the trainer of a model that `build` made, for the settings' epochs or a number of `steps`."""
        events = MethodEvents(self.method, [(model, self.plain_batches)])
        data = self.batches(model, "train")
        held = self.batches(model, "validation") if self.validates else None
        return PatchTrainer(self, model, data, held, [events, *callbacks], self.options.accumulate, steps)

    def warn(self, total: int) -> None:
        """Warn of rates that are too high or too low for a number of steps."""
        reach = sum(self.settings.factor(step, total) for step in range(total))
        if warning := self.method.warn(reach):
            warn_caller(f"{self.method.name}: {warning}")
        if self.method.head_lr > self.kind.head_rate:
            rate = f"head_lr={self.method.head_lr:g}, the rate for linear heads. Set head_lr=0.001"
            warn_caller(f"the head of a {self.kind.name} task learns little at {rate}.")

    # data ---------------------------------------------------------------------------------------------------------

    def batches(self, model: PatchedModel, split: str) -> BatchSource:
        """Return a split's batches for a model: training images shuffled and augmented, others as they are."""
        inputs = self.source.inputs(model, split, augmented=split == "train")
        if split == "train":
            return train_batches(inputs, self.settings, self.data)
        pixels = self.preprocessing.image_size
        whole = torch.empty(HELD, 1, pixels, pixels, device=self.device)
        return RowBatches(inputs, HELD if inputs.start else len(pieces(whole)[0]))

    def plain_batches(self) -> Iterator[Tensor]:
        """Yield the training images, not augmented, in random order."""
        images, seed = self.source.images("train"), self.settings.seed
        rows = cut_rows(len(images), max(self.settings.batch_size, HELD), seed)
        for batch, _ in images.batches(rows, NO_AUGMENTATION, seed, 0):
            yield place(batch, self.device)

    def read_targets(self) -> Any:
        """Return the targets of all training images as a batch; None for class indices, and for those of places in images."""
        target = None if self.kind.dense else self.kind.target
        return None if target is None else target.batch(self.data.train.read_targets(), None, None)

    @torch.no_grad()
    def answers(self, model: PatchedModel, split: str) -> Iterator[tuple[Tensor, Any]]:
        """Yield a model's answers for a split's plain images and their targets, batch by batch, on the CPU."""
        model.eval()
        for batch in self.batches(model, split).batches(0):
            outputs = model.run_from(place(batch.inputs, self.device), batch.start)
            yield self.kind.to_answers(outputs.float().cpu(), self.facts), batch.targets

    def logits(self, model: PatchedModel, split: str) -> Tensor:
        """Return a model's logits (N, K) for a split's plain images, on the CPU."""
        return torch.cat([answers for answers, _ in self.answers(model, split)])

    def measure(self, model: PatchedModel, patch: Patch) -> Patch:
        """Return the patch of a model with its figures on the test images."""
        result = self.kind.measure(
            self.data.classes, self.answers(model, "test"), patch.task.options, with_interval=True
        )
        return with_result(patch, result)

    def weigh_classes(self) -> Tensor | None:
        """Return the weight (K,) of every class, as the settings have it, from the plain training images."""
        if self.settings.class_weights == "none":
            return None
        if isinstance(self.settings.class_weights, tuple):
            return torch.tensor(self.settings.class_weights, device=self.device)
        labels: Iterable[Any] = [self.targets]
        if self.kind.target is None:
            labels = [torch.from_numpy(self.data.train.labels)]
        if self.kind.dense:
            labels = (targets for _, targets in self.source.images("train").plain_batches())
        counts = torch.zeros(len(self.data.classes), dtype=torch.long)
        for targets in labels:
            counts += self.kind.count_classes(targets, len(counts))
        return balance(counts).to(self.device)

    # the patch ----------------------------------------------------------------------------------------------------

    def make_patch(self, model: PatchedModel, backbone: BackboneRecord, seconds: float) -> Patch:
        """Return a trained model as a patch of a backbone, finished as its kind asks for, and not measured."""
        held_out = None if self.data.validation is None else self.answers(model, "validation")
        options = self.kind.calibrate(self.data.classes, self.facts, held_out)
        patch = model.to_patch(
            self.data.task.model_copy(update={"options": options}),
            preprocessing=self.preprocessing,
            method=self.method,
            created={
                **describe_making(),
                "date": datetime.now(UTC).date().isoformat(),
                "seconds": round(seconds, 2),
                "device": self.device.type,
                "train_images": len(self.data.train),
                "trainable_parameters": self.method.count_parameters(model),
                "augmentation": self.augmentation.name,
                "settings": asdict(self.settings),
                **self.options.described,
                **self.told,
                "data": dict(self.data.facts),
                "data_sha256": self.data.train.digest,
                "run": self.digest,
            },
        )
        body = {name: tensor for name, tensor in patch.tensors.items() if not name.startswith("head.")}
        head = {f"head.{name}": one for name, one in self.kind.finish_head(patch.head_tensors, options).items()}
        return replace(patch, backbone=backbone, tensors={**body, **head})


class PatchTrainer(Trainer):
    """A trainer of a model, or of several as one, under a fit's settings: the loss of the kind, and what the method adds."""

    def __init__(
        self,
        fit: Fit,
        model: Any,
        data: Any,
        validation: Any,
        callbacks: Sequence[Callback],
        accumulate: int,
        steps: int | None = None,
    ) -> None:
        settings, options, method = fit.settings, fit.options, fit.method
        self.kind, self.classes, self.facts, self.method = fit.kind, fit.data.classes, fit.facts, method
        self.class_weights = fit.weigh_classes()
        # the model of several that answers images, by their size
        self.model_of: Callable[[Tensor], Any] = getattr(model, "model_of", lambda images: model)
        self.remade: Any = RemadeWeights(model) if model.reweighted else nullcontext
        loss = fit.kind.make_loss(settings.loss, fit.facts, self.class_weights, settings.label_smoothing)
        if options.loss is not None:
            given, loss = options.loss, lambda outputs, targets: given(fit.kind.to_answers(outputs, fit.facts), targets)
        own: list[Callback] = [EarlyStopping(settings.early_stopping or None)] if validation is not None else []
        own += averages(options.ema, settings.swa)
        reads_gradients = any(type(one).on_gradients is not Callback.on_gradients for one in callbacks)
        if fit.team.alone and not (settings.clip or accumulate > 1 or options.optimizer or reads_gradients):
            own.append(EagerSteps())
        rates = model, fit.backbone, settings.layer_decay
        total = steps or -(-len(data) // accumulate) * settings.epochs
        fit.warn(total)
        super().__init__(
            model,
            data,
            loss,
            optimizer=options.optimizer or (lambda _: with_rates(method.make_optimizer(model, fit.backbone), *rates)),
            groups=by_depth(method.parameter_groups(model, fit.backbone), *rates) if options.optimizer else None,
            scheduler=options.scheduler or partial(LambdaLR, lr_lambda=partial(settings.factor, total=total)),
            schedule_every=options.schedule_every or (None if options.scheduler else "step"),
            steps=steps,
            epochs=settings.epochs,
            accumulate=accumulate,
            clip=settings.clip,
            validation=validation,
            monitor=options.monitor or (f"validation_{fit.kind.metric}" if validation is not None else None),
            precision=settings.precision,
            checkpoint_activations=options.checkpoint_activations,
            seed=settings.seed,
            callbacks=[*own, *callbacks],
            team=fit.team,
        )

    def train_step(self, batch: Minibatch) -> Tensor:
        """Return the loss of the task and of the method."""
        model, targets = self.model_of(batch.inputs), self.kind.move(batch.targets, self.device)
        try:
            with self.autocast(), self.remade():
                output = self.kind.run_head(model.head, model.head_input(batch.inputs, batch.start), targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"batch statistics cannot be learned from a batch of {len(batch)} at this image size: a layer has one "
                "value a channel. Raise batch_size or image_size, or freeze the statistics."
            ) from error
        seen = Batch(batch.inputs, batch.start, output, targets)
        return self.loss(output, targets) + sum(hook.added_loss(model, seen) for hook in self.method.all_hooks())

    def validation_step(self, batch: Minibatch) -> tuple[Tensor, Tensor | None]:
        model = self.model_of(batch.inputs)
        read, targets = model.head_input(batch.inputs, batch.start), self.kind.move(batch.targets, self.device)
        outputs = model.head(read)
        own = type(self.kind).run_head is not Kind.run_head
        loss = self.loss(self.kind.run_head(model.head, read, targets) if own else outputs, targets)
        return outputs.float(), loss

    def weigh(self, batch: Minibatch) -> Tensor:
        return self.kind.weigh_images(self.kind.move(batch.targets, self.device), self.class_weights)

    def measure(self, answers: Iterable[tuple[Tensor, Any]]) -> Figures:
        told = ((self.kind.to_answers(outputs, self.facts), targets) for outputs, targets in answers)
        return self.kind.watch(self.classes, told, self.facts, self.monitor.removeprefix("validation_"))
