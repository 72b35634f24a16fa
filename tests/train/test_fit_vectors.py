"""Several labels and numbers, from a fit to files, engines, exports, comparisons and merges; and a kind of one's own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import modelpatch as mp
from conftest import make_tiny, skip_without
from modelpatch.backbone.backbone import Backbone
from modelpatch.convert.exporting import check_onnx, export
from modelpatch.convert.merging import merge
from modelpatch.data.task import Task
from modelpatch.engine.engine import Engine
from modelpatch.errors import DataError, EngineError, PatchError, TrainingError, TrainingWarning
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.recipes.comparison import compare
from modelpatch.recipes.multitask import fit_multitask
from modelpatch.report import plots, tables
from modelpatch.tasks.kind import Facts, Kind, Meter, Result, Target, View, register_kind
from modelpatch.tasks.vector import Vector
from modelpatch.train import Callback, evaluate, fit
from vectors import label_task, number_task

skip_without("torchmetrics")
PLAIN: dict[str, Any] = {"augment": "none", "epochs": 3}
LONG: dict[str, Any] = {"augment": "none", "epochs": 30, "batch_size": 8}
NUMBERS = LinearProbe(head_lr=0.3)
FIGURES = ("test_map", "test_f1_macro", "test_f1_micro", "test_images")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


@pytest.fixture(scope="module")
def lights(backbone: Backbone) -> Patch:
    return fit(backbone, label_task(), ScaleBias(), **PLAIN)


@pytest.fixture(scope="module")
def brightness(backbone: Backbone) -> Patch:
    return fit(backbone, number_task(scale=30.0, shift=1990.0), NUMBERS, **LONG)


def test_a_patch_keeps_thresholds_and_answers_alike_from_its_file(
    backbone: Backbone, lights: Patch, tmp_path: Path
) -> None:
    loaded = Patch.load(lights.save(tmp_path / "lights.safetensors"))
    assert loaded.task == lights.task
    assert len(loaded.task.options["thresholds"]) == 3
    assert loaded.task.options["held_out_images"] >= 3
    measured = evaluate(backbone, loaded, label_task())
    figures = {f"test_{name}": value for name, value in measured.figures.items()}
    assert {name: figures[name] for name in FIGURES} == pytest.approx({name: lights.metrics[name] for name in FIGURES})
    assert measured.score > 0.7


def test_thresholds_do_not_depend_on_the_test_images(backbone: Backbone, lights: Patch) -> None:
    other = replace(label_task(), test=label_task(seed=5).test)
    again = fit(backbone, other, ScaleBias(), **PLAIN)
    assert again.task.options == lights.task.options
    held = replace(label_task(), validation=label_task(seed=7).test)
    assert fit(backbone, held, ScaleBias(), **PLAIN).task.options["held_out_images"] == 12


def test_images_of_which_nothing_is_known_change_nothing(backbone: Backbone) -> None:
    task = label_task()
    blank = [Vector(np.full(3, np.nan))] * 4
    images = [*task.train.images, *task.train.images[:4]]
    more = replace(
        task.train,
        images=images,
        labels=np.r_[task.train.labels, [3] * 4],
        targets=[*task.train.read_targets(), *blank],
    )
    settings: dict[str, Any] = {"augment": "none", "epochs": 1, "batch_size": 100, "seed": 1}
    held = label_task(seed=3).test
    tasks = [replace(task, validation=held), replace(task, train=more, validation=held)]
    one, other = (fit(backbone, each, LinearProbe(), **settings) for each in tasks)
    for name, tensor in one.tensors.items():
        assert torch.allclose(tensor, other.tensors[name], atol=1e-5), name


@pytest.mark.parametrize("loss", ["focal", "asymmetric(negative=2)"])
def test_other_losses_train_and_are_kept_in_the_record(backbone: Backbone, loss: str) -> None:
    settings: dict[str, Any] = {"class_weights": "balanced", "label_smoothing": 0.05}
    patch = fit(backbone, label_task(), LinearProbe(), loss=loss, **settings, **PLAIN)
    assert patch.created["settings"]["loss"] == loss
    assert patch.metrics["test_map"] > 0.6


def test_answers_are_in_the_units_of_the_data(backbone: Backbone, brightness: Patch) -> None:
    data = number_task(scale=30.0, shift=1990.0)
    assert brightness.metrics["test_r2"] > 0.5
    images = brightness.preprocessing(*data.test.images)
    answers = backbone.patched(brightness)(images)
    wanted = torch.tensor(np.stack([target.values for target in data.test.read_targets()]))  # type: ignore[attr-defined]
    assert float((answers - wanted).abs().mean()) == pytest.approx(brightness.metrics["test_mae"], rel=1e-3)
    assert Engine(backbone, {"b": brightness})(images)["b"].sub(answers).abs().max() < 1e-2
    plain = fit(backbone, number_task(), NUMBERS, **LONG)
    assert plain.metrics["test_r2"] == pytest.approx(brightness.metrics["test_r2"], abs=1e-3)
    assert 30 * plain.metrics["test_mae"] == pytest.approx(brightness.metrics["test_mae"], rel=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_mean_far_from_zero_survives_smaller_types(backbone: Backbone, brightness: Patch, dtype: str) -> None:
    stored = brightness.astype(dtype)
    assert stored.tensors["head.bias"].dtype == torch.float32
    data = number_task(scale=30.0, shift=1990.0)
    assert evaluate(backbone, stored, data).figures["mae"] == pytest.approx(brightness.metrics["test_mae"], rel=0.1)


def test_a_loss_of_the_users_sees_the_users_units(backbone: Backbone) -> None:
    seen = []

    def loss(answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append((answers.detach().mean(), targets.mean()))
        return (answers - targets.float()).square().mean() / 1e4

    fit(backbone, number_task(scale=30.0, shift=1990.0), LinearProbe(), loss=loss, augment="none", epochs=1)
    assert all(1900 < float(value) < 2100 for pair in seen for value in pair)


class Stop(Callback):
    """An interrupt after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, trainer: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("make", [label_task, number_task])
