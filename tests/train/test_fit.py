"""The training loop: reproducible, on schedule, and honest about what went wrong."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import color_task, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.images import ImageStore
from modelpatch.data.task import Task
from modelpatch.errors import BackboneChangedError, BackboneError, DataError, MethodError, TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.hooks import Batches, Hook
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.registry import make_method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.tasks.classification import Classification
from modelpatch.train import Callback, Trainer, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.evaluation import evaluate, logits_of
from modelpatch.train.fitting import PatchTrainer
from modelpatch.train.settings import FitOptions, FitSettings


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


def equal(first: Patch, second: Patch) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items()
    )


# what is given ----------------------------------------------------------------------------------------------


def test_a_method_may_be_spelled(backbone: Backbone, colors: Task) -> None:
    spelled = fit(backbone, colors, "subset(lr=0.002)", epochs=1)
    assert equal(spelled, fit(backbone, colors, Subset(lr=0.002), epochs=1))


def test_what_is_no_method_is_refused(backbone: Backbone, colors: Task) -> None:
    with pytest.raises(MethodError, match=r"is not a method\. Expected one like"):
        fit(backbone, colors, ScaleBias)  # type: ignore[arg-type]


def test_names_in_place_of_a_backbone_or_data_are_refused(backbone: Backbone, colors: Task) -> None:
    with pytest.raises(TrainingError, match=r"'bundled:tiny' is not a backbone\. Load it first"):
        fit("bundled:tiny", colors, ScaleBias())  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'flowers/' is not a task's data\. Load it first"):
        fit(backbone, "flowers/", ScaleBias())  # type: ignore[arg-type]


class Wordy:
    """A data set whose repr takes several lines, as torchvision's do."""

    def __repr__(self) -> str:
        return "Dataset Wordy\n    Number of datapoints: 5\n    Root location: flowers"


def test_a_data_set_alone_is_named_by_its_type(backbone: Backbone) -> None:
    with pytest.raises(DataError, match=r"^the Wordy is not a task's data\. .*from_datasets\(train, test\).* pair"):
        fit(backbone, Wordy(), ScaleBias())  # type: ignore[arg-type]


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        FitOptions(torch.optim.SGD)  # type: ignore[misc]


def test_class_weights_of_the_users_are_those_of_the_loss(backbone: Backbone, colors: Task) -> None:
    weights, steps = [1.0, 2.0, 3.0], LinearProbe(solver="steps")
    given = fit(backbone, colors, steps, epochs=1, class_weights=weights)
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))
    assert equal(given, fit(backbone, colors, steps, epochs=1, loss=loss))
    assert not equal(given, fit(backbone, colors, steps, epochs=1))
    with pytest.raises(TrainingError, match=r"class_weights has 2 numbers; colors has 3 classes"):
        fit(backbone, colors, LinearProbe(), class_weights=[1, 2])
    with pytest.raises(TrainingError, match=r"class_weights = \[1, -1, 1\] is not valid: .*greater than 0"):
        fit(backbone, colors, LinearProbe(), class_weights=[1, -1, 1])


