"""Mixed images, balanced rows, drop path, rates by depth, averages of the last epochs: each against its definition."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import StochasticDepth

from conftest import color_task, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.recipes.comparison import warn_of_seeds
from modelpatch.tasks.classification import Classification
from modelpatch.train import Callback, Trainer, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.callbacks import EarlyStopping, LastEpochsAverage, RisingLoss
from modelpatch.train.fitting import Fit
from modelpatch.train.inputs import cut_rows
from modelpatch.train.regularising import MixedBatches, balanced_weights
from modelpatch.train.settings import FitSettings, check_settings


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return make_tiny()


def equal(first: Patch, second: Patch) -> bool:
    return all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


# mixed images -------------------------------------------------------------------------------------------------


class Plain:
    """Three batches of four images, each of one number, with its class."""

    def __len__(self) -> int:
        return 3

    def batches(self, epoch: int, first: int = 0) -> Any:
        for _ in range(first, 3):
            yield Minibatch(torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8), torch.arange(4))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_images_and_classes_are_mixed_in_the_same_shares(mixup: float, cutmix: float) -> None:
    source = MixedBatches(Plain(), 5, mixup, cutmix, seed=3)
    seen = [*source.batches(0), *source.batches(1)]
    kinds = set()
    for batch in seen:
        assert batch.targets.shape == (4, 5)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(4))
        numbers = batch.targets @ torch.arange(5.0)
        torch.testing.assert_close(batch.inputs.mean((1, 2, 3)), numbers)  # the mean of an image is its class
        blended = (batch.inputs == batch.inputs[..., :1, :1]).all()
        assert blended or cutmix
        assert mixup or set(batch.inputs.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        kinds.add(bool(blended))
    assert kinds >= ({True} if mixup else {False})
    again = list(source.batches(1, 1))
    assert len(again) == 2
    assert all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        for a, b in zip(again, seen[4:], strict=True)
    )


def test_the_loss_of_shares_is_the_mixture_of_losses() -> None:
    logits, first, second = torch.randn(6, 4), torch.randint(4, (6,)), torch.randint(4, (6,))
    shares = 0.3 * F.one_hot(first, 4) + 0.7 * F.one_hot(second, 4)
    kind = Classification()
    parts = [kind.loss(logits, one, None, 0.1) for one in (first, second)]
    torch.testing.assert_close(kind.loss(logits, shares, None, 0.1), 0.3 * parts[0] + 0.7 * parts[1])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(kind.weigh_images(shares, weights), 0.3 * weights[first] + 0.7 * weights[second])


def test_a_fit_mixes_images_and_keeps_no_prefix(tiny: Backbone, colors: Task) -> None:
    plain = fit(tiny, colors, LinearProbe(), epochs=1)
    options: dict[str, Any] = {"mixup": 0.3, "cutmix": 1.0, "class_weights": "balanced", "label_smoothing": 0.1}
    mixed = fit(tiny, colors, LinearProbe(), epochs=1, **options)
    assert not equal(plain, mixed)
    assert equal(mixed, fit(tiny, colors, LinearProbe(), epochs=1, cache=False, **options))
    assert mixed.created["settings"]["cache"] is False


# balanced rows ------------------------------------------------------------------------------------------------


def test_classes_are_drawn_alike() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    weights = balanced_weights(labels, 4)
    drawn = Counter(
        labels[torch.cat([torch.cat(cut_rows(100, 32, 0, epoch, weights)) for epoch in range(30)])].tolist()
    )
    assert all(abs(drawn[label] / 3000 - 1 / 3) < 0.04 for label in range(3))
    rows = cut_rows(100, 32, 0, 1, weights)
    assert [len(row) for row in rows] == [len(row) for row in cut_rows(100, 32, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(rows, cut_rows(100, 32, 0, 1, weights), strict=True))


def test_a_fit_draws_rare_classes(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = color_task(30), list[int]()
    rare = np.flatnonzero((task.train.labels != 2) | (np.arange(30) == 2))

    def loss(self: Classification, output: Tensor, targets: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.extend(targets.tolist())
        return F.cross_entropy(output, targets)

    monkeypatch.setattr(Classification, "loss", loss)
    fit(tiny, Task(task.task, task.train.take(rare), task.test), LinearProbe(), epochs=12, sampling="balanced")
    counts = Counter(seen)
    assert min(counts.values()) > 0.2 * len(seen)


# drop path ----------------------------------------------------------------------------------------------------


def torchvision_convnext() -> Backbone:
    torch.manual_seed(0)
    module = ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=5)
    return load_backbone(module, preprocessing=small_preprocessing(32))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (partial(make_timm, "vit_tiny_patch16_224", 32, img_size=32, depth=2, embed_dim=48, num_heads=3), DropPath),
        (torchvision_convnext, StochasticDepth),
    ],
)
def test_paths_are_dropped_more_often_in_later_blocks(make: Any, kind: type[nn.Module]) -> None:
    backbone = make()
    settings = FitSettings(drop_path=0.4, epochs=1)
    pixels = backbone.preprocessing.image_size
    model = Fit(backbone, color_task(6, pixels), FullFinetune(), settings).build()
    places = [one for one in model.modules() if isinstance(one, kind)]
    rates = [one.drop_prob if isinstance(one, DropPath) else one.p for one in places]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.4 * number / 4 for number in range(1, 5)])
    images = torch.randn(8, *backbone.input_size)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))
        assert not torch.equal(model.train()(images), model(images))
    assert not any(isinstance(one, DropPath) or getattr(one, "p", 0) == 0.4 for one in backbone.module.modules())


@pytest.mark.slow
def test_added_modules_drop_the_paths_of_their_blocks() -> None:
    backbone = make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=2, embed_dim=48, num_heads=3)
    patch = fit(backbone, color_task(6, 32), LoRA(), epochs=1, drop_path=0.5)
    assert not equal(patch, fit(backbone, color_task(6, 32), LoRA(), epochs=1))


def test_a_network_without_places_is_refused(tiny: Backbone, colors: Task) -> None:
    with pytest.raises(TrainingError, match=r"drop_path=0\.1: .*TinyNet has no drop path"):
        fit(tiny, colors, FullFinetune(), drop_path=0.1)


# rates by depth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_rates_fall_by_block_before_the_head(tiny: Backbone, colors: Task, optimizer: Any) -> None:
    rates: dict[str, float] = {}

    class Look(Callback):
        def on_train_begin(self, trainer: Trainer) -> None:
            own = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
            rates.update({name: own[id(p)] for name, p in trainer.model.trainable()})  # type: ignore[operator]

    fit(
        tiny,
        colors,
        FullFinetune(lr=0.1, head_lr=0.2),
        epochs=1,
        layer_decay=0.5,
        callbacks=[Look()],
        optimizer=optimizer,
    )
    blocks = [block.name for block in tiny.chain.blocks]
    assert rates["head.weight"] == 0.2
    for number, name in enumerate(reversed(blocks), 1):
        own = {rate for tensor, rate in rates.items() if tensor.startswith(f"replace/{name}.")}
        assert own
        assert all(rate == pytest.approx(0.1 * 0.5**number) for rate in own)
    assert rates["replace/stem.0.weight"] == pytest.approx(0.1 * 0.5 ** len(blocks))


# averages of the last epochs ----------------------------------------------------------------------------------


class Linear(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(4, 3)


def data() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 4, generator=random), torch.randint(3, (5,), generator=random)) for _ in range(3)]


def test_the_weights_of_the_last_epochs_are_averaged_and_evaluated() -> None:
    kept = []

    class Keep(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step % 3 == 0:
                kept.append(trainer.model.weight.detach().clone())  # type: ignore[operator]

    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 0.3, "epochs": 4}
    Trainer(Linear(), data(), callbacks=[Keep()], **options).train()
    model = Linear()
    history = Trainer(model, data(), validation=data(), callbacks=[LastEpochsAverage(3)], **options).train()
    torch.testing.assert_close(model.weight, (kept[1] + kept[2] + kept[3]) / 3)
    expected = np.mean([float(F.cross_entropy(model(x), y)) for x, y in data()])
    assert history[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    plain = Trainer(Linear(), data(), validation=data(), **options).train()
    assert history[0]["validation_loss"] == plain[0]["validation_loss"]
    with pytest.raises(TrainingError, match="swa=5 averages more epochs than the run's 4"):
        Trainer(Linear(), data(), callbacks=[LastEpochsAverage(5)], **options).train()


def test_the_best_epoch_may_be_an_average() -> None:
    model = Linear()
    callbacks = [EarlyStopping(), LastEpochsAverage(2)]
    trainer = Trainer(model, data(), validation=data(), epochs=4, lr=0.05, callbacks=callbacks)
    history = trainer.train()
    best = min(row["validation_loss"] for row in history)
    expected = np.mean([float(F.cross_entropy(model(x), y)) for x, y in data()])
    assert expected == pytest.approx(best, rel=1e-5)


# settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mixup": -1}, "mixup = -1 is not valid"),
        ({"cutmix": float("inf")}, "cutmix = inf is not valid"),
        ({"drop_path": 1}, "drop_path = 1 is not valid"),
        ({"layer_decay": 0}, "layer_decay = 0 is not valid"),
        ({"swa": -1}, "swa = -1 is not valid"),
        ({"sampling": "odd"}, "sampling = 'odd' is not valid"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(TrainingError, match=problem):
        check_settings(settings)


def test_settings_that_exclude_each_other_are_refused(tiny: Backbone, colors: Task) -> None:
    for options, problem in (
        ({"mixup": 0.2, "loss": nn.CrossEntropyLoss()}, "shares of classes"),
        ({"swa": 1, "ema": 0.9}, "both averages"),
        ({"swa": 20}, "swa=20 averages more epochs"),
    ):
        with pytest.raises(TrainingError, match=problem):
            fit(tiny, colors, ScaleBias(), epochs=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"mixup": 0.2}, {"cutmix": 1.0}, {"sampling": "balanced"}], ids=str)
def test_other_kinds_are_refused_by_name(tiny: Backbone, given: dict[str, Any]) -> None:
    images = [np.zeros((16, 16, 3), np.uint8)] * 4
    rows = list(zip(images, [0.1, 0.2, 0.3, 0.4], strict=True))
    task = Task.from_datasets(rows, rows, kind="regression")
    with pytest.raises(TrainingError, match=f"{next(iter(given))} needs one class an image"):
        fit(tiny, task, ScaleBias(), epochs=1, **given)


# unstable rates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        ([1.0, 0.5, 0.4, 0.2], False),
        ([1.0, 0.2, 0.3], False),  # above its lowest, far below its beginning
        ([0.5, 0.4, 0.46], False),
        ([1.0, 0.5, 0.95], True),
        ([1.0, 8.0], True),
        ([1.0], False),
        ([], False),
    ],
)
def test_a_loss_that_rises_is_told_with_its_rate(losses: list[float], rises: bool) -> None:
    trainer = Trainer(Linear(), data(), optimizer=torch.optim.SGD, lr=0.3)
    trainer.history = [{"epoch": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RisingLoss().on_train_end(trainer)
    texts = [str(one.message) for one in caught]
    assert len(texts) == rises
    assert all(f"to {losses[-1]:.3g} in epoch {len(losses)}: lr 0.3 is too high" in text for text in texts)


def test_a_fit_at_a_rate_too_high_warns(tiny: Backbone, colors: Task) -> None:
    with pytest.warns(
        UserWarning, match=r"the loss rose .*lr 0\.01, 50 is too high|the loss rose .*lr 50, 0\.01 is too"
    ):
        fit(tiny, colors, FullFinetune(lr=50.0), epochs=4, schedule="constant")


def test_seeds_that_disagree_are_told() -> None:
    with pytest.warns(
        UserWarning, match=r"probe: seeds disagree, 78\.0%, 90\.0%, 88\.0%, .*1,000 test images explain 1\.1%"
    ):
        warn_of_seeds("probe", [0.78, 0.90, 0.88], 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_seeds("probe", [0.88, 0.90, 0.88], 1000)
        warn_of_seeds("probe", [0.78], 1000)
        warn_of_seeds("probe", [1.0, 1.0], 10)
