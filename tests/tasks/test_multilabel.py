"""Several labels an image: targets, losses, thresholds, metrics, answers, and a patch that keeps what it needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchvision.ops import sigmoid_focal_loss

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.data.samples import SampleForm
from modelpatch.data.splits import StreamSplit
from modelpatch.errors import DataError, TrainingError
from modelpatch.tasks.kind import View
from modelpatch.tasks.losses import asymmetric, bce, find_loss, focal
from modelpatch.tasks.multilabel import Multilabel, best_threshold, choose_thresholds, read_labels
from modelpatch.tasks.record import TaskRecord

NAMES = ("cat", "dog", "bird")
NAN = math.nan
SEEN = Preprocessing(input_size=(3, 8, 8))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (["dog"], [0, 1, 0]),
        (("dog", "cat"), [1, 1, 0]),
        ([], [0, 0, 0]),
        ([2, 0], [1, 0, 1]),
        ([0, 1, 1], [0, 1, 1]),
        (torch.tensor([1, 0, -1]), [1, 0, NAN]),
        (np.array([1.0, NAN, 0.0]), [1, NAN, 0]),
    ],
)
def test_labels_are_names_indices_or_flags(label: Any, expected: list[float]) -> None:
    np.testing.assert_array_equal(read_labels(label, NAMES), np.array(expected, dtype=float))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["fox"], "'fox' is none of"),
        ([3], "none of the indices 0 to 2"),
        (torch.tensor([1, 0]), "shape"),
        (torch.tensor([1, 0, 2]), "hold 2; expected 1, 0, or -1"),
        ("cat", "are a str"),
        ([None], "expected names"),
    ],
)
def test_other_labels_are_refused(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(label, NAMES)


@pytest.mark.parametrize("given", [[0, 1], [1, 0], [0]])
def test_whole_numbers_that_could_be_indices_or_flags_are_not_guessed(given: list[int]) -> None:
    with pytest.raises(DataError, match="the indices of all labels, or 0 and 1"):
        read_labels(given, NAMES[: len(given)])
    assert read_labels([1] * len(given), NAMES[: len(given)]).tolist() == [1] * len(given)


def test_a_set_holds_indices() -> None:
    assert read_labels({0, 1}, NAMES[:2]).tolist() == [1, 1]
    with pytest.raises(DataError, match="its label -1 is none of the indices"):
        read_labels({0, 1, -1}, NAMES)


class Rows(torch.utils.data.IterableDataset[Any]):
    readings = 0

    def __iter__(self) -> Any:
        Rows.readings += 1
        yield from ((np.zeros((8, 8, 3), np.uint8), [name]) for name in NAMES)


def test_a_stream_is_read_once_for_its_length_and_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "readings", 0)
    stream = StreamSplit(Rows(), SampleForm("rows", NAMES, kind="multilabel"), None, 0)
    with pytest.warns(UserWarning, match="unknown length"):
        assert len(stream) == 3
    assert np.stack([one.values for one in stream.read_targets()]).tolist() == np.eye(3).tolist()
    assert Rows.readings == 1


# losses ------------------------------------------------------------------------------------------------------


def test_losses_agree_with_their_equations() -> None:
    logits = torch.tensor([[-2.0, 0.3], [1.5, 4.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    p = logits.sigmoid()
    right = torch.where(targets == 1, p, 1 - p)
    assert torch.allclose(bce(logits, targets), -right.log())
    assert torch.allclose(focal(logits, targets, gamma=3.0), -((1 - right) ** 3) * right.log())
    shifted = (p - 0.05).clamp(min=0)
    expected = torch.where(targets == 1, -((1 - p) ** 1) * p.log(), -(shifted**4) * (1 - shifted).log())
    assert torch.allclose(asymmetric(logits, targets, positive=1.0), expected)
    assert torch.allclose(asymmetric(logits, targets, 0.0, 0.0, 0.0), bce(logits, targets), atol=1e-6)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25])
def test_the_focal_loss_is_torchvisions(alpha: float) -> None:
    logits, targets = torch.tensor([-3.0, 0.3, 1.5, 4.0]), torch.tensor([1.0, 0.0, 0.95, 0.05])
    assert torch.allclose(focal(logits, targets, 1.5, alpha), sigmoid_focal_loss(logits, targets, alpha, 1.5))


@pytest.mark.parametrize("spelled", ["focal(gamma=0.5)", "asymmetric(positive=0.5,negative=0.5,margin=0)"])
def test_powers_below_one_have_finite_gradients_where_outputs_are_certain(spelled: str) -> None:
    logits = torch.tensor([[30.0, -30.0, 30.0, -30.0, 200.0, -200.0]], requires_grad=True)
    loss = find_loss(spelled, Multilabel.losses, "multilabel")(logits, torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]]))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 3] < -0.9, "a label that is missed for certain is learned"


def test_unknown_labels_count_for_nothing_and_batches_may_be_cut() -> None:
    kind, weights = Multilabel(), torch.tensor([1.0, 2.0, 0.5])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[1, 0, NAN], [NAN, NAN, NAN], [0, 1, 1], [1, NAN, 0]], dtype=torch.float64)
    for chosen in (None, weights):
        loss = kind.make_loss("bce", {}, chosen)(logits, targets)
        known = ~targets.isnan()
        w = torch.ones(3) if chosen is None else chosen
        each = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0).float(), reduction="none") * w
        assert torch.allclose(loss, each[known].sum() / w.expand(4, 3)[known].sum())
        parts = torch.stack([kind.loss(logits[i : i + 1], targets[i : i + 1], chosen) for i in range(4)])
        counts = kind.weigh_images(targets, chosen)
        assert torch.allclose((parts * counts).sum() / counts.sum(), loss)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~known] == 0).all()
    assert (gradient[known] != 0).all()


def test_label_smoothing_pulls_targets_together() -> None:
    targets = torch.tensor([[1.0, 0.0]])
    assert torch.allclose(Multilabel().to_trained(targets, {}, 0.2), torch.tensor([[0.9, 0.1]]))


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("hinge", "Expected one of: bce, focal, asymmetric"),
        ("focal(beta=1)", "focal has no 'beta'. It has: gamma, alpha"),
        ("focal(gamma=-1)", "expected a number"),
        ("focal(gamma=x)", "expected a number"),
        ("focal(alpha=-0.5)", "alpha lies in"),
        ("focal(gamma=1, gamma=2)", "given twice"),
        ("bce(gamma=1)", "It has: none"),
        ("focal(gamma=1", "none for multilabel"),
    ],
)
def test_a_loss_that_there_is_not_is_refused_by_name(spelled: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message.replace("(", r"\(")):
        Multilabel().make_loss(spelled, {})


def test_a_loss_is_spelled_with_its_hyperparameters() -> None:
    loss = find_loss("focal(gamma=0, alpha=0.25)", Multilabel.losses, "multilabel")
    logits, targets = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert torch.allclose(loss(logits, targets), math.log(2) * torch.tensor([[0.25, 0.75]]))


# metrics -----------------------------------------------------------------------------------------------------


def test_figures_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    pytest.importorskip("torchmetrics")
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(60, 4)).round(1)
    targets = (generator.random((60, 4)) < (0.2, 0.5, 0.7, 0.05)).astype(float)
    targets[0, 3] = 1
    thresholds = [0.3, 0.5, 0.6, 0.5]
    shares = 1 / (1 + np.exp(-logits))
    kind = Multilabel()
    batches = [(torch.tensor(logits[i : i + 25]), torch.tensor(targets[i : i + 25])) for i in (0, 25, 50)]
    result = kind.measure("abcd", batches, {"thresholds": thresholds})
    told = shares >= thresholds
    assert result.map == pytest.approx(metrics.average_precision_score(targets, shares, average="macro"), abs=1e-6)
    for how in ("macro", "micro"):
        expected = metrics.f1_score(targets, told, average=how, zero_division=0)
        assert result.figures[f"f1_{how}"] == pytest.approx(expected, abs=1e-6)
    assert result.images == 60

    hidden = targets.copy()
    hidden[:20, 1] = NAN
    result = kind.measure("abcd", [(torch.tensor(logits), torch.tensor(hidden))], {"thresholds": thresholds})
    own = [
        metrics.average_precision_score(t[~np.isnan(t)], s[~np.isnan(t)])
        for t, s in zip(hidden.T, shares.T, strict=True)
    ]
    assert list(result.per_class.values()) == pytest.approx(own, abs=1e-6)
    known = ~np.isnan(hidden)
    assert result.figures["f1_micro"] == pytest.approx(metrics.f1_score(hidden[known], told[known]), abs=1e-6)


def test_a_label_that_no_image_has_is_left_out_of_the_mean() -> None:
    pytest.importorskip("torchmetrics")
    logits, targets = torch.tensor([[2.0, 1.0], [-2.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    result = Multilabel().measure(("a", "b"), [(logits, targets)])
    assert result.per_class == {"a": 1.0}
    assert result.figures["map"] == 1.0
    alone = Multilabel().measure(("a",), [(logits[:, :1], targets[:, :1])])
    assert (alone.figures["map"], alone.figures["f1_macro"]) == (1.0, 1.0)


# thresholds --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_other_threshold_has_a_better_f1(pairs: list[tuple[float, bool]]) -> None:
    shares, targets = np.array([p for p, _ in pairs]), np.array([float(t) for _, t in pairs])

    def score(threshold: float) -> float:
        told = shares >= threshold
        return float(2 * (told * targets).sum() / max(told.sum() + targets.sum(), 1))

    found = best_threshold(shares, targets)
    assert 0 <= found <= 1
    if targets.any():
        assert score(found) == pytest.approx(max(map(score, [0.0, *shares])))
    else:
        assert found == 0.5


def test_a_rare_label_has_the_threshold_of_all() -> None:
    generator = np.random.default_rng(1)
    targets = (generator.random((40, 3)) < 0.5).astype(float)
    shares = np.clip(0.3 * targets + 0.5 * generator.random((40, 3)) + (0.0, 0.15, 0.0), 0, 1)
    targets[:, 2] = 0
    targets[:4, 2] = 1
    thresholds = choose_thresholds(shares, targets)
    assert thresholds[2] == best_threshold(shares.ravel(), targets.ravel())
    assert thresholds[0] == best_threshold(shares[:, 0], targets[:, 0]) != thresholds[2]


@pytest.mark.parametrize(
    "options",
    [
        {"thresholds": [0.5]},
        {"thresholds": [0.5, 0.5, 2.0]},
        {"thresholds": [0.5, 0.5, True]},
        {"thresholds": "0.5"},
        {"held_out_images": -1},
        {"mean": [1.0]},
    ],
)
def test_a_record_with_other_options_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TaskRecord(name="a", kind="multilabel", classes=NAMES, options=options)


# answers -----------------------------------------------------------------------------------------------------


def test_labels_are_told_from_their_thresholds_on() -> None:
    kind, logits = Multilabel(), torch.tensor([[2.0, 0.0, -2.0], [-3.0, -3.0, -3.0]])
    view = View(NAMES, SEEN, known_size=(8, 8), options={"thresholds": [0.9, 0.4, 0.1]})
    first, second = kind.reduce(logits)
    assert [one["label"] for one in kind.describe(first, view)] == ["dog", "bird"]
    assert kind.summarize(kind.describe(second, view)) == ["no label"]
    said = kind.to_json(first, view, top=2)
    assert [one["class"] for one in said["top"]] == ["cat", "dog"]
    assert [(one["index"], one["threshold"]) for one in said["labels"]] == [(1, 0.4), (2, 0.1)]
    assert kind.to_json(second, view)["labels"] == []


def test_a_picture_has_a_legend_of_its_labels(tmp_path: Path) -> None:
    image = np.zeros((80, 120, 3), dtype=np.uint8)
    kind, view = Multilabel(), View(NAMES, SEEN, image)
    drawn = kind.draw(kind.reduce(torch.tensor([[2.0, 0.0, -2.0]]))[0], view)
    assert drawn.width == 120
    assert drawn.height > 80
    assert not np.asarray(drawn)[:80].any()
