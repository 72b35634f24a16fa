"""The study of Piggyback's backbone: three kinds of weights for one network, at a tiny scale."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from conftest import color_task, make_tiny
from modelpatch.data.task import Task


@pytest.fixture(scope="module")
def initialization() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import initialization
    finally:
        sys.path.remove(folder)
    return initialization


def test_the_untrained_network_is_the_same_one_with_other_weights(initialization: ModuleType) -> None:
    backbone = make_tiny()
    random = initialization.untrained(backbone, seed=1)  # 0 is the seed of the tiny network itself
    assert [segment.name for segment in random.chain] == [segment.name for segment in backbone.chain]
    own = dict(random.module.named_parameters())
    weights = {name: one for name, one in backbone.module.named_parameters() if one.ndim > 1}
    assert weights
    for name, weight in weights.items():
        assert not torch.equal(weight, own[name])
    norms = [layer for layer in random.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert all(bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all()) for norm in norms)
    assert initialization.untrained(backbone, seed=1).fingerprint == random.fingerprint


def test_other_weights_are_all_trained_and_leave_their_start_alone(initialization: ModuleType, colors: Task) -> None:
    random = initialization.untrained(make_tiny())
    before = random.fingerprint
    other = initialization.pretrained_on(colors, random, epochs=2, batch_size=6)
    start, state = random.module.state_dict(), other.module.state_dict()
    for name in state:
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert not torch.equal(state[name], start[name]), name
    assert torch.equal(state["fc.weight"], start["fc.weight"])
    assert random.module.state_dict().keys() == state.keys()
    assert random.fingerprint == before


def test_a_study_has_a_row_for_each_kind_of_weights_and_method(initialization: ModuleType) -> None:
    backbone, data = make_tiny(), color_task(24)
    backbones: dict[str, object] = {"trained": backbone, "random": initialization.untrained(backbone)}
    methods = ("linear-probe", "piggyback(lr=0.01,norms=trained)")
    rows = initialization.study(backbones, data, methods, epochs=2, batch_size=6, seeds=2)
    assert [row[:2] for row in rows] == [(name, method) for name in backbones for method in methods]
    for _, _, top1, error, wrong, chance in rows:
        assert 0 <= top1 <= 1
        assert error >= 0
        assert wrong == pytest.approx(1 - top1)
        assert chance == pytest.approx(1 / 3)


@pytest.mark.real
def test_the_documented_command_runs(
    initialization: ModuleType, real_data: Callable[[str], Path], real_backbone: object, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = real_data("pacs_sketch").parent
    real_data("pacs_photo")
    asked = "--task pacs_photo --images 90 --other pacs_sketch --other-images 60 --epochs 1 --other-epochs 1 --seeds 1"
    arguments = [*asked.split(), "--pixels", "32", "--cache", str(folder), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["initialization.py", *arguments])
    initialization.main()
    assert (tmp_path / "rows.json").read_text().count('"weights"') == 3 * len(initialization.METHODS)
