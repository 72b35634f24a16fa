"""A run killed at any moment resumes to the very same patch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CLASSES, TinyNet, color_task, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import CheckpointMismatchError, TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.train import callbacks, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.callbacks import Checkpoint
from modelpatch.train.fitting import Fit, PatchTrainer

pytestmark = pytest.mark.slow

METHOD = ScaleBias(statistics="learned")
SETTINGS: dict[str, Any] = {"epochs": 6, "batch_size": 4, "views": 2, "ema": 0.9, "validation": 0.25}

PROBE = LinearProbe(solver="steps")


def halve(optimizer: Any) -> Any:
    """A scheduler of one's own, in place of the schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


STEPS = 6 * 5  # batches of 4 of 18 images
KILL_AFTER = 8  # in the middle of the second epoch

VICTIM = f"""
import sys, time
from conftest import color_task, make_tiny
from modelpatch.methods import ScaleBias
from modelpatch.train import callbacks, fit
from modelpatch.train import Callback
from test_checkpoint import halve

callbacks.EVERY_SECONDS = 0
class Slow(Callback):
    def on_step_begin(self, trainer):
        time.sleep(0.05)
fit(make_tiny(), color_task(), ScaleBias(statistics="learned"), checkpoint=sys.argv[1], callbacks=[Slow()],
    scheduler=halve, **{SETTINGS!r})
"""


class InterruptionError(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(callbacks, "EVERY_SECONDS", 0)


def count_steps(monkeypatch: pytest.MonkeyPatch, limit: int = 10**9) -> list[int]:
    """A list that grows by the number of every step that is taken; the step after `limit` of them is interrupted."""
    steps: list[int] = []
    original = PatchTrainer.train_step

    def step(self: PatchTrainer, batch: Minibatch) -> Tensor:
        if len(steps) == limit:
            raise InterruptionError
        steps.append(self.step)
        return original(self, batch)

    monkeypatch.setattr(PatchTrainer, "train_step", step)
    return steps


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, *rest: Any, **settings: Any) -> None:
    """Run a fit that is interrupted after some steps."""
    with monkeypatch.context() as patched:
        count_steps(patched, after)
        with pytest.raises(InterruptionError):
            fit(*rest, **settings)


def assert_equal(first: Patch, second: Patch) -> None:
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    assert first.metrics == second.metrics


# exact resumption -------------------------------------------------------------------------------------------


def test_a_killed_process_resumes_to_the_same_patch(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "training"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(folder)], env={**os.environ, "PYTHONPATH": paths})
    try:
        deadline = time.monotonic() + 120
        while not (folder / "state.pt").exists() or saved_steps(folder) < KILL_AFTER:
            assert victim.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline, "the process never came to its first steps"
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()
    done = saved_steps(folder)
    assert KILL_AFTER <= done < STEPS
    steps = count_steps(monkeypatch)
    resumed = fit(backbone, color_task(), METHOD, checkpoint=folder, scheduler=halve, **SETTINGS)
    assert steps == list(range(done, STEPS))
    assert_equal(resumed, fit(backbone, color_task(), METHOD, scheduler=halve, **SETTINGS))
    assert not folder.exists()


def saved_steps(folder: Path) -> int:
    return torch.load(folder / "state.pt", weights_only=True)["state"]["step"]


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("after", [1, 6, 17])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (PROBE, {}),
        (ScaleBias(statistics="recomputed"), {"cache": False}),
        (Subset(statistics="learned", optimizer="sgd"), {"validation": 0.25}),
        (FullFinetune(), {"precision": "float16", "class_weights": "balanced", "clip": 1.0}),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_every_method_resumes_exactly_wherever_it_stopped(
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    settings: dict[str, Any],
    after: int,
) -> None:
    settings = {"epochs": 4, "batch_size": 4, **settings}
    interrupt(monkeypatch, after, backbone, color_task(), method, checkpoint=tmp_path / "run", **settings)
    steps = count_steps(monkeypatch)
    resumed = fit(backbone, color_task(), method, checkpoint=tmp_path / "run", **settings)
    assert steps[0] == after
    assert_equal(resumed, fit(backbone, color_task(), method, **settings))


@pytest.mark.usefixtures("every_step")
def test_dropout_goes_on_with_the_same_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = TinyNet()
    module.stage2.append(nn.Sequential(nn.Conv2d(16, 16, 1), nn.Dropout(0.5)))
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    method, settings = Subset(blocks=("stage2",)), {"epochs": 3, "batch_size": 4}
    interrupt(monkeypatch, 8, backbone, color_task(), method, checkpoint=tmp_path / "run", **settings)
    resumed = fit(backbone, color_task(), method, checkpoint=tmp_path / "run", **settings)
    assert_equal(resumed, fit(backbone, color_task(), method, **settings))


