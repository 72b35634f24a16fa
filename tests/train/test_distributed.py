"""Two processes that torchrun starts train what one trains alone, and go on where a killed one left them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import color_task, make_tiny, write_folder
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Task
from modelpatch.errors import TrainingError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.recipes.multitask import fit_multitask, teams_of
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import fit
from modelpatch.train.distributed import Team, joined, restarted
from modelpatch.train.trainer import Trainer

pytestmark = pytest.mark.service

long = pytest.mark.skipif(os.environ.get("MODELPATCH_LONG") != "1", reason="a long test: set MODELPATCH_LONG=1")
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "head_lr": 0.1}
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 7, "augment": "light"}
LEARNED = ScaleBias(statistics="learned", **SGD)


def named(name: str, count: int, seed: int) -> Task:
    return replace(color_task(count, seed=seed), task=TaskRecord(name=name, classes=("red", "green", "blue")))


def run_all(folder: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Every kind of run whose result must not depend on the number of processes: all numbers that were trained."""
    tiny, colors = make_tiny(), color_task(25)  # whose last batch has 4 images
    patches = {
        "cached": fit(tiny, colors, LinearProbe(optimizer="sgd", head_lr=0.1), **SETTINGS),
        "balanced": fit(tiny, colors, ScaleBias(**SGD), class_weights="balanced", label_smoothing=0.1, **SETTINGS),
        "clipped": fit(tiny, colors, ScaleBias(statistics="recomputed", **SGD), clip=0.5, validation=0.2, **SETTINGS),
    }
    tasks, shared = [named("first", 24, 0), named("second", 11, 1)], FullFinetune(optimizer="sgd", lr=0.02)
    sgd = ScaleBias(**SGD)
    results = {
        "equal": fit_multitask(tiny, tasks, sgd, shared=shared, weights={"first": 3}, checkpoint=folder, **SETTINGS),
        "proportional": fit_multitask(tiny, tasks, sgd, shared=shared, sampling="proportional", **SETTINGS),
        "one task": fit_multitask(tiny, tasks[:1], sgd, shared=shared, clip=0.5, **SETTINGS),
    }
    if folder is None or len(Team.everyone().ranks) == 2:
        results["statistics"] = fit_multitask(tiny, tasks, LEARNED, shared=shared, **SETTINGS)
    numbers = {name: dict(patch.tensors) for name, patch in patches.items()}
    for name, result in results.items():
        numbers[name] = dict(result.backbone.module.state_dict())
        for task, patch in result.patches.items():
            numbers[name] |= {f"{task} {key}": tensor for key, tensor in patch.tensors.items()}
    return numbers


COMPARED = """
import sys
from pathlib import Path
import torch
from test_distributed import run_all
from modelpatch.cli.main import main
from modelpatch.train.distributed import joined

folder = Path(sys.argv[1])
with joined() as team:
    torch.save(run_all(folder / "training"), folder / f"{team.rank}.pt")
    if len(team.ranks) == 2:
        sys.argv[1:] = sys.argv[2:]
        main()
"""

VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
from conftest import color_task, make_tiny
from test_distributed import LEARNED, SETTINGS, SGD, named
from modelpatch.methods import FullFinetune, ScaleBias
from modelpatch.train import callbacks, fit, fit_multitask
from modelpatch.train.fitting import PatchTrainer
from modelpatch.train.distributed import joined, restarted

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
callbacks.EVERY_SECONDS = 0
step = PatchTrainer.train_step
def dying(self, batch):
    killed = folder / f"killed-{kind}"
    if self.step == 5 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / f"{kind}-{killed.exists()}").open("a") as file:
        print(self.step + 1, file=file)
    return step(self, batch)
if rank == "1":
    PatchTrainer.train_step = dying
with joined():
    kind, out = "fit", folder / "colors.safetensors"
    state = folder / "training"
    patch = fit(make_tiny(), color_task(), ScaleBias(**SGD), checkpoint=state, out=out, reuse=True, **SETTINGS)
    kind = "multitask"
    tasks = [named("first", 24, 0), named("second", 24, 1)]
    result = fit_multitask(make_tiny(), tasks, LEARNED, checkpoint=state, **SETTINGS)
tensors = dict(result.backbone.module.state_dict()) | dict(result.patches["second"].tensors)
torch.save({"fit": dict(patch.tensors), "multitask": tensors}, folder / f"{rank}.pt")
"""


def torchrun(count: int, *command: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", count, "--max-restarts", restarts]
    words = [sys.executable, "-m", *map(str, (*launcher, *command))]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=500)


def assert_close(given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(given[name].float(), tensor.float(), rtol=tolerance, atol=tolerance), name


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process trains."""
    return run_all()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=long)])
