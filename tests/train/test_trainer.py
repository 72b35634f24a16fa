"""The trainer: any model, batches, optimizer and scheduler; callbacks in order; early and plain refusals."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from conftest import make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import CheckpointMismatchError, DataError, DivergedError, TrainingError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.train import (
    Callback,
    CheckpointSaver,
    EarlyStopping,
    MetricLogger,
    Minibatch,
    Trainer,
    WeightAverage,
    callbacks,
)

IMAGES = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(IMAGES.split(size), LABELS.split(size), strict=True))


def loader(size: int = 5, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), size, shuffle=True, **options)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first: nn.Module, second: nn.Module, **tolerance: float) -> bool:
    pairs = zip(weights(first), weights(second), strict=True)
    return all(torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


# what is trained --------------------------------------------------------------------------------------------


def test_it_trains_what_a_plain_loop_trains() -> None:
    ours, plain = linear(), linear()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        for images, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            optimizer.step()
    history = Trainer(ours, batches(), optimizer=torch.optim.SGD, lr=0.1, epochs=3).train()
    assert same(ours, plain, rtol=1e-5, atol=1e-6)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("method", [ScaleBias(), ScaleBias(statistics="learned"), Subset()], ids=lambda m: m.name)
def test_a_patched_model_and_a_data_loader_train(backbone: Backbone, method: Any) -> None:
    model = method.build(backbone, ["a", "b", "c"])
    history = Trainer(model, loader(), lr=0.01, epochs=8, clip=1.0).train()
    assert history[-1]["loss"] < history[0]["loss"]
    patch = model.to_patch(("letters", ["a", "b", "c"]))
    assert torch.allclose(backbone.patched(patch)(IMAGES), model.eval()(IMAGES), atol=1e-5)
    backbone.verify()


def test_a_stream_of_unknown_length_trains_for_epochs_or_steps() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(IMAGES, LABELS, strict=True)

    data = DataLoader(Stream(), batch_size=8)
    for limit, steps in ({"epochs": 2}, 6), ({"steps": 4}, 4):
        trainer = Trainer(linear(), data, **limit)  # type: ignore[arg-type]
        trainer.train()
        assert trainer.step == steps


def test_accumulated_batches_are_one_larger_batch() -> None:
    whole, parts = linear(), linear()
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 0.1, "epochs": 2, "clip": 0.5}
    Trainer(whole, batches(10), **options).train()
    trainer = Trainer(parts, batches(4), accumulate=5, **options)
    trainer.train()
    assert trainer.step == 2  # 5 batches an epoch
    two = linear()
    Trainer(two, batches(20), **options).train()
    assert same(parts, two, rtol=1e-5, atol=1e-6)
    assert not same(parts, whole, rtol=1e-5, atol=1e-6)


def test_activations_that_are_computed_again_give_the_same_gradients(backbone: Backbone) -> None:
    models = []
    for again in (False, True):
        torch.manual_seed(0)
        models.append(ScaleBias().build(backbone, 3))
        Trainer(models[-1], batches(), lr=0.01, epochs=2, checkpoint_activations=again).train()
    assert same(*models, rtol=1e-4, atol=1e-6)


def test_a_step_of_ones_own() -> None:
    class Doubled(Trainer):
        def train_step(self, batch: Minibatch) -> Tensor:
            return 2 * super().train_step(batch)

    plain = Trainer(linear(), batches(20), optimizer=torch.optim.SGD, lr=0.2, epochs=1)
    doubled = Doubled(linear(), batches(20), optimizer=torch.optim.SGD, lr=0.1, epochs=1)
    assert doubled.train()[0]["loss"] == pytest.approx(2 * plain.train()[0]["loss"])
    assert same(plain.model, doubled.model, rtol=1e-5, atol=1e-6)


def test_metrics_are_functions_or_objects_that_are_updated() -> None:
    class Images:
        count = 0

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.count += len(outputs)

        def compute(self) -> int:
            return self.count

        def reset(self) -> None:
            self.count = 0

    trainer = Trainer(
        linear(), batches(), validation=batches(7), metrics={"top1": accuracy, "images": Images()}, epochs=2
    )
    row = trainer.train()[-1]
    model = trainer.model.eval().requires_grad_(False)
    assert row["validation_images"] == 20
    assert row["validation_top1"] == pytest.approx(float(accuracy(model(IMAGES), LABELS)))
    assert row["validation_loss"] == pytest.approx(float(F.cross_entropy(model(IMAGES), LABELS)), rel=1e-5)


# optimizers and schedulers ----------------------------------------------------------------------------------


def test_an_optimizer_is_an_instance_a_class_or_a_function() -> None:
    models = [linear() for _ in range(3)]
    given = [torch.optim.SGD(models[0].parameters(), lr=0.1), torch.optim.SGD, partial(torch.optim.SGD, lr=0.1)]
    for model, optimizer in zip(models, given, strict=True):
        Trainer(model, batches(), optimizer=optimizer, lr=0.1, epochs=1).train()
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_a_scheduler_steps_every_epoch_unless_it_is_made_for_steps() -> None:
    def rates(scheduler: Any, **options: Any) -> list[float]:
        trainer = Trainer(linear(), batches(), optimizer=torch.optim.SGD, lr=1.0, scheduler=scheduler, **options)
        return [row["lr"] for row in trainer.train()]

    assert rates(partial(StepLR, step_size=1), epochs=3) == pytest.approx([1, 0.1, 0.01])
    assert rates(partial(StepLR, step_size=4), epochs=2, schedule_every="step") == pytest.approx([1, 0.1])
    assert rates(partial(OneCycleLR, max_lr=1.0, total_steps=8), epochs=2)[-1] < 0.1
    plateau = partial(ReduceLROnPlateau, mode="max", patience=0, threshold=10)
    assert rates(plateau, epochs=3, validation=batches(), metrics={"top1": accuracy}, monitor="validation_top1")[-1] < 1


# callbacks --------------------------------------------------------------------------------------------------


class Events(Callback):
    def __init__(self, events: list[str], name: str = "") -> None:
        self.events, self.name = events, name

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda trainer: self.events.append(self.name + name.removeprefix("on_"))
        return super().__getattribute__(name)


def test_events_happen_in_order() -> None:
    events: list[str] = []
    Trainer(linear(), batches(10), epochs=1, validation=batches(), callbacks=[Events(events)]).train()
    step = ["step_begin", "gradients", "step_end"]
    assert events == ["train_begin", "epoch_begin", *step, *step, "validation_begin", "epoch_end", "train_end"]


def test_callbacks_leave_in_the_reverse_order() -> None:
    events: list[str] = []
    Trainer(linear(), batches(20), epochs=1, callbacks=[Events(events, "a "), Events(events, "b ")]).train()
    assert events[:2] == ["a train_begin", "b train_begin"]
    assert events[-2:] == ["b train_end", "a train_end"]


def test_an_exception_reaches_the_callbacks_and_the_caller() -> None:
    class Broken(Trainer):
        def train_step(self, batch: Minibatch) -> Tensor:
            raise ZeroDivisionError

    events: list[str] = []
    with pytest.raises(ZeroDivisionError):
        Broken(linear(), batches(), callbacks=[Events(events)]).train()
    assert events[-1] == "exception"


class Scripted(Trainer):
    """A trainer whose validation figure is read from a script."""

    script: Iterator[float] = iter(())

    def measure(self, answers: Any) -> dict[str, float]:
        list(answers)
        return {"score": next(self.script)}


@pytest.mark.parametrize(("monitor", "mode", "best"), [("validation_score", "auto", 2), ("validation_score", "min", 0)])
def test_early_stopping_restores_the_best_epoch(monitor: str, mode: Any, best: int) -> None:
    kept: list[list[Tensor]] = []

    class Keep(Callback):
        def on_epoch_end(self, trainer: Trainer) -> None:
            kept.append(weights(trainer.model))

    stopping = EarlyStopping(patience=2, monitor=monitor, mode=mode)
    trainer = Scripted(linear(), batches(), validation=batches(), epochs=9, callbacks=[stopping, Keep()])
    trainer.script = iter([0.1, 0.2, 0.9, 0.3, 0.8, 0.7])
    trainer.train()
    assert len(kept) == best + 3
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer.model), kept[best], strict=True))
    assert stopping.best_value == [0.1, 0.2, 0.9][best]


def test_the_average_of_the_weights_is_evaluated_and_kept() -> None:
    model, plain, average = linear(), linear(), weights(linear())
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 0.1, "epochs": 2}

    class Average(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            for mean, now in zip(average, trainer.model.parameters(), strict=True):
                mean.lerp_(now.detach(), 0.25)

    Trainer(plain, batches(), callbacks=[Average()], **options).train()
    history = Trainer(model, batches(), validation=batches(), callbacks=[WeightAverage(0.75)], **options).train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(model), average, strict=True))
    expected = float(F.cross_entropy(model.eval()(IMAGES).detach(), LABELS))
    assert history[-1]["validation_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_log_has_a_row_an_epoch(tmp_path: Path) -> None:
    Trainer(linear(), batches(), epochs=3, callbacks=[MetricLogger(tmp_path / "log")]).train()
    rows = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,lr,seconds"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]


# resumption -------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Interrupt before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 4, 6, 11])
def test_an_interrupted_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Order, dropout, scheduler, average, best epoch and log."""
    monkeypatch.setattr(callbacks, "EVERY_SECONDS", 0)

    def make(folder: Path, *others: Callback) -> Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(3 * 16 * 16, 3))
        own = [EarlyStopping(), WeightAverage(0.8), MetricLogger(folder / "log"), CheckpointSaver(folder / "state")]
        return Trainer(
            model,
            loader(),
            optimizer=torch.optim.Adam,
            lr=0.01,
            scheduler=partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
            schedule_every="step",
            validation=batches(),
            epochs=3,
            callbacks=[*own, *others],
        )

    whole = make(tmp_path / "whole")
    expected = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", Stop(after)).train()
    torch.rand(7)
    resumed = make(tmp_path / "run")
    history = resumed.train()
    assert resumed.resumed
    assert same(resumed.model, whole.model)
    left = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in one]
        for one in (history, expected)
    ]
    assert left[0] == left[1]
    assert len((tmp_path / "run" / "log" / "metrics.csv").read_text().splitlines()) == 4


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    first = CheckpointSaver(tmp_path)
    Trainer(linear(), batches(), epochs=1, callbacks=[first]).train()
    for saver in (first, CheckpointSaver(tmp_path)):
        with pytest.raises(CheckpointMismatchError, match="epochs = 1 instead of 2"):
            Trainer(linear(), batches(), epochs=2, callbacks=[saver]).train()


