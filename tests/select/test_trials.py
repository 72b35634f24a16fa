"""Trials equal fits on the fold's images, share activations, and depend on nothing but themselves."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dying import Killed
from torch import Tensor

from conftest import color_task, make_tiny
from modelpatch.data.task import Task
from modelpatch.errors import MissingExtraError, TrainingError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method, confine
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.select.trials import Bench, Journal, LocalWorker, Outcome, Pool, Trial, open_workers
from modelpatch.train import fit
from modelpatch.train.inputs import Inputs, SharedInputs
from modelpatch.train.settings import FitSettings

pytestmark = pytest.mark.slow

METHODS: list[Method] = [
    LinearProbe(),
    Subset(blocks=("stage1.1",)),
    Subset(blocks=("stage1.0", "stage2.1")),
    confine(ScaleBias(), ["stage1"]),
    confine(ScaleBias(statistics="recomputed"), ["stage2.0"]),
    confine(Piggyback(lr=1e-2), ["stage2.0"]),
    DeltaNetwork(),
    Head2Toe(),
    FullFinetune(),
]


@pytest.fixture(scope="module")
def data() -> Task:
    return color_task(30)


@pytest.fixture(scope="module")
def bench(data: Task) -> Bench:
    return Bench(make_tiny(), data, FitSettings(epochs=2, batch_size=8, augment="none"), folds=2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name} {getattr(method, 'blocks', '')}")
def test_a_trial_is_a_fit_on_its_fold(bench: Bench, method: Method) -> None:
    outcome = bench.run(Trial(method, fold=1, seed=3, epochs=2))
    patch = fit(bench.backbone, bench.data[1], method, epochs=2, batch_size=8, seed=3, augment="none")
    assert outcome.top1 == patch.metrics["test_top1"]
    assert abs(outcome.file_bytes - patch.inspect().file_bytes) < 16  # digits of seconds
    assert outcome.failure is None


def test_the_trained_numbers_are_those_of_a_fit(bench: Bench) -> None:
    trial = Trial(Subset(blocks=("stage2.0",)), 0, 0, 2)
    shared = bench._fit(trial).run()
    own = fit(bench.backbone, bench.data[0], trial.method, epochs=2, batch_size=8, augment="none")
    for name, tensor in own.tensors.items():
        assert torch.allclose(shared.tensors[name], tensor, atol=1e-4), name


def test_an_outcome_does_not_depend_on_what_ran_before(bench: Bench) -> None:
    trials = [Trial(method, fold, 0, 2) for method in METHODS[:4] for fold in range(2)]
    forward = [bench.run(trial).top1 for trial in trials]
    again = Bench(bench.backbone, color_task(30), bench.settings, folds=2)
    assert forward == [again.run(trial).top1 for trial in trials[::-1]][::-1]


def test_activations_are_computed_once_and_only_as_far_as_the_budget_goes(data: Task) -> None:
    settings = FitSettings(epochs=2, batch_size=8, augment="none")
    every = Bench(make_tiny(), data, settings, folds=2).shared
    starts = [block.index for block in every.backbone.chain.blocks]
    assert {0, len(every.backbone.chain)} <= set(every.activations) <= {0, *starts, len(every.backbone.chain)}
    assert every.activations is every.activations
    last = 4 * 30 * every.backbone.chain.feature_dim
    tight = Bench(make_tiny(), data, replace(settings, memory=last), folds=2, disk=0).shared
    assert set(tight.activations) == {0, len(every.backbone.chain)}
    off = Bench(make_tiny(), data, replace(settings, cache=False), folds=2).shared
    assert set(off.activations) == {0}


@pytest.mark.parametrize("change", [{"memory": 1}, {"cache": False}], ids=["disk", "from the images"])
def test_where_activations_lie_does_not_change_what_is_learned(data: Task, change: dict[str, int]) -> None:
    settings = FitSettings(epochs=2, batch_size=8, augment="light")
    trial = Trial(Subset(), 0, 0, 2)
    here = Bench(make_tiny(), data, settings, folds=2)._fit(trial).run()
    there = Bench(make_tiny(), data, replace(settings, **change), folds=2)._fit(trial).run()
    for name, tensor in here.tensors.items():
        assert torch.allclose(there.tensors[name], tensor, atol=1e-4), name


def seen(inputs: Inputs, rows: Tensor, epoch: int) -> Tensor:
    """The first batch of an epoch."""
    return next(inputs.batches([rows], epoch)).images


def test_held_out_images_are_seen_without_augmentation(data: Task) -> None:
    shared = Bench(make_tiny(), data, FitSettings(epochs=3, augment="light"), folds=2).shared
    rows = torch.arange(5)
    model = LinearProbe().draft(shared.backbone, 3)
    held = SharedInputs(shared, {"test": rows}).inputs(model, "test", augmented=False)
    plain = shared.backbone.chain(shared.store.plain(rows))
    assert torch.allclose(seen(held, rows, 0), plain, atol=1e-6)
    assert torch.equal(seen(held, rows, 0), seen(held, rows, 1))
    train = SharedInputs(shared, {"train": rows}).inputs(model, "train", augmented=True)
    assert not torch.allclose(seen(train, rows, 0), seen(train, rows, 1))
    assert not torch.allclose(seen(train, rows, 0), plain)


def test_views_are_few_only_where_they_save_work(data: Task) -> None:
    shared = Bench(make_tiny(), data, FitSettings(epochs=9, views=3, augment="light"), folds=2).shared
    rows = torch.arange(5)
    for method, repeats in ((LinearProbe(), True), (FullFinetune(), False)):
        train = SharedInputs(shared, {"train": rows}).inputs(method.draft(shared.backbone, 3), "train", augmented=True)
        assert torch.equal(seen(train, rows, 0), seen(train, rows, 3)) == repeats
        assert not torch.equal(seen(train, rows, 0), seen(train, rows, 1))


def test_a_warm_start_goes_on_from_the_parent_s_patch(bench: Bench) -> None:
    parent = Trial(Subset(blocks=("stage2.1",), lr=1e-2), 0, 0, 2)
    both = Subset(blocks=("stage1.0", "stage2.1"), lr=1e-9, head_lr=1e-9)
    trained = bench._fit(parent)
    trained.run()
    warm = bench._fit(Trial(both, 0, 0, 2))
    warm.run(start=bench._start(Trial(both, 0, 0, 2, start=parent)))
    for name, tensor in trained.model.portable_state().items():
        assert torch.allclose(warm.model.portable_state()[name], tensor, atol=1e-6), name
    assert bench.key(Trial(both, 0, 0, 2)) != bench.key(Trial(both, 0, 0, 2, start=parent))


def test_a_loss_that_is_not_finite_is_an_outcome(bench: Bench) -> None:
    outcome = bench.run(Trial(Subset(lr=1e30), 0, 0, 2))
    assert outcome.top1 is None
    assert "lr" in str(outcome.failure)


def test_settings_that_would_score_on_what_was_trained_on_are_refused(data: Task) -> None:
    with pytest.raises(TrainingError, match="early_stopping"):
        Bench(make_tiny(), data, FitSettings(early_stopping=2))


# workers ----------------------------------------------------------------------------------------------------


def test_a_killed_worker_loses_only_its_trial_and_that_is_tried_again(data: Task, tmp_path: Path) -> None:
    bench = Bench(make_tiny(), data, FitSettings(epochs=1, batch_size=8), folds=2)
    trials = [Trial(LinearProbe(), 0, seed, 1) for seed in range(4)]
    trials.insert(1, Trial(Killed(marker=str(tmp_path / "once")), 1, 0, 1))
    with open_workers(bench, 2) as run:
        outcomes = dict(run(trials))
    assert (tmp_path / "once-0").exists()
    expected = [bench.run(trial) for trial in trials]
    assert [outcomes[n].top1 for n in range(5)] == [one.top1 for one in expected]


def test_a_trial_that_kills_every_worker_is_given_up(data: Task, tmp_path: Path) -> None:
    bench = Bench(make_tiny(), data, FitSettings(epochs=1), folds=2)
    trial = Trial(Killed(marker=str(tmp_path / "always"), times=9), 0, 0, 1)
    pool = Pool(partial(LocalWorker, bench.for_workers(1), 1), 1)
    with closing(pool), pytest.raises(TrainingError, match="3 times"):
        list(pool.run([trial]))


def test_ray_that_is_not_installed_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[ray\]"), open_workers(bench, 2, ray="local"):
        pass


def test_no_workers_are_refused(bench: Bench) -> None:
    with pytest.raises(TrainingError, match="workers is 0"), open_workers(bench, 0):
        pass


# the journal ------------------------------------------------------------------------------------------------


def test_outcomes_come_back_from_the_journal_but_for_a_line_cut_short(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    trial = Trial(Subset(), 0, 0, 1)
    journal = Journal(Outcome, file)
    journal.add("a" * 32, trial.as_dict(), Outcome(0.5, 100, 1.0))
    journal.add("b" * 32, trial.as_dict(), Outcome(None, 0, 1.0, "diverged"))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "cc')
    again = Journal(Outcome, file)
    assert again.outcomes == journal.outcomes
    again.add("d" * 32, trial.as_dict(), Outcome(0.25, 1, 1.0))
    assert Journal(Outcome, file).outcomes.keys() == {"a" * 32, "b" * 32, "d" * 32}
    file.write_text("not a journal\n")
    with pytest.raises(TrainingError, match="line 1"):
        Journal(Outcome, file)


def test_same_steps_makes_up_for_the_images_that_are_held_out(bench: Bench) -> None:
    same = Bench(bench.backbone, color_task(30), bench.settings, folds=2, same_steps=True)
    trial = Trial(LinearProbe(), fold=0, seed=0, epochs=2)
    assert [one._fit(trial).settings.epochs for one in (bench, same)] == [2, 4]
    assert same.key(trial) != bench.key(trial)
