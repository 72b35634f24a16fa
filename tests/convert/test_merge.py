"""Sums of patches, TIES, DARE, and what two patches differ in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.convert import diff, merge
from modelpatch.convert.merging import add, change_of, elect
from modelpatch.errors import PatchError, WrongBackboneError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.tasks.record import TaskRecord

pytestmark = pytest.mark.slow


def pair(tiny: Backbone) -> tuple[Patch, Patch]:
    """Two patches that share some changed weights."""
    first, second = draft_patch(tiny, FullFinetune()), draft_patch(tiny, Subset(blocks=("stage2",)), seed=1)
    return first, replace(second, task=TaskRecord(name="other", classes=("x", "y", "class 0")))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    names = {name for name, tensor in {**one, **other}.items() if tensor.any()}
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in names)


def test_a_sum_adds_the_changes_times_their_weights(tiny: Backbone) -> None:
    first, second = pair(tiny)
    merged = merge(tiny, [first, second], weights=[0.5, 2])
    changes = [change_of(tiny, patch) for patch in (first, second)]
    both = "stage2.1.conv2.weight"
    assert torch.allclose(change_of(tiny, merged)[both], 0.5 * changes[0][both] + 2 * changes[1][both], atol=1e-6)
    alone = "stem.0.weight"
    assert alone not in changes[1]
    assert torch.allclose(change_of(tiny, merged)[alone], 0.5 * changes[0][alone], atol=1e-6)
    assert merged.task == first.task
    assert torch.equal(merged.tensors["head.weight"], first.tensors["head.weight"])


def test_one_patch_alone_stays_what_it_is_and_no_weight_gives_the_base(tiny: Backbone) -> None:
    first, _ = pair(tiny)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(tiny.patched(merge(tiny, [first]))(images), tiny.patched(first)(images), atol=1e-4)
    none = merge(tiny, [first], weights=[0])
    assert {name for name in none.tensors if not name.startswith("head.")} == set()


def test_strengths_count(tiny: Backbone) -> None:
    first, _ = pair(tiny)
    half = merge(tiny, [first.with_alpha(0.5)])
    assert same(change_of(tiny, half), {n: 0.5 * d for n, d in change_of(tiny, first).items()})
    assert half.strength == 1


def test_ties_keeps_the_largest_elects_signs_and_averages_what_agrees() -> None:
    one = {"w": torch.tensor([4.0, -3.0, 0.1, 0.2])}
    two = {"w": torch.tensor([2.0, 5.0, 0.1, -0.1])}
    # half of the numbers of each are kept: (4, -3, 0, 0) and (2, 5, 0, 0); signs of the sums: +, +
    assert elect([one, two], density=0.5)["w"].tolist() == [3.0, 5.0, 0.0, 0.0]


def test_dare_keeps_the_expected_change_and_follows_its_seed(tiny: Backbone) -> None:
    first, _ = pair(tiny)
    changes = change_of(tiny, first)
    name = max(changes, key=lambda one: changes[one].numel())
    runs = [change_of(tiny, merge(tiny, [first], rule="dare", drop=0.5, seed=seed))[name] for seed in range(200)]
    kept = torch.stack(runs) != 0
    assert abs(float(kept.float().mean()) - 0.5) < 0.02
    assert torch.allclose(torch.stack(runs).sum(0), 2 * changes[name] * kept.sum(0), atol=1e-4)
    again = change_of(tiny, merge(tiny, [first], rule="dare", drop=0.5, seed=3))[name]
    assert torch.equal(again, runs[3])
    assert not torch.equal(runs[3], runs[4])


def test_all_heads_stand_side_by_side(tiny: Backbone) -> None:
    first, second = pair(tiny)
    merged = merge(tiny, [first, second], head="all")
    assert merged.task.classes == ("draft: class 0", "class 1", "class 2", "x", "y", "other: class 0")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = tiny.patched(merged)(images)
        for rows, number in ((slice(0, 3), 0), (slice(3, 6), 1)):
            alone = tiny.patched(merge(tiny, [first, second], head=number))(images)
            assert torch.allclose(logits[:, rows], alone, atol=1e-5)


def test_a_merged_patch_is_saved_and_read_back(tiny: Backbone, tmp_path: object) -> None:
    merged = merge(tiny, pair(tiny), rule="ties", density=0.1)
    path = merged.save(f"{tmp_path}/merged.safetensors")
    again = Patch.load(path)
    assert again.content_hash == merged.content_hash
    assert again.method.hyperparameters["density"] == 0.1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rule": "max"}, "no rule 'max'"),
        ({"weights": [1]}, "1 weights are given for 2"),
        ({"rule": "ties", "density": 0}, "density is 0"),
        ({"rule": "dare", "drop": 1}, "share to drop is 1"),
        ({"head": 2}, "head is 2"),
        ({"head": "first"}, "head is 'first'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny: Backbone, options: dict[str, object], problem: str) -> None:
    with pytest.raises(PatchError, match=problem):
        merge(tiny, pair(tiny), **options)  # type: ignore[arg-type]


def test_what_cannot_be_added_up_is_refused(tiny: Backbone) -> None:
    with pytest.raises(PatchError, match="no patches were given"):
        merge(tiny, [])
    with pytest.raises(PatchError, match="adds modules"):
        merge(tiny, [draft_patch(tiny, DeltaNetwork())])
    with pytest.raises(WrongBackboneError):
        merge(make_tiny(seed=5), [draft_patch(tiny)])
    with pytest.raises(PatchError, match="the same classes"):
        merge(tiny, [draft_patch(tiny), draft_patch(tiny)], head="all")


def test_changes_of_other_names_are_zero_in_a_sum() -> None:
    assert {
        n: t.tolist() for n, t in add([{"a": torch.ones(2)}, {"b": torch.ones(1)}, {"a": torch.ones(2)}]).items()
    } == {
        "a": [2.0, 2.0],
        "b": [1.0],
    }


# diff -------------------------------------------------------------------------------------------------------------


def test_a_patch_does_not_differ_from_itself_whatever_it_stores(tiny: Backbone) -> None:
    for method in (FullFinetune(), Piggyback(), DeltaNetwork()):
        patch = draft_patch(tiny, method)
        difference = diff(tiny, patch, patch)
        assert difference.same
        assert difference.facts == ()
        assert all(row.cosine is None or abs(row.cosine - 1) < 1e-6 for row in difference.rows)


def test_half_of_a_change_lies_half_way_in_its_direction(tiny: Backbone) -> None:
    patch = draft_patch(tiny, ScaleBias())
    difference = diff(tiny, patch, patch.with_alpha(0.5))
    assert difference.total is not None
    assert difference.total.cosine == pytest.approx(1)
    assert difference.total.distance == pytest.approx(difference.total.first / 2, rel=1e-5)
    assert difference.facts == (("strength", "1", "0.5"),)
    assert not difference.same


def test_a_weight_that_one_patch_leaves_alone_is_at_its_own_change_s_distance(tiny: Backbone) -> None:
    first, second = pair(tiny)
    row = next(row for row in diff(tiny, first, second).rows if row.name == "stem.0.weight")
    assert row.second == 0
    assert row.cosine is None
    assert row.distance == row.first > 0
    assert ("task", "draft", "other") in diff(tiny, first, second).facts