class ToOnePixel(nn.Module):
    """A network whose last BatchNorm sees one value a channel of every image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten())
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images))


def test_a_last_image_of_its_own_joins_the_batch_before(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, sizes = load_backbone(ToOnePixel(), preprocessing=small_preprocessing()), []
    step = PatchTrainer.train_step

    def record(self: PatchTrainer, batch: Minibatch) -> Tensor:
        sizes.append(len(batch))
        return step(self, batch)

    monkeypatch.setattr(PatchTrainer, "train_step", record)
    fit(backbone, color_task(25), ScaleBias(statistics="learned"), epochs=1, batch_size=8)
    assert sizes == [8, 8, 9]
    with pytest.raises(TrainingError, match="from a batch of 1 at this image size: a layer has one value a channel"):
        fit(backbone, color_task(25), ScaleBias(statistics="learned"), epochs=1, batch_size=1)


def test_the_file_holds_what_was_asked_for(backbone: Backbone, colors: Task, tmp_path: Path) -> None:
    patch = fit(backbone, colors, Subset(), epochs=1, out=tmp_path / "p.safetensors", dtype="float16")
    assert {tensor.dtype for tensor in Patch.load(tmp_path / "p.safetensors").tensors.values()} == {torch.float16}
    assert patch.metrics["float32_top1"] is not None


# what follows from the settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LinearProbe(), ScaleBias(statistics="learned"), Subset()], ids=lambda m: m.name)
def test_the_same_seed_gives_the_same_patch_bit_for_bit(backbone: Backbone, colors: Task, method: Method) -> None:
    first = fit(backbone, colors, method, epochs=2, seed=3)
    torch.rand(5)  # whatever the state of torch's random numbers
    assert equal(first, fit(backbone, colors, method, epochs=2, seed=3))
    assert not equal(first, fit(backbone, colors, method, epochs=2, seed=4))


@pytest.mark.parametrize("method", [LinearProbe(optimizer="sgd"), Subset(optimizer="sgd")], ids=lambda m: m.name)
def test_the_cache_changes_nothing_but_the_time(backbone: Backbone, colors: Task, method: Method) -> None:
    settings: dict[str, Any] = {"epochs": 2, "augment": "none", "batch_size": 8}
    cached, on_disk = (fit(backbone, colors, method, memory=memory, **settings) for memory in (2**30, 1))
    computed = fit(backbone, colors, method, cache=False, **settings)
    assert equal(cached, on_disk)
    for name, tensor in cached.tensors.items():
        assert torch.allclose(tensor, computed.tensors[name], atol=1e-5), name


def test_a_method_learns_the_task_and_reports_what_evaluate_measures(backbone: Backbone, colors: Task) -> None:
    patch = fit(backbone, colors, ScaleBias(), epochs=15, batch_size=8)
    result = evaluate(backbone, patch, colors)
    assert patch.metrics["test_top1"] == result.top1 > 0.9
    assert (patch.metrics["test_top5"], patch.metrics["test_images"]) == (1, len(colors.test))
    assert patch.created["train_images"] == len(colors.train)
    assert patch.created["trainable_parameters"] == ScaleBias().count_parameters(backbone)
    assert patch.created["settings"]["epochs"] == 15


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_every_optimizer_lowers_the_loss(backbone: Backbone, colors: Task, optimizer: str, tmp_path: Path) -> None:
    fit(backbone, colors, make_method("full-finetune", optimizer=optimizer), epochs=6, log=tmp_path, augment="none")
    losses = [float(row["loss"]) for row in read_log(tmp_path)]
    assert losses[-1] < losses[0]


def test_another_image_size_is_trained_and_kept_in_the_patch(backbone: Backbone, colors: Task) -> None:
    patch = fit(backbone, colors, LinearProbe(), epochs=1, image_size=24)
    assert patch.preprocessing == backbone.preprocessing.with_image_size(24)


@pytest.mark.parametrize("pixels", [2, 9000])
def test_an_image_size_that_the_backbone_refuses_is_found_before_an_image_is_read(
    colors: Task, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    monkeypatch.setattr(ImageStore, "__init__", lambda *_: pytest.fail("no image may be read"))
    with pytest.raises(BackboneError, match=f"{pixels}"):
        fit(load_backbone(module), colors, LinearProbe(), image_size=pixels)


def test_a_processor_computes_in_float32_unless_told_otherwise(backbone: Backbone, colors: Task) -> None:
    auto, full, half, quarter = (
        fit(backbone, colors, ScaleBias(), epochs=1, precision=precision)
        for precision in ("auto", "float32", "bfloat16", "float16")
    )
    assert equal(auto, full)
    for patch in (half, quarter):
        assert not equal(auto, patch)
        assert {tensor.dtype for tensor in patch.tensors.values()} == {torch.float32}


# the loss ---------------------------------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor | None, float]]:
    """The class weights and label smoothing of every loss that was computed."""
    seen: list[tuple[Tensor | None, float]] = []
    original = torch.nn.functional.cross_entropy

    def record(logits: Tensor, labels: Tensor, weight: Tensor | None = None, *, label_smoothing: float = 0.0) -> Tensor:
        seen.append((weight, label_smoothing))
        return original(logits, labels, weight, label_smoothing=label_smoothing)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", record)
    return seen


def test_balanced_classes_weigh_the_same_whatever_their_counts(
    backbone: Backbone, losses: list[tuple[Tensor | None, float]]
) -> None:
    data = color_task(48)
    rows = np.concatenate(
        [np.flatnonzero(data.train.labels == label)[:count] for label, count in enumerate((12, 6, 3))]
    )
    data = replace(data, train=data.train.take(rows))
    weighted = fit(backbone, data, LinearProbe(), epochs=1, class_weights="balanced")
    weight = losses[0][0]
    assert weight is not None
    assert torch.allclose(weight * torch.tensor([12.0, 6, 3]), torch.full((3,), 21 / 3))
    assert not equal(weighted, fit(backbone, data, LinearProbe(), epochs=1))
    assert losses[-1][0] is None


def test_label_smoothing_and_clipping_reach_the_steps(
    backbone: Backbone, colors: Task, losses: list[tuple[Tensor | None, float]]
) -> None:
    plain = fit(backbone, colors, LinearProbe(optimizer="sgd"), epochs=1)
    smooth = fit(backbone, colors, LinearProbe(optimizer="sgd"), epochs=1, label_smoothing=0.1)
    assert [smoothing for _, smoothing in losses] == [0.0, 0.1]
    clipped = fit(backbone, colors, LinearProbe(optimizer="sgd"), epochs=1, clip=1e-3)
    assert not equal(plain, smooth)
    assert not equal(plain, clipped)


def test_a_loss_that_is_not_finite_is_an_error_that_quotes_the_rates(backbone: Backbone, colors: Task) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d at lr 1e\+30.*clip=1"):
        fit(backbone, colors, FullFinetune(lr=1e30), epochs=3, batch_size=8)


# the schedule -----------------------------------------------------------------------------------------------


def test_the_step_schedule_drops_after_two_thirds_and_five_sixths() -> None:
    settings = FitSettings(schedule="step", warmup=0)
    assert [settings.factor(step, 12) for step in range(12)] == [1.0] * 8 + [0.1] * 2 + [0.01] * 2


def test_the_step_schedule_drops_where_it_is_told_to() -> None:
    settings = FitSettings(schedule="step", warmup=0, drops=(0.5,))
    assert [settings.factor(step, 4) for step in range(4)] == [1.0, 1.0, 0.1, 0.1]


def test_the_exponential_schedule_falls_by_two_percent_every_two_and_a_half_epochs() -> None:
    settings = FitSettings(schedule="exponential", warmup=0, epochs=5)
    assert [settings.factor(step, 4) for step in (0, 2, 4)] == pytest.approx([1.0, 0.98, 0.98**2])


def test_the_cosine_schedule_warms_up_and_falls_to_nearly_nothing() -> None:
    settings = FitSettings(warmup=0.1)
    factors = [settings.factor(step, 100) for step in range(100)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_the_constant_schedule_is_constant_after_its_warm_up() -> None:
    settings = FitSettings(schedule="constant", warmup=0.5)
    assert [settings.factor(step, 4) for step in range(4)] == [0.5, 1, 1, 1]


# early stopping ---------------------------------------------------------------------------------------------


STOPPING: dict[str, Any] = {"schedule": "constant", "warmup": 0, "augment": "none", "validation": 0.25}


def test_early_stopping_gives_the_tensors_of_the_best_epoch(
    backbone: Backbone, colors: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = iter([0.2, 0.9, 0.9, 0.1])
    monkeypatch.setattr(PatchTrainer, "measure", lambda *_: {"top1": next(scores)})
    stopped = fit(backbone, colors, ScaleBias(), epochs=10, early_stopping=2, log=tmp_path, **STOPPING)
    assert len(read_log(tmp_path)) == 4  # the best one and two more without improvement
    assert stopped.metrics["validation_top1"] == 0.9
    scores = iter([0.2, 0.9])
    assert equal(stopped, fit(backbone, colors, ScaleBias(), epochs=2, **STOPPING))


def test_the_best_score_is_what_the_patch_reaches_on_the_images_held_out(backbone: Backbone, colors: Task) -> None:
    patch = fit(backbone, colors, ScaleBias(lr=0.1), epochs=5, early_stopping=3, **STOPPING)
    held = colors.with_validation(STOPPING["validation"], seed=0).validation
    assert held is not None
    answers = logits_of(backbone.patched(patch), held, patch.preprocessing).argmax(1)
    assert patch.metrics["validation_top1"] == (answers == torch.from_numpy(held.labels)).double().mean().item()


def test_early_stopping_holds_out_a_tenth_where_nothing_else_is_said(backbone: Backbone, colors: Task) -> None:
    patch = fit(backbone, colors, LinearProbe(), epochs=1, early_stopping=1)
    assert patch.created["settings"]["validation"] == 0.1
    assert patch.created["train_images"] == len(colors.train) - len(colors.classes)


# errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, r"fit has no setting 'epoch'. Did you mean 'epochs'\? It has: epochs"),
        ({"epochs": 0}, "epochs = 0 is not valid"),
        ({"image_size": 0}, "image_size = 0 is not valid"),
        ({"epochs": "many"}, "epochs = 'many' is not valid"),
        ({"warmup": 1.0}, "warmup = 1.0 is not valid"),
        ({"validation": -0.1}, "validation = -0.1 is not valid"),
        ({"schedule": "linear"}, "schedule = 'linear' is not valid"),
        ({"precision": "int8"}, "precision = 'int8' is not valid"),
        ({"augment": "heavy"}, "augment = 'heavy' is not valid"),
    ],
)
def test_a_bad_setting_is_an_error_that_quotes_it(
    backbone: Backbone, colors: Task, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(backbone, colors, LinearProbe(), **settings)


class Overwriting(Hook):
    """Writes to the tensors that a model shares with the backbone."""

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        with torch.no_grad():
            next(model.parts.parameters()).add_(1)


@dataclass(frozen=True, kw_only=True)
class Careless(LinearProbe):
    """A method whose work does harm."""

    def hooks(self) -> tuple[Hook, ...]:
        return (Overwriting(),)


def test_a_fit_that_moves_the_backbone_fails(tiny: Backbone, colors: Task) -> None:
    with pytest.raises(BackboneChangedError, match=r"have changed since it was loaded, in: stem\.0"):
        fit(tiny, colors, Careless(), epochs=1)


# parts of one's own -----------------------------------------------------------------------------------------


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        self.seen.append(trainer.lr)


def test_an_optimizer_gets_the_rates_of_the_method(backbone: Backbone, colors: Task) -> None:
    plain = {"epochs": 2, "schedule": "constant", "warmup": 0.0, "augment": "none"}
    given = fit(backbone, colors, Subset(lr=0.02), optimizer=torch.optim.AdamW, **plain)  # type: ignore[arg-type]
    own = fit(backbone, colors, Subset(lr=0.02), **plain)  # type: ignore[arg-type]
    assert all(torch.allclose(given.tensors[name], tensor, atol=1e-5) for name, tensor in own.tensors.items())
    assert given.created["options"] == {"optimizer": "AdamW"}
    assert "options" not in own.created


def test_a_scheduler_stands_in_place_of_the_schedule(backbone: Backbone, colors: Task) -> None:
    scheduler, rates = partial(torch.optim.lr_scheduler.StepLR, step_size=1), Rates()
    fit(backbone, colors, LinearProbe(head_lr=1.0), epochs=3, batch_size=12, scheduler=scheduler, callbacks=[rates])
    assert rates.seen == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_loss_and_accumulation_reach_the_steps(backbone: Backbone, colors: Task) -> None:
    smooth = partial(torch.nn.functional.cross_entropy, label_smoothing=0.1)
    options: dict[str, Any] = {"epochs": 2, "augment": "none"}
    given = fit(backbone, colors, LinearProbe(solver="steps"), batch_size=24, loss=smooth, **options)
    setting = fit(backbone, colors, LinearProbe(solver="steps"), batch_size=24, label_smoothing=0.1, **options)
    parts = fit(
        backbone, colors, LinearProbe(solver="steps"), batch_size=6, accumulate=4, label_smoothing=0.1, **options
    )
    assert equal(given, setting)
    assert all(torch.allclose(parts.tensors[name], tensor, atol=1e-4) for name, tensor in given.tensors.items())


@pytest.mark.parametrize("figure", ["auroc", "macro_f1", "balanced_accuracy"])
def test_the_best_epoch_may_be_that_of_any_figure(
    backbone: Backbone, colors: Task, figure: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"epochs": 3, "validation": 0.25, "monitor": f"validation_{figure}", "log": tmp_path}
    patch = fit(backbone, colors, LinearProbe(), **options)
    with (tmp_path / "metrics.csv").open() as file:
        values = [float(row[f"validation_{figure}"]) for row in csv.DictReader(file)]
    assert patch.metrics[f"validation_{figure}"] == max(values)
    with pytest.raises(TrainingError, match="no figure 'validation_lift' to monitor"):
        fit(backbone, colors, LinearProbe(), **{**options, "monitor": "validation_lift"})


def test_the_best_epoch_is_that_of_the_monitored_figure(
    backbone: Backbone, colors: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = iter([(3.0, 0.9), (1.0, 0.2), (2.0, 0.5)])

    def evaluate(self: Trainer, data: Any) -> dict[str, float]:
        return dict(zip(("loss", "top1"), next(history), strict=True))

    monkeypatch.setattr(PatchTrainer, "evaluate", evaluate)
    patch = fit(backbone, colors, LinearProbe(), epochs=3, validation=0.25, monitor="validation_loss")
    assert patch.metrics["validation_loss"] == 1.0
    assert "validation_top1" not in patch.metrics


def test_an_average_of_the_weights_is_the_patch(backbone: Backbone, colors: Task) -> None:
    plain = fit(backbone, colors, LinearProbe(), epochs=2)
    mean = fit(backbone, colors, LinearProbe(), epochs=2, ema=0.9)
    assert not equal(plain, mean)
    assert mean.metrics["test_top1"] == evaluate(backbone, mean, colors).top1


def test_a_transform_and_a_pair_of_data_sets(backbone: Backbone) -> None:
    seen = []

    def transform(image: Any) -> Any:
        seen.append(image)
        return image

    pairs = [(np.full((16, 16, 3), 80 * (number % 3), np.uint8), number % 3) for number in range(12)]
    patch = fit(backbone, (pairs, pairs), LinearProbe(), epochs=1, transform=transform)
    assert len(patch.task.classes) == 3
    assert seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)}, "is an instance of SGD, but fit builds"),
        ({"optimizer": "sgd"}, r"optimizer is 'sgd'; expected a function or class.*ScaleBias\(optimizer='sgd'\)"),
        ({"loss": "mse"}, "loss='mse' is none for classification"),
        ({"accumulate": 0}, "accumulate = 0 is not valid"),
        ({"monitor": "validation_loss"}, "Give validation= or early_stopping="),
        ({"ema": 2.0}, "expected a number between 0 and 1"),
        ({"callbacks": [Rates]}, "Rates is a class"),
    ],
)
def test_parts_that_cannot_be_used_are_refused(
    backbone: Backbone, colors: Task, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(backbone, colors, LinearProbe(), epochs=1, **given)


# logs -------------------------------------------------------------------------------------------------------


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_log_holds_a_row_an_epoch_and_events(backbone: Backbone, colors: Task, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(backbone, colors, LinearProbe(solver="steps"), epochs=3, log=tmp_path / "run", validation=0.25)
    rows = read_log(tmp_path / "run")
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    figures = [f"validation_{name}" for name in Classification.metrics]
    assert list(rows[0]) == ["epoch", "loss", "validation_loss", *figures, "lr", "seconds"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    assert events.stat().st_size > 0


def test_a_folder_that_cannot_be_made_is_an_error(backbone: Backbone, colors: Task, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for name in ("log", "checkpoint"):
        folder: Any = {name: tmp_path / "file" / "run"}
        with pytest.raises(TrainingError, match=f"cannot make the {name} folder"):
            fit(backbone, colors, LinearProbe(), epochs=1, **folder)
