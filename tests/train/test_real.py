"""The methods on a real backbone and real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import load_task
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.train import fit

pytestmark = pytest.mark.slow

CLASSES = 6
MARGIN = 0.05  # a third of what was measured


@pytest.mark.real
def test_scale_and_bias_beat_a_linear_probe_on_traffic_signs(
    real_backbone: Backbone, real_data: Callable[[str], Path], tmp_path: Path
) -> None:
    signs = real_data("gtsrb")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for folder in sorted((signs / split).iterdir())[:CLASSES]:
            (tmp_path / split / folder.name).symlink_to(folder)
    data = load_task(tmp_path)
    settings = {"epochs": 4, "batch_size": 16, "image_size": 64, "views": 1}
    probe, patch = (fit(real_backbone, data, method, **settings) for method in (LinearProbe(), ScaleBias(lr=3e-3)))
    assert patch.metrics["test_top1"] > probe.metrics["test_top1"] + MARGIN
    real_backbone.verify()
