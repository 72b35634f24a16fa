"""Notebooks run from top to bottom, and what they say of their figures is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(path: Path) -> dict[str, Any]:
    """The names that the notebook's code cells leave, run one after another."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    return names


def test_the_folding_notebook_counts_regions_and_shows_that_scale_and_bias_learn_what_a_last_layer_cannot() -> None:
    """The counts are exact: 4, 3, 2, 1 and 0 intervals at b0 = 0, -0.075, -0.125, -0.425 and -0.5."""
    names = execute(NOTEBOOKS / "folding.ipynb")
    assert names["components"] == [4, 3, 2, 1, 0]
    results = names["results"]
    assert results[2, "base"] > 0.9
    assert results[2, "scale and bias"] > results[2, "last layer"] + 0.1
    for bias, intervals in names[
        "found"
    ].items():  # every end is mapped to an end of [1/5, 2/5], or is where a fold turns
        for start, end in intervals:
            middle = names["q"](names["q"]((start + end) / 2, bias))
            assert names["Fraction"](1, 5) <= middle <= names["Fraction"](2, 5)


def test_the_notebook_of_one_pass_answers_three_kinds_of_questions_as_the_patches_alone_do() -> None:
    pytest.importorskip("pycocotools")
    pytest.importorskip("torchmetrics")
    names = execute(NOTEBOOKS / "one_pass.ipynb")
    assert all(figure > 0.7 for figure in names["figures"].values())
    plan = names["engine"].plan_for(4, only=list(names["patches"]))
    assert plan.flops < 0.5 * plan.separate_flops
    for name, patch in names["patches"].items():
        images = patch.preprocessing(*names["shown"])
        alone = names["backbone"].patched(patch)(images)
        if name == "cars":  # equal boxes may change places
            assert names["answers"][name][:, :, 4].sum() == pytest.approx(float(alone[:, :, 4].sum()), rel=1e-3)
        else:
            torch.testing.assert_close(names["answers"][name], alone, rtol=1e-4, atol=1e-4)


def test_notebooks_are_stored_without_what_they_printed() -> None:
    found = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert found
    for path in found:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