def test_any_number_of_processes_train_what_one_trains(
    count: int, alone: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    script, out = tmp_path / "script.py", tmp_path / "together"
    script.write_text(COMPARED)
    data = write_folder(tmp_path / "colors"), write_folder(tmp_path / "shades", ("dark", "light", "medium"))
    verb = ["multitask", *data, "-o", out, "--epochs", 1, "--image-size", 32, "--json", tmp_path / "figures.json"]
    done = torchrun(count, script, tmp_path, *verb)
    assert done.returncode == 0, done.stderr
    every = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]
    for kind, numbers in every[0].items():
        assert_close(numbers, alone[kind], 1e-4)
        for other in every[1:]:
            assert_close(other[kind], numbers, 0)
    assert len(every[0]) == len(alone) - (count > 2)
    start = make_tiny().module.state_dict()
    moved = [float((alone["equal"][name] - tensor).abs().max()) for name, tensor in start.items() if "conv" in name]
    assert min(moved) > 1e-3  # far more than the tolerance
    if count == 2:
        check_spoken_once(done.stdout, out)
        assert (tmp_path / "figures.json").exists()


def check_spoken_once(spoken: str, out: Path) -> None:
    """The verb's words stand once, whatever the number of processes, and its files are whole."""
    assert spoken.count("2 patches of it") == 1
    loaded = load_backbone(f"file:{out}/backbone.safetensors")
    for name in ("colors", "shades"):
        Patch.load(out / f"{name}.safetensors").check_backbone(loaded)


def test_killed_processes_are_started_again_and_their_runs_go_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(VICTIM)
    done = torchrun(2, script, tmp_path, restarts=4)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("failed (exitcode: -9)") == 2
    for kind in ("fit", "multitask"):
        first, second = (steps_in(tmp_path / f"{kind}-{again}") for again in (False, True))
        assert first == [1, 2, 3, 4, 5]
        assert second[0] in (4, 5, 6)  # not from the start: the state of step 4 may be half written when a process dies
        assert second[-1] == 12
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    tiny = make_tiny()
    result = fit_multitask(tiny, [named("first", 24, 0), named("second", 24, 1)], LEARNED, **SETTINGS)
    expected = dict(result.backbone.module.state_dict()) | dict(result.patches["second"].tensors)
    assert_close(first["multitask"], expected, 1e-4)
    assert_close(second["multitask"], first["multitask"], 0)
    assert_close(first["fit"], dict(fit(tiny, color_task(), ScaleBias(**SGD), **SETTINGS).tensors), 1e-4)


def steps_in(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().splitlines()]


# teams ------------------------------------------------------------------------------------------------------


class Recorded(Team):
    """A team that makes no groups."""

    def some(self, ranks: Any) -> Team:
        return Team(tuple(ranks), self.rank)


@pytest.mark.parametrize(
    ("count", "tasks", "expected"),
    [
        (1, 3, [(0,), (0,), (0,)]),
        (2, 3, [(0,), (1,), (0,)]),
        (3, 3, [(0,), (1,), (2,)]),
        (5, 2, [(0, 2, 4), (1, 3)]),
        (2, 1, [(0, 1)]),
    ],
)
def test_tasks_and_processes_take_turns(count: int, tasks: int, expected: list[tuple[int, ...]]) -> None:
    assert [team.ranks for team in teams_of(Recorded(tuple(range(count)), 0), tasks)] == expected


@pytest.mark.parametrize(("images", "count"), [(7, 1), (7, 2), (7, 3), (2, 3)])
def test_the_parts_of_a_batch_are_the_batch(images: int, count: int) -> None:
    rows = list(range(images))
    parts = [rows[Team(tuple(range(count)), rank).part(images)] for rank in range(count)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_batch_statistics_of_a_part_are_refused() -> None:
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)]
    for team in (Team(), Team((0, 1), 0)):
        trainer = Trainer(LEARNED.draft(make_tiny(), 3), batches, steps=1, team=team)
        if team.alone:
            trainer.train()
        else:
            with pytest.raises(TrainingError, match="those of 2 parts of a batch are not the batch's"):
                trainer.train()


def test_a_process_that_nobody_launched_is_alone() -> None:
    with joined() as team:
        assert (team.ranks, team.leads, team.alone) == ((0,), True, True)
        assert team.follow("x") == "x"
        assert team.collect(3) == [3]
        assert not restarted()
