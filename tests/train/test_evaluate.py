"""Accuracies against scikit-learn and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import CLASSES, Library, color_task, draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.errors import DataError
from modelpatch.methods.subset import Subset
from modelpatch.tasks.classification import Evaluation
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import evaluate, fit
from modelpatch.train.evaluation import evaluate_base, harmonic_mean, store_as

NAMES = tuple("abcdefg")
metrics = Library("sklearn.metrics")


def test_figures_agree_with_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 7))
    labels = generator.integers(0, 7, 200)
    result = Evaluation.of(torch.from_numpy(logits), torch.from_numpy(labels), NAMES)
    answers = logits.argmax(1)
    assert result.top1 == pytest.approx(metrics.accuracy_score(labels, answers))
    assert result.top5 == pytest.approx(metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert list(result.per_class.values()) == pytest.approx(metrics.recall_score(labels, answers, average=None))
    assert result.confusion == metrics.confusion_matrix(labels, answers).tolist()
    assert result.images == 200


def test_a_class_without_images_has_no_accuracy() -> None:
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2]])
    result = Evaluation.of(logits, torch.tensor([0, 0]), ("a", "b", "c"))
    assert result.per_class == {"a": 0.5}
    assert result.confusion == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert result.top5 == 1  # of three classes the best five are all
    assert result.as_dict()["top1"] == 0.5


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_harmonic_mean_lies_between_the_smaller_and_the_plain_mean(a: float, b: float) -> None:
    mean = harmonic_mean(a, b)
    assert mean == harmonic_mean(b, a)
    assert min(a, b) - 1e-12 <= mean <= (a + b) / 2 + 1e-12


def test_the_harmonic_mean_is_zero_if_either_is() -> None:
    assert harmonic_mean(0, 0) == harmonic_mean(0, 1) == 0
    assert harmonic_mean(0.5, 1) == pytest.approx(2 / 3)


def test_a_patch_is_measured_on_the_test_images_of_its_task(tiny: Backbone) -> None:
    data = color_task()
    patch = replace(draft_patch(tiny), task=data.task)
    logits = tiny.patched(patch)(patch.preprocessing(*data.test.images))
    counts: list[int] = []
    result = evaluate(tiny, patch, data, counts.append)
    assert result == Evaluation.of(logits, torch.from_numpy(data.test.labels), CLASSES)
    assert sum(counts) == len(data.test)


def test_a_patch_is_not_measured_on_other_classes(tiny: Backbone) -> None:
    with pytest.raises(DataError, match=r"colors has 3 classes \(red.*the patch answers 3 \(class 0"):
        evaluate(tiny, draft_patch(tiny), color_task())


def base_data(classes: tuple[str, ...]) -> Task:
    """Test images of `classes`, two of each."""
    images = list(np.random.default_rng(0).integers(0, 255, (2 * len(classes), 16, 16, 3), dtype=np.uint8))
    split = Split(images, np.repeat(np.arange(len(classes)), 2))
    return Task(TaskRecord(name="base", classes=classes), split, split)


def test_the_base_is_measured_on_classes_matched_by_name(tiny: Backbone) -> None:
    named = load_backbone(tiny.module, preprocessing=tiny.preprocessing)
    named.classes = NAMES[:5]
    data = base_data(("d", "b"))
    answers = named(named.preprocessing(*data.test.images)).argmax(1)
    expected = (answers == torch.tensor([3, 3, 1, 1])).double().mean().item()
    assert evaluate_base(named, data).top1 == expected


def test_the_base_is_measured_on_classes_matched_by_position_where_it_names_none(tiny: Backbone) -> None:
    data = base_data(NAMES[:5])
    answers = tiny(tiny.preprocessing(*data.test.images)).argmax(1)
    assert evaluate_base(tiny, data).top1 == (answers == torch.from_numpy(data.test.labels)).double().mean().item()


def test_digits_are_not_scored_as_the_classes_that_a_base_names(tiny: Backbone) -> None:
    named = load_backbone(tiny.module, preprocessing=tiny.preprocessing)
    named.classes = NAMES[:5]
    with pytest.raises(DataError, match=r"named a, b, c, \.\.\.; base has 5 classes \(0, 1, 2"):
        evaluate_base(named, base_data(tuple("01234")))


def test_wordnet_ids_are_matched_to_a_base_with_the_outputs_of_imagenet() -> None:
    base = make_tiny(outputs=1000)
    data = base_data(("n01440764", "n01484850"))  # tench and great white shark: outputs 0 and 2
    answers = base(base.preprocessing(*data.test.images)).argmax(1)
    expected = (answers == torch.tensor([0, 0, 2, 2])).double().mean().item()
    assert evaluate_base(base, data).top1 == expected
    with pytest.raises(DataError, match="1000 outputs; base has 2 classes"):
        evaluate_base(base, base_data(("n01440764", "cat")))


def test_classes_that_cannot_be_matched_to_the_base_are_an_error(tiny: Backbone) -> None:
    with pytest.raises(DataError, match=r"the base has 5 outputs; base has 4 classes \(a, b, c.* cannot be matched"):
        evaluate_base(tiny, base_data(NAMES[:4]))


def test_a_patch_stored_smaller_is_measured_again(tiny: Backbone, colors: Task) -> None:
    patch = fit(tiny, colors, Subset(), epochs=1)
    stored = store_as(tiny, patch, colors, "int8")
    assert stored.metrics["float32_top1"] == patch.metrics["test_top1"]
    assert stored.metrics["test_top1"] == evaluate(tiny, stored, colors).top1
    assert stored.inspect().file_bytes < patch.inspect().file_bytes
