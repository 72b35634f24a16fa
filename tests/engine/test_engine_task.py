"""Several patches of one task: the call says which, by resolution or by time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.errors import EngineError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from tolerance import close


def at(patch: Patch, pixels: int) -> Patch:
    return replace(patch, preprocessing=patch.preprocessing.with_image_size(pixels))


@pytest.fixture
def sized(tiny: Backbone) -> dict[int, Patch]:
    """Three patches of one task with numbers of their own, at three resolutions."""
    return {
        pixels: at(draft_patch(tiny, ScaleBias(statistics="learned"), seed=pixels), pixels) for pixels in (16, 24, 32)
    }


@pytest.fixture
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), dtype=np.uint8))


@pytest.fixture
def engine(tiny: Backbone, sized: dict[int, Patch]) -> Engine:
    shuffled = [sized[24], sized[32], sized[16]]
    return Engine(tiny, {"signs": shuffled, "other": draft_patch(tiny, seed=9)}, tuning=Tuning())


def expected(tiny: Backbone, patch: Patch, pictures: list[np.ndarray]) -> Tensor:
    with torch.no_grad():
        return tiny.patched(patch)(patch.preprocessing(*pictures))


def test_the_patch_of_the_resolution_answers(
    tiny: Backbone, engine: Engine, sized: dict[int, Patch], pictures: Any
) -> None:
    for pixels, patch in sized.items():
        answers = engine(pictures, resolution=pixels)
        assert list(answers) == ["base", "signs", "other"]
        assert close(answers["signs"], expected(tiny, patch, pictures))
        torch.testing.assert_close(answers["other"], engine(pictures, only=["other"])["other"])
        rows = engine(pictures[:2], tasks=["signs", "signs"], resolution=pixels)
        torch.testing.assert_close(torch.stack(rows), answers["signs"][:2])
    assert engine.resolutions("signs") == (16, 24, 32)
    assert engine.resolutions("other") == (16,)


def test_without_a_wish_the_most_costly_answers(
    tiny: Backbone, engine: Engine, sized: dict[int, Patch], pictures: Any
) -> None:
    assert close(engine(pictures)["signs"], expected(tiny, sized[32], pictures))
    assert engine.preprocessing("signs") == sized[32].preprocessing
    (answers,) = engine.stream(pictures, only=["signs"])
    assert close(answers.logits["signs"], expected(tiny, sized[32], pictures))


def test_a_latency_picks_the_most_costly_that_is_fast_enough(
    tiny: Backbone, engine: Engine, sized: dict[int, Patch], pictures: Any
) -> None:
    times = engine.latencies("signs")
    assert len(times) == 3
    assert min(times) > 0
    assert engine.latencies("signs") == times  # measured once
    for limit in times:
        pixels = max(size for size, seconds in zip((16, 24, 32), times, strict=True) if seconds <= limit)
        answer = engine(pictures, only=["signs"], latency=limit)["signs"]
        assert close(answer, expected(tiny, sized[pixels], pictures))
    with pytest.raises(EngineError, match=r"no patch of signs answers within 1e-09 s here; the fastest takes"):
        engine(pictures, latency=1e-9)


def test_images_are_read_once_for_the_patch_that_answers(engine: Engine, pictures: Any) -> None:
    batches = engine.read(pictures, only=["signs"], resolution=24)
    assert [kind.image_size for kind in batches] == [24]
    assert close(engine(batches, only=["signs"], resolution=24)["signs"], engine(pictures, resolution=24)["signs"])


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ({"resolution": 20}, "signs has no patch for 20 px; it has: 16, 24, 32"),
        ({"resolution": 16, "latency": 1.0}, "give resolution or latency, not both"),
        ({"resolution": -1}, "resolution=-1; expected a number of pixels above 0"),
        ({"latency": 0}, "latency=0; expected a number of seconds above 0"),
        ({"latency": "fast"}, "latency='fast'; expected a number of seconds"),
        ({"only": ["other"], "resolution": 16}, "none of the tasks has several"),
    ],
)
def test_what_cannot_be_picked_is_refused(engine: Engine, pictures: Any, wish: dict[str, Any], problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        engine(pictures, **wish)


def test_patches_of_different_tasks_are_not_options(tiny: Backbone) -> None:
    with pytest.raises(EngineError, match="3 and 4 classes, which are not those of one task"):
        Engine(tiny, {"signs": [draft_patch(tiny), draft_patch(tiny, classes=4)]}, tuning=Tuning())
    with pytest.raises(EngineError, match="'signs' has no patches"):
        Engine(tiny, {"signs": []}, tuning=Tuning())


def test_files_are_options_too_and_all_leave_together(
    tiny: Backbone, sized: dict[int, Patch], pictures: Any, tmp_path: Path
) -> None:
    files = [patch.save(tmp_path / f"{pixels}.safetensors") for pixels, patch in sized.items()]
    engine = Engine(tiny, {"signs": files}, tuning=Tuning())
    assert close(engine(pictures, resolution=24)["signs"], expected(tiny, sized[24], pictures))
    assert engine.memory["patches"] > 0
    engine.pin("signs")
    engine.swap("signs", files[0])
    assert engine.resolutions("signs") == (16,)
    engine.remove("signs")
    assert engine.memory["patches"] == 0
    assert engine.residency._known == {}
