"""A cascade's file: what it says is what was written, and its patches are those it was made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.engine.cascade import MAX_BYTES, Cascade, CascadeRecord, Confidence, features
from modelpatch.errors import CascadeError, CascadeFileError, PatchFileError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch


@pytest.fixture
def pair(tiny: Backbone) -> tuple[Patch, Patch]:
    small, large = draft_patch(tiny, seed=1), draft_patch(tiny, ScaleBias(), seed=2)
    return small, replace(large, preprocessing=large.preprocessing.with_image_size(24))


@pytest.fixture
def cascade(pair: tuple[Patch, Patch]) -> Cascade:
    sure = Confidence(weights=(1.0, -0.25, 0.5), threshold=0.1 + 0.2)
    return Cascade(patches=pair, confidences=(sure, Confidence()), metrics={"test_top1": 0.5}, created={"seed": 3})


@pytest.fixture
def file(cascade: Cascade, tmp_path: Path) -> Path:
    return cascade.save(tmp_path / "signs.cascade.json")


def rewrite(file: Path, **changes: Any) -> None:
    """Change the file as somebody would who can make the hash anew."""
    told = json.loads(file.read_text()) | changes
    record = CascadeRecord.model_validate_json(json.dumps(told))
    file.write_text(json.dumps(told | {"sha256": record.digest()}))


# confidence -------------------------------------------------------------------------------------------------


def test_features_are_probability_entropy_and_gap() -> None:
    shares = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3] * 3], dtype=torch.float64)
    found = features(shares.log().clamp(min=-1e9))
    expected = [[0.5, 1.5 * torch.log(torch.tensor(2.0)), 0.25], [1, 0, 1], [1 / 3, torch.log(torch.tensor(3.0)), 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert features(torch.zeros(2, 1)).tolist() == [[1, 0, 1]] * 2  # one class: nothing to confuse


def test_a_patch_is_sure_from_its_threshold_on() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.1], [0.0, 5.0]])
    best = logits.softmax(1).amax(1).double()
    assert Confidence(threshold=float(Confidence().score(logits)[0])).sure(logits).tolist() == [True, False, True]
    torch.testing.assert_close(Confidence().score(logits), best, rtol=1e-6, atol=1e-6)
    assert Confidence().sure(logits).tolist() == [True] * 3


# the file ---------------------------------------------------------------------------------------------------


def test_a_cascade_is_read_as_it_was_written(cascade: Cascade, file: Path) -> None:
    again = Cascade.load(file)
    assert again.confidences == cascade.confidences
    assert (again.metrics, again.created, again.task) == (cascade.metrics, cascade.created, cascade.task)
    assert [patch.content_hash for patch in again.patches] == [patch.content_hash for patch in cascade.patches]
    assert file.stat().st_size < 5000
    assert {path.name for path in file.parent.iterdir()} == {
        "signs.cascade.json",
        "signs.cascade-stage1.safetensors",
        "signs.cascade-stage2.safetensors",
    }


def test_files_of_patches_that_are_there_are_named(cascade: Cascade, pair: tuple[Patch, Patch], tmp_path: Path) -> None:
    files = [patch.save(tmp_path / f"{name}.safetensors") for name, patch in zip("ab", pair, strict=True)]
    cascade.save(tmp_path / "c.json", files)
    assert [stage["file"] for stage in json.loads((tmp_path / "c.json").read_text())["stages"]] == [
        "a.safetensors",
        "b.safetensors",
    ]
    (tmp_path / "other").mkdir()
    with pytest.raises(CascadeError, match="does not lie beside"):
        cascade.save(tmp_path / "other" / "c.json", files)
    with pytest.raises(CascadeError, match=r"expected a name that ends in \.json"):
        cascade.save(tmp_path / "c.safetensors", files)


def test_whatever_is_changed_in_the_file_is_found(file: Path) -> None:
    """Every digit and letter of it, but for the spelling of one and the same value."""
    data = file.read_bytes()
    said = json.loads(data)
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        try:
            Cascade.load(file)
        except CascadeFileError:
            continue
        assert json.loads(bytes(changed)) == said, place


@pytest.mark.parametrize("change", ["numbers", "resolution", "classes", "gone"])
def test_another_patch_in_its_place_is_found(
    file: Path, pair: tuple[Patch, Patch], tiny: Backbone, change: str
) -> None:
    first, place = pair[0], file.with_name("signs.cascade-stage1.safetensors")
    if change == "gone":
        place.unlink()
        with pytest.raises(PatchFileError, match="cannot be read"):
            Cascade.load(file)
        return
    other = {
        "numbers": draft_patch(tiny, seed=7),
        "resolution": replace(first, preprocessing=first.preprocessing.with_image_size(20)),
        "classes": replace(first, task=first.task.model_copy(update={"classes": ("x", "y", "z")})),
    }[change]
    assert change == "numbers" or other.content_hash == first.content_hash
    other.save(place)
    with pytest.raises(CascadeFileError, match=r"signs\.cascade-stage1\.safetensors is not the patch"):
        Cascade.load(file)


@pytest.mark.parametrize("name", ["../signs.cascade-stage1.safetensors", "/etc/passwd", "a\\b", "", "..", "a\x1b[31m"])
def test_a_file_cannot_name_others_elsewhere(file: Path, name: str) -> None:
    told = json.loads(file.read_text())
    told["stages"][0]["file"] = name
    file.write_text(json.dumps(told))
    with pytest.raises(CascadeFileError, match="is no cascade"):
        Cascade.load(file)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "null", '{"kind": "modelpatch cascade"}', "[" * 100_000, "\x80", '{"a": NaN}']
)
def test_what_is_no_cascade_is_refused(file: Path, text: str) -> None:
    file.write_text(text, encoding="latin-1")
    with pytest.raises(CascadeFileError, match="is no cascade"):
        Cascade.load(file)


def test_numbers_that_are_none_are_refused(file: Path) -> None:
    text = file.read_text()
    for number in ("NaN", "Infinity", "1e999"):
        file.write_text(text.replace('"test_top1": 0.5', f'"test_top1": {number}'))
        with pytest.raises(CascadeFileError):
            Cascade.load(file)
        file.write_text(text.replace("-0.25", number))
        with pytest.raises(CascadeFileError, match="is no cascade"):
            Cascade.load(file)


def test_a_large_or_missing_file_is_not_read(file: Path) -> None:
    file.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(CascadeFileError, match=r"has more than .* no cascade is that large"):
        Cascade.load(file)
    with pytest.raises(CascadeFileError, match="cannot be read"):
        Cascade.load(file.with_name("missing.json"))


def test_thresholds_that_make_no_cascade_are_refused_in_files_too(file: Path) -> None:
    stages = json.loads(file.read_text())["stages"]
    rewrite(file, stages=stages[:1])
    with pytest.raises(CascadeFileError, match="every stage but the last needs a threshold"):
        Cascade.load(file)
    rewrite(file, stages=stages[::-1])
    with pytest.raises(CascadeFileError, match="every stage but the last needs a threshold"):
        Cascade.load(file)


# what cannot be a cascade -----------------------------------------------------------------------------------


def test_patches_of_several_tasks_or_backbones_make_none(pair: tuple[Patch, Patch]) -> None:
    sure = (Confidence(threshold=0.5), Confidence())
    with pytest.raises(CascadeError, match="are different tasks; a cascade is of one"):
        Cascade(patches=(pair[0], draft_patch(make_tiny(), classes=4)), confidences=sure)
    with pytest.raises(CascadeError, match="belong to different backbones"):
        Cascade(patches=(pair[0], draft_patch(make_tiny(1))), confidences=sure)


def test_every_stage_needs_its_confidence(pair: tuple[Patch, Patch]) -> None:
    with pytest.raises(CascadeError, match="2 patches with 1 confidences"):
        Cascade(patches=pair, confidences=(Confidence(),))
    with pytest.raises(CascadeError, match="every stage but the last needs a threshold"):
        Cascade(patches=pair, confidences=(Confidence(), Confidence()))
    with pytest.raises(CascadeError, match="0 patches"):
        Cascade(patches=(), confidences=())


def test_what_json_cannot_hold_is_refused_before_writing(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="cannot be written as JSON"):
        cascade.with_metrics(test_top1=float("nan")).save(tmp_path / "c.json")
