"""Scores of classes and intervals of figures, beside those of scikit-learn and of the formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import skip_without
from dense import box_task, square_task
from modelpatch.tasks.classification import Classification, Evaluation, class_auroc
from modelpatch.tasks.detection import Detection
from modelpatch.tasks.kind import Meter, kind_of
from modelpatch.tasks.multilabel import label_auroc
from modelpatch.tasks.scores import auroc, bootstrap_interval, mean_of_classes, score_classes, wilson_interval
from modelpatch.tasks.segmentation import Segmentation

skip_without("torchmetrics")


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    asked, answered = generator.integers(0, 5, 200), generator.integers(0, 6, 200)  # class 5 is answered, never asked
    confusion = metrics.confusion_matrix(asked, answered, labels=range(6))
    precision, recall, f1, count = metrics.precision_recall_fscore_support(
        asked, answered, labels=range(6), zero_division=0
    )
    scores = score_classes(confusion.tolist(), list("abcdef"))
    assert [one.precision for one in scores] == pytest.approx(precision.tolist())
    assert [one.recall or 0.0 for one in scores] == pytest.approx(recall.tolist())
    assert [one.f1 for one in scores] == pytest.approx(f1.tolist())
    assert [one.asked for one in scores] == count.tolist()
    assert scores[5].recall is None
    macro, balanced = mean_of_classes(confusion.tolist())
    assert macro == pytest.approx(f1[:5].mean())
    assert balanced == pytest.approx(recall[:5].mean())


def test_an_evaluation_has_the_means_of_its_classes() -> None:
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 1])]
    found = Evaluation.of(logits, torch.tensor([0, 0, 1, 1]), ("a", "b", "c"))
    assert found.figures["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found.figures["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert next(iter(found.figures)) == Classification().metric
    assert set(Classification.metrics) < set(found.figures)
    assert found.interval == wilson_interval(0.75, 4)
    assert found.as_dict()["macro_f1"] == found.figures["macro_f1"]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1))
def test_an_interval_holds_its_share_and_solves_its_equation(count: int, part: float) -> None:
    share = round(part * count) / count
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1
    for end in (low, high):  # (p - end)^2 = z^2 end (1 - end) / n
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-9)


def test_an_interval_of_no_images_says_nothing() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_the_bootstrap_of_a_mean_is_close_to_its_normal_interval() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(400, lambda times: float(times @ values) / 400) or (0, 0)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)
    assert bootstrap_interval(1, lambda times: 0.0) is None


def test_masks_have_an_interval_about_their_score() -> None:
    task, kind = square_task(), Segmentation()
    masks = torch.stack([torch.from_numpy(np.array(target.read())).long() for _, target in task.train])  # type: ignore
    answers = torch.nn.functional.one_hot(masks.clamp(max=2), 3).permute(0, 3, 1, 2).float()
    answers[: len(answers) // 2] = answers[: len(answers) // 2].roll(2, dims=-1)
    plain = kind.measure(task.classes, [(answers, masks)])
    found = kind.measure(task.classes, [(answers[:5], masks[:5]), (answers[5:], masks[5:])], with_interval=True)
    assert plain.interval is None
    assert found.interval is not None
    low, high = found.interval
    assert low < found.score < high
    assert found.score == plain.score


def test_boxes_have_an_interval_about_their_score() -> None:
    pytest.importorskip("pycocotools")
    task, kind = box_task(12), Detection()
    targets, answers = [], torch.zeros(len(task.train), 40, 6)
    for row, (_, target) in enumerate(task.train):
        boxes, labels = torch.from_numpy(target.corners).float(), torch.from_numpy(target.labels)  # type: ignore
        targets.append({"boxes": boxes, "labels": labels, "difficult": torch.zeros(len(labels), dtype=torch.bool)})
        kept = len(labels) if row % 2 else max(len(labels) - 1, 0)
        answers[row, :kept, :4], answers[row, :kept, 4] = boxes[:kept] + row % 3, 0.9
        answers[row, :kept, 5] = labels[:kept].float()
    found = kind.measure(task.classes, [(answers, targets)], with_interval=True)
    assert found.interval is not None
    low, high = found.interval
    assert 0 <= low < found.score < high <= 1


def test_every_image_drawn_once_gives_the_score_itself() -> None:
    pytest.importorskip("pycocotools")
    from modelpatch.tasks.detection import draw_precision

    box = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([0])}
    wanted = {**box, "iscrowd": torch.tensor([0])}
    missed = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    pairs = [({**box, "scores": torch.tensor([0.8])}, wanted), (missed, wanted)]
    measure = draw_precision(pairs, 1)
    assert measure is not None
    assert measure(np.array([2, 0])) == pytest.approx(1)
    assert measure(np.array([0, 2])) == 0
    assert measure(np.array([1, 1])) == pytest.approx(51 / 101)  # precision 1 at recalls 0, 0.01, ..., 0.5
    assert draw_precision([(missed, {**missed, "iscrowd": torch.zeros(0)})], 1) is None


def drawn_once(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> float:
    """The figure that a meter's bootstrap measures where every image is drawn once."""
    found: list[float] = []

    def draw(images: int, measure: Callable[[np.ndarray], float], draws: int = 0) -> None:
        found.append(measure(np.ones(images, dtype=int)))

    monkeypatch.setattr(f"{type(meter).__module__}.bootstrap_interval", draw)
    meter.interval()
    return found[0]


@pytest.mark.parametrize(
    ("kind", "unknown"), [("multilabel", 0.2), ("regression", 0.2), ("multilabel", 0), ("regression", 0)]
)
def test_every_image_once_is_the_score_with_equal_answers_and_unknown_targets(
    kind: str, unknown: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, (60, 3)).astype(np.float64)
    answers = torch.from_numpy((targets + generator.normal(size=targets.shape)).round(1))  # some are equal
    targets[generator.random(targets.shape) < unknown] = np.nan
    meter = kind_of(kind).meter(["a", "b", "c"])
    meter.update(answers, torch.from_numpy(targets))
    score = meter.result().score
    low, high = meter.interval() or (0, 0)
    assert low < score < high
    assert drawn_once(meter, monkeypatch) == pytest.approx(score, abs=1e-5)


def pairs_in_order(scores: np.ndarray, wanted: np.ndarray) -> float:
    """The share of pairs, by their definition, in which the image of the class has the higher answer."""
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[wanted == 1] for b in scores[wanted == 0]]
    return float(np.mean(pairs))


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, (40, 3)).astype(float)  # with equal ones
    wanted = generator.integers(0, 2, (40, 3)).astype(float)
    wanted[:7, 1] = np.nan  # unknown
    expected = [pairs_in_order(scores[:, label], wanted[:, label]) for label in range(3)]
    assert auroc(scores, wanted) == pytest.approx(np.mean(expected))
    assert label_auroc(torch.from_numpy(scores), torch.from_numpy(wanted)) == pytest.approx(np.mean(expected))
    assert auroc(scores[:, :1], np.ones((40, 1))) == 0
    labels = torch.tensor([0, 2] * 20)  # class 1 has no images, and no area
    logits = torch.from_numpy(generator.normal(size=(40, 3))).float()
    shares = logits.softmax(1).numpy()
    areas = [pairs_in_order(shares[:, label], (labels == label).numpy()) for label in (0, 2)]
    assert class_auroc(logits, labels) == pytest.approx(np.mean(areas))
