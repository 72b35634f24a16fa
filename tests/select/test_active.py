"""The images picked are those with the smallest margins; simulations start alike and go on after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import color_task, draft_patch, make_tiny
from modelpatch.errors import DataError
from modelpatch.select.active import Simulation, margins, pick, simulate

FAST = {"epochs": 1, "batch_size": 8}


def test_margins_are_between_the_two_most_probable_classes() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]])
    assert margins(shares.log()).tolist() == pytest.approx([0.2, 0.4, 0.0])


def test_the_least_sure_come_first_and_every_image_counts_as_it_is() -> None:
    backbone, data = make_tiny(), color_task(30)
    patch = draft_patch(backbone)
    picks = pick(backbone, patch, data.train.images, 7)
    logits = backbone.patched(patch)(patch.preprocessing(*data.train.images))
    expected = margins(logits).argsort()[:7].tolist()
    assert [one.position for one in picks] == expected
    best = logits.topk(2, dim=1).indices
    for one in picks:
        assert [one.first, one.second] == [patch.task.classes[k] for k in best[one.position]]
    assert [one.margin for one in picks] == sorted(one.margin for one in picks)
    assert len(pick(backbone, patch, data.train.images, 99)) == 30


@pytest.mark.parametrize(("count", "budget"), [(0, 3), (3, 0)])
def test_nothing_to_pick_is_refused(count: int, budget: int) -> None:
    backbone = make_tiny()
    with pytest.raises(DataError, match="expected at least 1"):
        pick(backbone, draft_patch(backbone), color_task().train.images[:count], budget)


def test_a_simulation_labels_more_every_round_and_both_strategies_start_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labelled: list[tuple[str, int, list[int]]] = []
    one_round = Simulation._round

    def watched(self, strategy, seed, rows, more):  # type: ignore[no-untyped-def]
        labelled.append((strategy, seed, rows.tolist()))
        return one_round(self, strategy, seed, rows, more)

    monkeypatch.setattr(Simulation, "_round", watched)
    curves = simulate(make_tiny(), color_task(30), "linear-probe", labels=(6, 12, 30), seeds=2, **FAST)  # type: ignore[arg-type]
    assert {name: [len(one) for one in values] for name, values in curves.top1s.items()} == {
        "margin": [3, 3],
        "random": [3, 3],
    }
    by_curve = {
        (strategy, seed): [r for s, n, r in labelled if (s, n) == (strategy, seed)] for strategy, seed, _ in labelled
    }
    for rounds in by_curve.values():
        assert [len(rows) for rows in rounds] == [6, 12, 30]
        assert set(rounds[0]) < set(rounds[1]) < set(rounds[2])
    for seed in range(2):
        assert by_curve["margin", seed][0] == by_curve["random", seed][0]
        assert curves.top1s["margin"][seed][0] == curves.top1s["random"][seed][0]
        assert curves.top1s["margin"][seed][2] == pytest.approx(curves.top1s["random"][seed][2])
    assert by_curve["margin", 0][1] != by_curve["random", 0][1]
    assert curves.mean("margin")[0] == pytest.approx(np.mean([one[0] for one in curves.top1s["margin"]]))


def test_the_margins_of_a_simulation_are_those_of_its_patch_on_the_pool() -> None:
    backbone, data = make_tiny(), color_task(30)
    labelled = np.arange(12)
    from modelpatch.methods.linear_probe import LinearProbe
    from modelpatch.select.active import LabelRound
    from modelpatch.select.trials import Journal
    from modelpatch.train import fit
    from modelpatch.train.progress import quiet_progress
    from modelpatch.train.settings import FitSettings

    settings = FitSettings(epochs=1, batch_size=8, augment="none")
    run = Simulation(backbone, data, LinearProbe(), (12, 20), settings, Journal(LabelRound), 2**30, quiet_progress())
    found = run._round("margin", 0, labelled, 8)
    from dataclasses import replace

    patch = fit(
        backbone, replace(data, train=data.train.take(labelled)), LinearProbe(), epochs=1, batch_size=8, augment="none"
    )
    pool = data.train.take(np.arange(12, 30))
    picks = pick(backbone, patch, pool.images, 8)
    assert found.picked == sorted(12 + one.position for one in picks)
    assert found.top1 == patch.metrics["test_top1"]


def test_an_interrupted_simulation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rounds.jsonl"
    options = {"labels": (6, 12), "rounds": file, **FAST}
    first = simulate(make_tiny(), color_task(30), "linear-probe", **options)  # type: ignore[arg-type]
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + "\n")
    again = simulate(make_tiny(), color_task(30), "linear-probe", **options)  # type: ignore[arg-type]
    assert again == first
    assert len(file.read_text().splitlines()) == len(lines) == 4


@pytest.mark.parametrize("labels", [(), (1, 5), (6, 6), (12, 6), (6, 31)])
def test_numbers_of_labels_that_cannot_be_are_refused(labels: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected rising numbers from 2 to 30"):
        simulate(make_tiny(), color_task(30), labels=labels)