def test_an_interrupted_fit_resumes_to_the_same_patch(backbone: Backbone, make: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "augment": "light", "views": 2}
    whole = fit(backbone, make(), ScaleBias(), **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(backbone, make(), ScaleBias(), checkpoint=tmp_path / "run", callbacks=[Stop(7)], **settings)
    resumed = fit(backbone, make(), ScaleBias(), checkpoint=tmp_path / "run", **settings)
    assert resumed.task == whole.task
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())


def test_options_that_the_loss_does_not_take_are_refused_before_training(backbone: Backbone) -> None:
    for settings, message in (
        ({"loss": "huber"}, "none for multilabel. Expected one of: bce"),
        ({"loss": "bce", "class_weights": (1.0, 2.0)}, "has 3 labels"),
        ({"decoder": "fcn16"}, "are for dense tasks"),
    ):
        with pytest.raises(TrainingError, match=message):
            fit(backbone, label_task(), LinearProbe(), **settings)
    for settings, message in (
        ({"class_weights": "balanced"}, "regression tasks does not take class_weights"),
        ({"label_smoothing": 0.1}, "regression tasks does not take label_smoothing"),
        ({"loss": "focal"}, "Expected one of: l2, l1, huber"),
    ):
        with pytest.raises(TrainingError, match=message):
            fit(backbone, number_task(), LinearProbe(), **settings)


def test_a_label_that_no_training_image_has_is_told(backbone: Backbone) -> None:
    task = label_task()
    values = [Vector(np.array([0.0, 1.0, 0.0])) for _ in task.train.images]
    with pytest.warns(TrainingWarning, match="no training image has the label"):
        fit(backbone, replace(task, train=replace(task.train, targets=values)), LinearProbe(), augment="none", epochs=1)


def test_recipes_for_classes_say_so(backbone: Backbone) -> None:
    for make in (label_task, number_task):
        with pytest.raises(DataError, match=r"takes classification tasks\. Use fit, compare, eval and predict"):
            mp.select.profile(backbone, make(), LinearProbe())
        with pytest.raises(DataError, match="takes classification tasks"):
            fit_multitask(backbone, [make(), make()])


def test_methods_are_compared_by_the_metric_of_the_kind(backbone: Backbone, tmp_path: Path) -> None:
    for make, metric, header in ((label_task, "map", "mAP"), (number_task, "r2", "R²")):
        result = compare(backbone, make(), ["linear-probe", "scale-bias"], epochs=1, augment="none", seeds=2)
        found = result.as_dict()
        assert found["rows"][0][metric] == result.rows[0].score
        assert found["runs"]["scale-bias"][0][metric] == result.patches["scale-bias"].metrics[f"test_{metric}"]
        cells, rows = tables.comparison_cells(result)
        assert cells[1] == header
        assert rows[0][1].replace("± ", "")
        for draw in (plots.plot_comparison, plots.plot_bytes):
            draw(result, tmp_path / "drawn.png")


def test_figures_are_shown_in_their_units(brightness: Patch, lights: Patch, backbone: Backbone) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables.fit_table(brightness.inspect()), tables.inspection_table(lights.inspect()))
    result = evaluate(backbone, brightness, number_task(scale=30.0, shift=1990.0))
    console.print(tables.evaluation_table(brightness.task, result.as_dict(), per_class=True))
    text = console.export_text()
    assert "brightness: regression, 2 numbers" in text
    assert "lights: multilabel, 3 labels" in text
    assert f"MAE of whole  {result.per_class['whole']:.4g}" in " ".join(text.split()).replace("whole ", "whole  ")
    assert "thresholds" in text
    assert "test R²" in text


