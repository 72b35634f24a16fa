"""Learning curves are read from a run's log and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from conftest import Run
from modelpatch.report.plots import plot_history, read_history

pytestmark = pytest.mark.slow


def test_a_log_is_read_as_numbers_and_drawn(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,loss,validation_loss,validation_top1,lr,note\n1,2.0,2.1,0.3,0.01,warm\n2,1.0,,0.6,0.005,\n")
    rows = read_history(log)
    assert rows[0] == {"epoch": 1, "loss": 2, "validation_loss": 2.1, "validation_top1": 0.3, "lr": 0.01}
    assert rows[1] == {"epoch": 2, "loss": 1, "validation_top1": 0.6, "lr": 0.005}
    plot_history(rows, "colors", tmp_path / "three.png")
    plot_history([{"epoch": 1, "loss": 1.0}], "colors", tmp_path / "one.png")
    with Image.open(tmp_path / "three.png") as three, Image.open(tmp_path / "one.png") as one:
        assert three.width > 2 * one.width
    assert read_history(tmp_path / "missing.csv") == []


def test_fit_draws_the_curves_of_its_log_and_ends_with_what_matters(run: Run, folder: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "colors.safetensors", tmp_path / "log"
    result = run("fit", folder, "-o", out, "--log", log, "--epochs", 2, "-m", "linear-probe(solver=steps)")
    assert result.code == 0
    assert (log / "curves.png").stat().st_size > 0
    assert len(read_history(log / "metrics.csv")) == 2
    lines = result.out.splitlines()
    assert len(lines) < 12
    assert any("test top-1" in line and "images" in line for line in lines)
    assert any(f"{out.stat().st_size:,} bytes" in line for line in lines[-3:])
    assert str(out.with_suffix(".run.yaml")) in lines[-1]
    again = run("fit", "--config", out.with_suffix(".run.yaml"), "--force", "-q")
    assert (again.code, again.out, again.err) == (0, "", "")
