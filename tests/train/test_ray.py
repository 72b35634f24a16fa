"""A run on Ray actors gives what one process gives, goes on after one died, and passes errors on."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import LEARNED, SETTINGS, SGD, long, named

from conftest import color_task, make_tiny
from modelpatch.errors import MethodError, MissingExtraError, ModelpatchError, TrainingError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.recipes.multitask import PRIVATE, fit_multitask
from modelpatch.train import callbacks, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.fitting import PatchTrainer
from modelpatch.train.ray import run_on_ray

pytestmark = pytest.mark.service

TWO = [named("first", 24, 0), named("second", 11, 1)]


def both(folder: Path) -> tuple[Patch, Any]:
    """A fit whose second process dies once in its fifth step, and a run of two tasks."""
    step, marker, often = PatchTrainer.train_step, folder / "killed", callbacks.EVERY_SECONDS
    callbacks.EVERY_SECONDS = 0

    def dying(self: PatchTrainer, batch: Minibatch) -> torch.Tensor:
        if self.step == 5 and dist.is_initialized() and dist.get_rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch)

    PatchTrainer.train_step = dying  # type: ignore[method-assign]
    try:
        patch = fit(make_tiny(), color_task(), ScaleBias(**SGD), checkpoint=folder / "training", **SETTINGS)
        return patch, fit_multitask(make_tiny(), TWO, LEARNED, **SETTINGS)
    finally:
        PatchTrainer.train_step, callbacks.EVERY_SECONDS = step, often  # type: ignore[method-assign]


def refused() -> None:
    fit_multitask(make_tiny(), TWO, "full-finetune", **SETTINGS)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the actors read this file


@long
def test_actors_train_what_one_process_trains_though_one_dies(ray: None, tmp_path: Path) -> None:
    patch, together = run_on_ray(partial(both, tmp_path), 2)
    assert (tmp_path / "killed").exists()
    expected, alone = both(tmp_path / "alone")
    for name, tensor in expected.tensors.items():
        assert torch.allclose(patch.tensors[name], tensor, atol=1e-4), name
    state = together.backbone.module.state_dict()
    for name, tensor in alone.backbone.module.state_dict().items():
        assert torch.allclose(state[name], tensor, atol=1e-4), name
    for task, one in alone.patches.items():
        for name, tensor in one.tensors.items():
            assert torch.allclose(together.patches[task].tensors[name], tensor, atol=1e-4), name
    with pytest.raises(MethodError, match=r"full-finetune makes everything private"):
        run_on_ray(refused, 2)


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[ray\]"):
        run_on_ray(refused, 2)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_said(ray: None, address: str) -> None:
    with pytest.raises(TrainingError, match=f"there is no Ray cluster at '{address}'"):
        run_on_ray(refused, 1, address=address)


def test_an_address_without_workers_is_refused() -> None:
    from modelpatch.cli.options import Cluster

    with pytest.raises(ModelpatchError, match="--ray-address auto is given without --ray-workers"):
        Cluster(ray_address="auto")
    assert Cluster().run(lambda: PRIVATE) == PRIVATE
