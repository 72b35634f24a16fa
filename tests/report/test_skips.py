"""What the skips of a Δ-Network weigh, measured over a task's images, in a table and in a picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.images import ImageStore
from modelpatch.data.task import Task
from modelpatch.errors import MethodError
from modelpatch.methods.delta import DeltaNetwork, SkipWeights, skip_weights
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.report.measures import measure_skips, plot_skip_weights, skips_table, stage_names, variances_table

pytestmark = pytest.mark.slow


@pytest.fixture
def records(tiny: Backbone, colors: Task) -> list[SkipWeights]:
    return measure_skips(tiny, draft_patch(tiny, DeltaNetwork(modules=2)), colors.test)


def test_weights_are_measured_on_every_image(tiny: Backbone, colors: Task, records: list[SkipWeights]) -> None:
    patch = draft_patch(tiny, DeltaNetwork(modules=2))
    images = ImageStore(colors.test, patch.preprocessing, 2**20).plain(torch.arange(len(colors.test)))
    expected = skip_weights(tiny.patched(patch), images)
    assert [record.span for record in records] == [record.span for record in expected]
    for record, other in zip(records, expected, strict=True):
        assert record.weights.shape == (len(colors.test), 3)
        torch.testing.assert_close(record.weights, other.weights)
        assert record.variances == pytest.approx(other.variances, rel=1e-4)
        assert len(record.variances) == 2


def test_records_of_batches_join_to_that_of_all_images(tiny: Backbone) -> None:
    model, images = tiny.patched(draft_patch(tiny, DeltaNetwork(modules=2))), torch.randn(7, 3, 16, 16)
    images[:2] *= 3
    parts = zip(*(skip_weights(model, batch) for batch in images.split([2, 5])), strict=True)
    for joined, whole in zip(map(SkipWeights.join, parts), skip_weights(model, images), strict=True):
        torch.testing.assert_close(joined.weights, whole.weights)
        torch.testing.assert_close(joined.moments, whole.moments, rtol=1e-4, atol=1e-5)


def test_a_patch_without_weighed_skips_is_refused(tiny: Backbone, colors: Task) -> None:
    with pytest.raises(MethodError, match="made by scale-bias, which weighs no skips"):
        measure_skips(tiny, draft_patch(tiny, ScaleBias()), colors.test)


def test_the_table_names_stages_and_shows_mean_and_deviation(tiny: Backbone, records: list[SkipWeights]) -> None:
    names = stage_names(tiny, records)
    assert names == ["stage1.0 to stage1.1", "stage2.0 to stage2.1"]
    console = Console(file=io.StringIO(), width=200)
    console.print(skips_table(records, names))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for record in records:
        for edge in record.as_dict()["edges"]:
            assert f"{edge['from']} → {edge['to']}" in text
            assert f"{edge['mean']:.3f}" in text
            assert f"{edge['deviation']:.3f}" in text


def test_a_table_shows_the_variance_of_every_node_and_its_growth(tiny: Backbone, records: list[SkipWeights]) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(variances_table(records, stage_names(tiny, records)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for record in records:
        first, second = record.as_dict()["variances"]
        for figure in (f"{first:.3g}", f"{second:.3g}", f"{second / first:.2f}"):
            assert figure in text


@pytest.mark.parametrize("stages", [1, 2])
def test_weights_are_drawn_for_every_stage(
    tiny: Backbone, records: list[SkipWeights], tmp_path: Path, stages: int
) -> None:
    path = tmp_path / "skips.png"
    plot_skip_weights(records[:stages], stage_names(tiny, records[:stages]), "colors", path)
    with Image.open(path) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_a_stage_of_many_skips_is_drawn_without_labels(tmp_path: Path) -> None:
    edges = tuple((i, 25) for i in range(300))
    record = SkipWeights((0, 1), edges, (True,) * 300, torch.rand(8, 300))
    plot_skip_weights([record], ["dense"], "many", tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as image:
        assert image.width < 130 * 24 + 1
