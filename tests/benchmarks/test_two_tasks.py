"""The comparison of two tasks trained together with heads alone and with networks of their own, at a tiny scale."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from conftest import color_task, make_tiny
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.tasks.record import TaskRecord


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import multitask
    finally:
        sys.path.remove(folder)
    return multitask


def test_every_way_is_trained_and_counted(benchmark: ModuleType) -> None:
    first, backbone = color_task(), make_tiny()
    second = replace(color_task(12, seed=1), task=TaskRecord(name="shades", classes=first.classes))
    results = benchmark.train(backbone, [first, second], epochs=1, batch_size=6)
    numbers = {way: count for way, (_, count) in results.items()}
    assert all(len(scores) == 2 for scores, _ in results.values())
    norms = ScaleBias().count_parameters(backbone)
    assert numbers["scale-bias"] - numbers["heads"] == norms  # one for each task instead of one for both
    heads = 2 * 3 * (backbone.chain.feature_dim + 1)
    assert numbers["independent"] == 2 * (numbers["heads"] - heads) + heads


def test_images_that_are_held_out_take_the_place_of_the_test_images(benchmark: ModuleType) -> None:
    data = color_task()
    held = benchmark.held_out(data)
    assert (len(held.train), len(held.test)) == (18, 6)
    assert held.validation is None
    assert held.train.digest != data.test.digest != held.test.digest


def test_the_table_says_what_was_gained_seed_by_seed(benchmark: ModuleType) -> None:
    runs = [
        {"heads": ([50.0, 60.0], 100), "scale-bias": ([55.0, 70.0], 103), "independent": ([56.0, 72.0], 200)},
        {"heads": ([52.0, 60.0], 100), "scale-bias": ([59.0, 72.0], 103), "independent": ([58.0, 72.0], 200)},
    ]
    rows = {row[0].removesuffix(", 0.001"): row[1:] for row in benchmark.table(1e-3, runs)}
    assert rows["heads"][:2] == (51.0, 1.0)
    assert rows["scale-bias"][4] == pytest.approx((62.5 + 65.5) / 2)
    assert rows["independent"][-2:] == (200, pytest.approx(100))
    gains = (5 + 10) / 2, (7 + 12) / 2
    assert rows["gain"][4:6] == (sum(gains) / 2, pytest.approx((gains[1] - gains[0]) / 2))
    assert rows["gain"][-2:] == (3, pytest.approx(3))
    assert math.isnan(benchmark.spread([1.0])[1])