def test_heads_of_one_kind_are_joined(backbone: Backbone, lights: Patch, brightness: Patch) -> None:
    other = replace(lights, task=lights.task.model_copy(update={"name": "others"}))
    joined = merge(backbone, [lights, other], head="all")
    assert (joined.task.kind, len(joined.task.classes)) == ("multilabel", 6)
    assert joined.task.options["thresholds"] == 2 * lights.task.options["thresholds"]
    with pytest.raises(PatchError, match="tasks of several kinds cannot be joined"):
        merge(backbone, [lights, brightness], head="all")


def test_patches_of_two_kinds_are_no_options_of_one_task(backbone: Backbone, lights: Patch, brightness: Patch) -> None:
    with pytest.raises(EngineError, match=r"for (multilabel and for regression|regression and for multilabel)"):
        Engine(backbone).add("both", [lights, brightness])


@pytest.mark.slow
def test_an_onnx_file_answers_in_the_units_of_the_data(backbone: Backbone, brightness: Patch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = export(backbone, brightness, tmp_path / "b.onnx", "onnx")
    images = brightness.preprocessing(*number_task().test.images)
    agreement = check_onnx(path, backbone.patched(brightness), images)
    assert agreement.holds, agreement
    facts = {one.key: one.value for one in onnx.load(str(path)).metadata_props}
    assert facts["kind"] == "regression"
    assert '"mean"' in facts["options"]


# a kind of one's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank(Target):
    """A place on a scale from 0."""

    place: int
    moves = False

    def content(self) -> bytes:
        return str(self.place).encode()

    def frame(self, image: Any, preprocessing: Any) -> int:
        return self.place

    @staticmethod
    def batch(framed: Sequence[Any], preprocessing: Any, matrices: Any) -> torch.Tensor:
        return torch.tensor([one.place if isinstance(one, Rank) else one for one in framed])


@dataclass(frozen=True)
class RankResult(Result):
    exact: float
    images: int
    per_class: dict[str, float]


class RankMeter(Meter):
    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.right = self.images = 0

    def update(self, answers: torch.Tensor, targets: torch.Tensor) -> None:
        self.right += int(((answers > 0).sum(1) == targets).sum())
        self.images += len(targets)

    def result(self) -> RankResult:
        return RankResult(self.right / self.images, self.images, {})


class Ordinal(Kind):
    """A place on a scale: output k says that the place is above k."""

    name: ClassVar[str] = "ordinal"
    metrics: ClassVar[Mapping[str, str]] = {"exact": "exact"}
    meter_type = RankMeter
    target = Rank
    noun, nouns = "step", "steps"

    def read_target(self, value: Any, classes: Sequence[str]) -> Rank:
        return Rank(int(value))

    def name_classes(self, values: Any) -> tuple[str, ...]:
        return tuple(f"above {number}" for number in range(max(values)))

    def loss(self, output: Any, targets: Any, class_weights: Any = None, label_smoothing: float = 0.0) -> torch.Tensor:
        wanted = (targets[:, None] > torch.arange(output.shape[1])).float()
        return torch.nn.functional.binary_cross_entropy_with_logits(output, wanted)

    def reduce(self, answers: torch.Tensor, top: int = 5) -> list[int]:
        return (answers > 0).sum(1).tolist()

    def describe(self, answer: int, view: View, top: int = 5) -> list[Facts]:
        return [{"label": str(answer), "probability": 1.0}]

    def to_json(self, answer: int, view: View, top: int = 5) -> Facts:
        return {"place": answer}


@pytest.mark.usefixtures("registries")
def test_a_kind_of_another_distribution_is_one_class(backbone: Backbone, tmp_path: Path) -> None:
    register_kind(Ordinal)
    generator = np.random.default_rng(0)
    items = Items(
        (np.full((16, 16, 3), 60 * place + generator.integers(0, 40), dtype=np.uint8), place)
        for place in generator.integers(0, 4, 40).tolist()
    )
    task = Task.from_datasets(items, kind="ordinal")
    assert task.classes == ("above 0", "above 1", "above 2")
    patch = fit(backbone, task, LinearProbe(head_lr=0.1), **LONG)
    loaded = Patch.load(patch.save(tmp_path / "ordinal.safetensors"))
    assert evaluate(backbone, loaded, task).score == patch.metrics["test_exact"] > 0.4
    assert "3 steps" in str(loaded.inspect())


class Items(list[Any]):
    """A list is a data set with random access."""
