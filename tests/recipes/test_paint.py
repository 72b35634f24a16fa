"""PAINT: curves, the choice of a point, and several tasks."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from conftest import color_task, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import DataError, MethodError, MissingExtraError, TrainingError
from modelpatch.heads.linear import LinearHead
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.paint import Paint, Start
from modelpatch.recipes import paint
from modelpatch.recipes.painting import PaintSettings, join_heads, split_head
from modelpatch.recipes.tradeoff import (
    Accuracy,
    Point,
    Rule,
    Scorer,
    alphas,
    distance_to_optimal,
    fit_probe,
    linear_cka,
    weight_cosine,
)
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import fit
from tolerance import close

pytestmark = pytest.mark.slow


def task(name: str, classes: tuple[str, ...], seed: int, count: int = 24) -> Task:
    return replace(color_task(count, seed=seed), task=TaskRecord(name=name, classes=classes))


NEW, OLD, OTHER = (
    task("new", ("red", "green", "blue"), 0),
    task("old", ("x", "y", "z"), 3),
    task("other", ("p", "q", "red"), 5),
)
FAST = {"epochs": 1, "batch_size": 8}


def point(patched: float, supported: float, weight: float = 0.0) -> Point:
    return Point(
        (weight,),
        {"new": Accuracy("patched", patched, patched), "old": Accuracy("supported", supported, supported)},
    )


# figures ----------------------------------------------------------------------------------------------------------


def test_the_distance_to_optimal_is_what_one_model_loses_to_the_best_of_two() -> None:
    assert distance_to_optimal([point(0.2, 0.9), point(0.8, 0.5), point(0.7, 0.8)]) == pytest.approx(0.85 - 0.75)
    assert distance_to_optimal([point(0.8, 0.9)]) == 0


@pytest.mark.parametrize(
    ("rule", "weight"), [("mean", 0.7), ("harmonic", 0.6), ("drop=1", 0.3), ("drop=0", 0.0), ("drop=100", 1.0)]
)
def test_every_rule_chooses_its_point(rule: str, weight: float) -> None:
    base = point(0.1, 0.90, 0.0)
    others = [point(0.3, 0.89, 0.3), point(0.55, 0.74, 0.6), point(0.95, 0.40, 0.7), point(0.96, 0.1, 1.0)]
    # means: 0.595 0.645 0.675 0.53; harmonic means: 0.449 0.631 0.563 0.181
    assert Rule.parse(rule).choose(others, base).weights == (weight,)


def test_test_images_do_not_choose() -> None:
    tempting = Point((1.0,), {"new": Accuracy("patched", 0.1, 1.0), "old": Accuracy("supported", 0.1, 1.0)})
    assert Rule.parse("mean").choose([tempting], point(0.5, 0.5)).weights == (0.0,)


@pytest.mark.parametrize("rule", ["best", "drop", "drop=x", "drop=-1", "mean=2"])
def test_what_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(TrainingError, match="is no rule"):
        PaintSettings(rule=rule)


def test_cka_is_one_for_turned_and_scaled_features_and_near_zero_for_others() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(400, 6)) < 0.1


def test_the_cosine_of_weights_is_that_of_all_parameters(tiny: Backbone) -> None:
    patch = fit(tiny, NEW, Paint(lr=1e-2), **FAST)
    model = tiny.patched(patch)
    local = {name.removeprefix("replace/"): place for name, place in model.names.items()}
    tensors = dict(model.named_parameters())
    pairs = [
        (parameter, tensors[local[segment.tensor_names[name]]])
        for segment in tiny.chain
        for name, parameter in segment.module.named_parameters()
    ]
    before, after = (torch.cat([pair[number].flatten() for pair in pairs]) for number in (0, 1))
    assert weight_cosine(tiny, patch) == pytest.approx(float(torch.cosine_similarity(before, after, 0)), abs=1e-6)
    assert weight_cosine(tiny, patch.with_alpha(0)) == pytest.approx(1)


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(60, 5), torch.randint(0, 3, (60,))
    head = fit_probe(features, labels, 3, strength=0.1)
    scale = features.square().mean().sqrt()

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (
            torch.nn.functional.cross_entropy(features @ weight.T + bias, labels)
            + 0.05 * (weight * scale).square().sum()
        )

    weight, bias = (t.detach().clone().requires_grad_(True) for t in (head.weight, head.bias))
    loss(weight, bias).backward()
    assert float(weight.grad.abs().max()) < 1e-3  # type: ignore[union-attr]
    assert torch.equal(fit_probe(features, labels, 3, strength=0.1).weight, head.weight)


# one task ---------------------------------------------------------------------------------------------------------


def test_one_fine_tuning_gives_the_whole_curve_and_the_base_at_alpha_0(tiny: Backbone) -> None:
    painting = paint(tiny, NEW, OLD, exploration=PaintSettings(steps=5), method=Paint(lr=1e-2), **FAST)
    assert [one.weights for one in painting.curve] == [(0.0,), (0.25,), (0.5,), (0.75,), (1.0,)]
    assert painting.curve[0].tasks == painting.base.tasks
    assert painting.patch.strength == painting.chosen.weights[0]
    images = torch.randn(3, 3, 16, 16)
    model = tiny.patched(painting.patch.with_alpha(0))
    assert close(model.run_prefix(images, model.end), tiny.chain(images))
    changed = tiny.patched(painting.patch.with_alpha(1))
    assert not close(changed.run_prefix(images, changed.end), tiny.chain(images))
    body = sum(parameter.numel() for parameter in changed.parameters()) - sum(
        p.numel() for p in changed.head.parameters()
    )
    assert body == sum(segment.parameters for segment in tiny.chain)  # nothing is added to the network
    assert painting.patch.metrics["alpha"] == [painting.patch.strength]
    assert painting.patch.metrics["test_top1"] == painting.chosen.mean("patched")


def test_the_head_stays_frozen_and_is_that_of_a_linear_probe(tiny: Backbone) -> None:
    painting = paint(tiny, NEW, OLD, exploration=PaintSettings(steps=2), **FAST)
    train = NEW.with_validation(0.2, 0).train
    head = Scorer(tiny, tiny.preprocessing).probe(replace(NEW, train=train))
    assert torch.equal(painting.patch.tensors["head.weight"], head.weight)


def test_the_naive_way_trains_the_head_along_but_is_compared_with_the_probe(tiny: Backbone) -> None:
    naive = paint(tiny, NEW, OLD, exploration=PaintSettings(steps=2, naive=True), **FAST)
    fair = paint(tiny, NEW, OLD, exploration=PaintSettings(steps=2), **FAST)
    assert naive.base.tasks == fair.base.tasks
    assert not torch.equal(naive.patch.tensors["head.weight"], fair.patch.tensors["head.weight"])
    assert naive.curve[0].tasks["new"] != naive.base.tasks["new"]


def test_statistics_measured_again_are_the_patch_s_own(tiny: Backbone) -> None:
    painting = paint(tiny, NEW, OLD, exploration=PaintSettings(steps=3, norms="shared", refit=True), **FAST)
    names = [name for name in painting.patch.tensors if name.endswith(("running_mean", "running_var"))]
    assert len(names) == 2 * sum(isinstance(m, torch.nn.BatchNorm2d) for m in tiny.module.modules())
    assert painting.patch.strength == 1
    tiny.verify()
    model = tiny.patched(painting.patch)
    assert torch.isfinite(model(torch.randn(2, 3, 16, 16))).all()


def test_the_same_seed_gives_the_same_patch(tiny: Backbone) -> None:
    runs = [paint(make_tiny(), NEW, OLD, exploration=PaintSettings(steps=3), seed=7, **FAST) for _ in range(2)]
    assert runs[0].patch.content_hash == runs[1].patch.content_hash
    assert runs[0].as_dict() == runs[1].as_dict()


# several tasks ----------------------------------------------------------------------------------------------------


def test_joint_patching_answers_all_tasks_with_one_head(tiny: Backbone) -> None:
    painting = paint(tiny, [NEW, OTHER], OLD, exploration=PaintSettings(steps=2), **FAST)
    assert painting.patch.task.classes == ("new: red", "green", "blue", "p", "q", "other: red")
    assert set(painting.chosen.tasks) == {"new", "other", "old"}


@pytest.mark.parametrize("mixing", ["scalar", "search", "exhaustive"])
def test_parallel_patching_mixes_one_patch_a_task(tiny: Backbone, mixing: str) -> None:
    settings = PaintSettings(mode="parallel", mixing=mixing, steps=3, trials=3)  # type: ignore[arg-type]
    painting = paint(tiny, [NEW, OTHER], OLD, exploration=settings, **FAST)
    scalar = [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5)]
    assert [one.weights for one in painting.curve[:3]] == scalar
    more = [one.weights for one in painting.curve[3:]]
    if mixing == "exhaustive":
        assert sorted(more) == [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    assert len(more) == {"scalar": 0, "search": 3, "exhaustive": 9}[mixing]
    assert len(painting.patch.task.classes) == 6


def test_sequential_patching_tries_orders_and_starts_where_it_was(tiny: Backbone) -> None:
    settings = PaintSettings(mode="sequential", steps=3, orders=3, interpolate=False)
    painting = paint(tiny, [NEW, OTHER], OLD, exploration=settings, seed=1, **FAST)
    assert len(painting.orders) == 3
    assert {order.tasks for order in painting.orders} <= {("new", "other"), ("other", "new")}
    assert len({order.tasks for order in painting.orders}) == 2
    assert all(order.alphas == (1.0, 1.0) for order in painting.orders)  # plain fine-tuning, one after another
    mixed = paint(tiny, [NEW, OTHER], OLD, exploration=replace(settings, interpolate=True, orders=1), **FAST)
    assert all(one.weights == (1 - one.weights[1], one.weights[1]) for one in mixed.curve)


def test_fine_tuning_starts_at_given_weights(tiny: Backbone) -> None:
    body = {name: t + 1 for name, t in tiny.chain[0].named_tensors() if name == "stem.0.weight"}
    model = Paint(start=Start(body=body)).draft(tiny, 3)
    assert torch.equal(model.tensors()["replace/stem.0.weight"], body["stem.0.weight"])
    digests = {
        Paint(start=one).hyperparameters()["start"] for one in (Start(), Start(body=body), Start(LinearHead(16, 3)))
    }
    assert len(digests) == 3
    assert "start" not in Paint().hyperparameters()
    with pytest.raises(MethodError, match="hold nothing"):
        Paint(start=Start(body={"nothing": torch.zeros(1)})).draft(tiny, 3)


def test_heads_are_joined_and_split() -> None:
    heads = [LinearHead(4, 2), LinearHead(4, 3)]
    features = torch.randn(5, 4)
    whole = join_heads(heads)(features)
    assert torch.allclose(whole, torch.cat([head(features) for head in heads], 1))
    for part, head in zip(split_head(join_heads(heads), [2, 3]), heads, strict=True):
        assert torch.equal(part.weight, head.weight)  # type: ignore[arg-type]


# the method -------------------------------------------------------------------------------------------------------


def test_the_method_takes_its_head_from_a_patch(tiny: Backbone, tmp_path: object) -> None:
    path = f"{tmp_path}/probe.safetensors"
    probe = fit(tiny, NEW, LinearProbe(), out=path, **FAST)
    patch = fit(tiny, NEW, f"paint(head_from={path},lr=0.01)", **FAST)
    assert torch.equal(patch.tensors["head.weight"], probe.tensors["head.weight"])
    assert patch.method.hyperparameters["head_from"] == path
    assert "start" not in patch.method.hyperparameters
    with pytest.raises(MethodError, match="3 outputs, the task 2 classes"):
        Paint(head_from=path).draft(tiny, 2)


# refusals ---------------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, problem in (
        ({"mode": "both"}, "mode is 'both'"),
        ({"steps": 1}, "at least 2"),
        ({"orders": 0}, "count from 1"),
        ({"naive": True, "refit": True}, "Give one of them"),
    ):
        with pytest.raises(TrainingError, match=problem):
            PaintSettings(**values)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="named 'new'"):
        paint(tiny, [NEW, NEW], OLD)
    with pytest.raises(DataError, match="one to support"):
        paint(tiny, NEW, [])
    many = [task(f"t{number}", ("a", "b", "c"), number) for number in range(4)]
    with pytest.raises(TrainingError, match="too many for a grid"):
        paint(tiny, many, OLD, exploration=PaintSettings(mode="parallel", mixing="exhaustive", steps=2), **FAST)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[search\]"):
        paint(tiny, [NEW, OTHER], OLD, exploration=PaintSettings(mode="parallel", mixing="search", steps=2), **FAST)


def test_alphas_are_even() -> None:
    assert alphas(11) == [round(number / 10, 6) for number in range(11)]
    assert math.isnan(Point((), {}).mean("patched"))