def test_a_run_killed_after_it_stopped_early_does_not_go_on(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 9, "early_stopping": 1, "checkpoint": tmp_path / "run"}
    scores = iter([0.5, 0.4, 0.9])
    monkeypatch.setattr(PatchTrainer, "measure", lambda *_: {"top1": next(scores)})
    with monkeypatch.context() as patched:
        patched.setattr(Fit, "make_patch", lambda *_: (_ for _ in ()).throw(InterruptionError))
        with pytest.raises(InterruptionError):
            fit(backbone, color_task(), PROBE, **settings)
    steps = count_steps(monkeypatch)
    patch = fit(backbone, color_task(), PROBE, **settings)
    assert steps == []
    assert patch.metrics["validation_top1"] == 0.5


# what is refused --------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint folder of a run that stopped after its first epoch."""
    interrupt(monkeypatch, 1, backbone, color_task(), PROBE, epochs=2, checkpoint=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        (ScaleBias(), {"epochs": 2}, ".*method = 'linear-probe' instead of 'scale-bias'"),
        (LinearProbe(head_lr=0.1, solver="steps"), {"epochs": 2}, "head_lr = 0.01 instead of 0.1"),
        (PROBE, {"epochs": 3}, "epochs = 2 instead of 3"),
        (PROBE, {"epochs": 2, "seed": 1}, "seed = 0 instead of 1"),
    ],
)
def test_the_state_of_another_run_is_refused_by_what_differs(
    backbone: Backbone, unfinished: Path, method: Method, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointMismatchError, match=rf"unfinished run with {named}[,.].*--restart"):
        fit(backbone, color_task(), method, checkpoint=unfinished, **settings)


def test_the_state_of_another_task_or_backbone_is_refused(backbone: Backbone, unfinished: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match="other images"):
        fit(backbone, color_task(12), PROBE, epochs=2, checkpoint=unfinished)
    with pytest.raises(CheckpointMismatchError, match="other backbone"):
        fit(make_tiny(seed=1), color_task(), PROBE, epochs=2, checkpoint=unfinished)


def test_the_state_of_a_backbone_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Killed(callbacks.Callback):
        order = 9

        def on_epoch_end(self, trainer: Any) -> None:
            raise KeyboardInterrupt

    def run(own: Backbone, *added: callbacks.Callback) -> Patch:
        return fit(own, color_task(), PROBE, checkpoint=tmp_path, callbacks=added, epochs=2, batch_size=8)

    monkeypatch.setattr(callbacks, "EVERY_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        run(make_tiny(), Killed())
    other = make_tiny().module
    other.stage1[0].act = nn.SiLU(inplace=True)
    with pytest.raises(CheckpointMismatchError, match="computes something else: relu against silu"):
        run(load_backbone(other, preprocessing=small_preprocessing()))
    assert run(make_tiny()).backbone.computation is not None


def test_images_that_changed_under_the_same_names_are_noticed(
    backbone: Backbone, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = color_task()
    changed.train.images[5][0, 0, 0] ^= 1  # type: ignore[index]
    with pytest.raises(CheckpointMismatchError, match="with other images"):
        fit(backbone, changed, PROBE, epochs=2, checkpoint=unfinished)


def test_the_state_stays_until_the_patch_is_on_disk(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    settings: dict[str, Any] = {"epochs": 2, "checkpoint": tmp_path / "run", "out": tmp_path / "p.safetensors"}
    with monkeypatch.context() as patched:
        patched.setattr(Patch, "save", full)
        with pytest.raises(OSError, match="No space"):
            fit(backbone, color_task(), PROBE, **settings)
    assert (tmp_path / "run" / "state.pt").exists()
    steps = count_steps(monkeypatch)
    patch = fit(backbone, color_task(), PROBE, **settings)
    assert steps == []
    assert not (tmp_path / "run").exists()
    assert_equal(Patch.load(tmp_path / "p.safetensors"), patch)


@pytest.mark.parametrize("content", ["truncated", "text", "foreign", "empty"])
def test_a_state_that_cannot_be_read_is_refused(backbone: Backbone, unfinished: Path, content: str) -> None:
    file = unfinished / "state.pt"
    if content == "foreign":
        torch.save({"model": torch.zeros(3)}, file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"state", "empty": b""}[content])
    with pytest.raises(TrainingError, match=r"state\.pt cannot be read .* to start anew"):
        fit(backbone, color_task(), PROBE, epochs=2, checkpoint=unfinished)


# the folder -------------------------------------------------------------------------------------------------


def test_the_folder_is_gone_after_success_unless_it_holds_something_else(backbone: Backbone, tmp_path: Path) -> None:
    fit(backbone, color_task(), PROBE, epochs=1, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    fit(backbone, color_task(), PROBE, epochs=1, checkpoint=tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["notes.txt"]


def test_a_state_is_due_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path, {"classes": CLASSES})
    assert not checkpoint.due()
    now[0] += callbacks.EVERY_SECONDS
    assert checkpoint.due()
    checkpoint.save({})
    assert not checkpoint.due()