# refusals ---------------------------------------------------------------------------------------------------


def frozen() -> nn.Module:
    return linear().requires_grad_(False)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "model": (lambda: Trainer("resnet50", batches()), TrainingError, "the model is 'resnet50'. Expected an nn.Module"),
    "frozen": (
        lambda: Trainer(frozen(), batches()),
        TrainingError,
        "no parameter of the Sequential requires gradients",
    ),
    "dataset": (
        lambda: Trainer(linear(), TensorDataset(IMAGES)),
        DataError,
        r"is a Dataset.*DataLoader\(TensorDataset",
    ),
    "generator": (lambda: Trainer(linear(), iter(batches())), DataError, "can be read only once"),
    "text": (lambda: Trainer(linear(), "flowers/"), DataError, "data is 'flowers/'. Expected a DataLoader"),
    "loss": (lambda: Trainer(linear(), batches(), "mse"), TrainingError, "the loss is 'mse'. Expected a function"),
    "optimizer": (
        lambda: Trainer(linear(), batches(), optimizer="sgd"),
        TrainingError,
        "the optimizer is 'sgd'. Expected",
    ),
    "foreign": (
        lambda: Trainer(linear(), batches(), optimizer=torch.optim.SGD(linear().parameters(), lr=1.0)),
        TrainingError,
        "2 parameters that are not the model's",
    ),
    "scheduler": (
        lambda: Trainer(linear(), batches(), scheduler=torch.optim.lr_scheduler.CosineAnnealingLR),
        TrainingError,
        "cannot be made from an optimizer alone.*functools.partial",
    ),
    "every": (
        lambda: Trainer(linear(), batches(), schedule_every="batch"),
        TrainingError,
        "expected 'step' or 'epoch'",
    ),
    "accumulate": (lambda: Trainer(linear(), batches(), accumulate=0), TrainingError, "accumulate = 0 is not valid"),
    "precision": (lambda: Trainer(linear(), batches(), precision="int8"), TrainingError, "precision = 'int8'"),
    "callback": (
        lambda: Trainer(linear(), batches(), callbacks=[EarlyStopping]),
        TrainingError,
        "EarlyStopping is a class",
    ),
    "callbacks": (lambda: Trainer(linear(), batches(), callbacks=[print]), TrainingError, "expected|Expected a list"),
    "patience": (lambda: EarlyStopping(patience=0), TrainingError, "patience = 0 is not valid"),
    "decay": (lambda: WeightAverage(1.5), TrainingError, "1.5; expected a number between 0 and 1"),
    "activations": (
        lambda: Trainer(linear(), batches(), checkpoint_activations=True),
        TrainingError,
        "takes the segments of a PatchedModel; the model is a Sequential",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_thing_is_refused_before_the_first_step(name: str) -> None:
    call, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"pixel_values": IMAGES, "labels": LABELS}], "a batch is a dict of pixel_values, labels; expected a pair"),
        ([(IMAGES, LABELS, LABELS)], "a batch is a tuple of Tensor, Tensor, Tensor"),
        ([], "the data has no batches"),
    ],
)
def test_batches_that_are_no_pairs_are_refused(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Trainer(linear(), given).train()


def test_a_figure_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(TrainingError, match=r"no figure 'accuracy' to monitor.*epoch, loss, lr"):
        Trainer(linear(), batches(), callbacks=[EarlyStopping(monitor="accuracy")]).train()
    with pytest.raises(TrainingError, match="validation_loss cannot be monitored without validation"):
        Trainer(linear(), batches(), callbacks=[EarlyStopping(monitor="validation_loss")]).train()


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(DivergedError, match=r"the loss is nan in epoch 1 at lr 0\.1.*clip=1"):
        Trainer(linear(), batches(), lambda outputs, _: outputs.sum() * float("nan"), lr=0.1).train()
