"""Numbers of an image: targets, normalisation inside the head, losses, metrics, answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import DataError, MethodNotApplicableError, TrainingError
from modelpatch.heads.linear import CosineHead, LinearHead
from modelpatch.tasks.kind import View
from modelpatch.tasks.record import TaskRecord
from modelpatch.tasks.regression import Regression, show_number

NAN = math.nan
KIND = Regression()


@pytest.mark.parametrize(
    ("label", "classes", "expected"),
    [
        (3, ("age",), [3.0]),
        (2.5, ("age",), [2.5]),
        (torch.tensor(2.5), ("age",), [2.5]),
        (np.float32(0.5), ("age",), [0.5]),
        ([1.0, None], ("a", "b"), [1.0, NAN]),
        (torch.tensor([1.0, NAN]), ("a", "b"), [1.0, NAN]),
    ],
)
def test_numbers_are_read(label: Any, classes: tuple[str, ...], expected: list[float]) -> None:
    np.testing.assert_array_equal(KIND.read_target(label, classes).values, np.array(expected))


@pytest.mark.parametrize(
    ("label", "message"),
    [("three", "expected a number"), ([1, 2], "has 2 numbers; expected 1"), (math.inf, "infinite"), (True, "number"),
     ({"a": 1}, "expected a number"), (None, None)],
)  # fmt: skip
def test_what_is_no_number_is_refused(label: Any, message: str | None) -> None:
    if message is None:
        assert math.isnan(KIND.read_target(label, ("a",)).values[0])
        return
    with pytest.raises(DataError, match=message):
        KIND.read_target(label, ("a",))


def test_mean_and_deviation_are_those_of_known_numbers() -> None:
    targets = torch.tensor([[1.0, 10.0], [3.0, NAN], [5.0, 30.0]], dtype=torch.float64)
    options = KIND.prepare(targets, ("a", "b"))
    assert options["mean"] == pytest.approx([3.0, 20.0])
    assert options["std"] == pytest.approx([math.sqrt(8 / 3), 10.0])


@pytest.mark.parametrize(("values", "message"), [([2.0, 2.0], "the same in all 2"), ([NAN, NAN], "unknown in all")])
def test_a_number_that_never_varies_is_refused(values: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        KIND.prepare(torch.tensor(values, dtype=torch.float64)[:, None], ("a",))


def test_the_finished_head_answers_in_the_units_of_the_data() -> None:
    head, features = LinearHead(5, 2), torch.randn(7, 5)
    options = {"mean": [1990.0, -3.0], "std": [12.0, 0.01]}
    with torch.no_grad():
        outputs = head(features)
        expected = KIND.to_answers(outputs, options)
        finished = LinearHead(5, 2)
        finished.load_state_dict(dict(KIND.finish_head(head.stored(), options)))
        assert torch.allclose(finished(features), expected, rtol=1e-5, atol=1e-3)
    assert torch.allclose(expected, outputs * torch.tensor(options["std"]) + torch.tensor(options["mean"]))
    assert torch.allclose(KIND.to_trained(expected, options, 0.0), outputs, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "function"),
    [("auto", F.mse_loss), ("l2", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss),
     ("huber(delta=0.5)", lambda x, y: F.huber_loss(x, y, delta=0.5))],
)  # fmt: skip
def test_losses_are_of_normalised_known_numbers(name: str, function: Any) -> None:
    options = {"mean": [10.0, 0.0], "std": [2.0, 1.0]}
    outputs, targets = torch.tensor([[0.5, 1.0], [3.0, 9.0]]), torch.tensor([[12.0, 3.0], [8.0, NAN]])
    loss = KIND.make_loss(name, options)(outputs, targets)
    assert torch.allclose(loss, function(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, 3.0, -1.0])))


def test_figures_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    targets = generator.normal(size=(50, 3)) * (1, 10, 100)
    answers = targets + generator.normal(size=(50, 3)) * (0.5, 8, 20)
    batches = [(torch.tensor(answers[i : i + 20]), torch.tensor(targets[i : i + 20])) for i in (0, 20, 40)]
    result = KIND.measure("abc", batches)
    assert result.figures == pytest.approx(
        {
            "r2": metrics.r2_score(targets, answers),
            "mae": metrics.mean_absolute_error(targets, answers),
            "rmse": metrics.root_mean_squared_error(targets, answers),
            "images": 50,
        }
    )
    hidden = targets.copy()
    hidden[:10, 1] = NAN
    result = KIND.measure("abc", [(torch.tensor(answers), torch.tensor(hidden))])
    assert result.per_class["b"] == pytest.approx(metrics.mean_absolute_error(targets[10:, 1], answers[10:, 1]))


def test_figures_of_one_image_are_finite() -> None:
    same = KIND.measure("a", [(torch.tensor([[1.0]]), torch.tensor([[1.0]]))])
    other = KIND.measure("a", [(torch.tensor([[1.0]]), torch.tensor([[2.0]]))])
    assert (same.score, other.score) == (1.0, 0.0)


def test_equal_numbers_that_have_another_mean_do_not_vary() -> None:
    assert np.full(3, 0.1).mean() != 0.1
    equal = torch.full((3, 1), 0.1, dtype=torch.float64)
    assert KIND.measure("a", [(torch.full((3, 1), 0.2), equal)]).score == 0.0
    few = torch.tensor([[0.1]] * 11 + [[0.2]], dtype=torch.float64)  # many draws lack the last
    result = KIND.measure("a", [(torch.full((12, 1), 0.11), few)], with_interval=True)
    assert result.interval is not None
    assert -1 < result.interval[0] <= result.score


def test_what_could_not_be_finished_or_stored_is_refused_before_the_first_step() -> None:
    options = {"mean": [0.0], "std": [1e5]}
    with pytest.raises(MethodNotApplicableError, match="CosineHead has no bias"):
        KIND.check_head(CosineHead(4, 1), "float32", options)
    with pytest.raises(TrainingError, match="more than float16 holds"):
        KIND.check_head(LinearHead(4, 1), "float16", options)
    KIND.check_head(LinearHead(4, 1), "bfloat16", options)
    for given in ((True, 0.0), (False, 0.1)):
        with pytest.raises(TrainingError, match="regression tasks does not take"):
            KIND.check_loss(*given)


@pytest.mark.parametrize(
    "options", [{"mean": [1.0]}, {"mean": [1.0], "std": [0.0]}, {"mean": [NAN], "std": [1.0]}, {"unit": "m"}]
)
def test_a_record_with_other_options_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TaskRecord(name="a", kind="regression", classes=("age",), options=options)


def test_answers_are_told_by_name() -> None:
    view = View(("age", "height"), Preprocessing(input_size=(3, 8, 8)), np.zeros((60, 90, 3), dtype=np.uint8))
    (answer,) = KIND.reduce(torch.tensor([[31.25, 1.5]]))
    assert KIND.summarize(KIND.describe(answer, view)) == ["age 31.25", "height 1.5"]
    assert KIND.to_json(answer, view) == {
        "values": [{"name": "age", "index": 0, "value": 31.25}, {"name": "height", "index": 1, "value": 1.5}]
    }
    assert KIND.draw(answer, view).height > 60


@pytest.mark.parametrize(
    ("value", "text"),
    [(1990.0, "1990"), (123456.7, "123,457"), (0.00123456, "0.001235"), (-2.5, "-2.5"), (1e20, "1e+20")],
)
def test_numbers_are_shown_in_four_digits(value: float, text: str) -> None:
    assert show_number(value) == text
