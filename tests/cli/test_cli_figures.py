"""Intervals, scores of classes and confusion matrices that `fit`, `eval` and `compare` print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Run

pytestmark = pytest.mark.slow


def test_eval_prints_interval_scores_and_counts(
    folder: Path, patches: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    done = run("eval", folder, "-p", patches["linear-probe"], "--per-class", "--confusion", "--json", figures)
    assert done.code == 0, done.err
    for word in ("95 % interval", "macro F1", "balanced accuracy", "precision", "recall", "class by answer"):
        assert word in done.out
    found = json.loads(figures.read_text())
    low, high = found["interval"]
    assert low <= found["top1"] <= high
    assert [one["name"] for one in found["by_class"]] == ["blue", "green", "red"]
    assert sum(one["asked"] for one in found["by_class"]) == found["images"]
    plain = run("eval", folder, "-p", patches["linear-probe"])
    assert "95 % interval" in plain.out
    assert "precision" not in plain.out


def test_eval_keeps_the_figures_of_a_kind_without_a_confusion_matrix(folder: Path, run: Run, tmp_path: Path) -> None:
    data, patch, figures = tmp_path / "numbers.csv", tmp_path / "numbers.safetensors", tmp_path / "figures.json"
    files = [(file, split) for split in ("train", "test") for file in sorted(folder.glob(f"{split}/*/*.png"))]
    rows = [f"{file},{number / 2},{split}" for number, (file, split) in enumerate(files)]
    data.write_text("\n".join(["image,label,split", *rows]))
    trained = run("fit", data, "--kind", "regression", "-m", "linear-probe", "--epochs", "1", "-o", patch)
    assert trained.code == 0, trained.err
    for option in (["--confusion"], ["--plot", tmp_path / "matrix.png"]):
        refused = run("eval", data, "-p", patch, *option, "--json", figures)
        assert "regression tasks have no confusion matrix" in refused.err
        assert "MAE" in refused.out
        assert "r2" in json.loads(figures.read_text())
        figures.unlink()


def test_fit_ends_with_the_interval(folder: Path, run: Run, tmp_path: Path) -> None:
    done = run("fit", folder, "-m", "linear-probe", "--epochs", "1", "-o", tmp_path / "colors.safetensors")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("test top-1")]
    assert " to " in line
    assert line.endswith("of 12 images")
    assert "test macro F1" in done.out
    shown = run("inspect", tmp_path / "colors.safetensors")
    assert "_low" not in shown.out
    assert "test balanced" in shown.out


def test_compare_has_an_interval_a_method(folder: Path, run: Run, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = run("compare", folder, "--methods", "linear-probe", "--epochs", "1", "--json", figures)
    assert done.code == 0, done.err
    (row,) = json.loads(figures.read_text())["rows"]
    low, high = row["interval"]
    assert low <= row["top1"] <= high
    assert 0 <= row["macro_f1"] <= 1
    assert f"{100 * low:.1f} to {100 * high:.1f}" in done.out
