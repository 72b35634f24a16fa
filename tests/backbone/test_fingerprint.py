"""The fingerprint follows the frozen bytes: all of them, and nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from conftest import TinyNet, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.fingerprint import hash_tensors, hash_texts
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import BackboneChangedError


def test_the_same_numbers_give_the_same_fingerprint() -> None:
    assert make_tiny(0).fingerprints == make_tiny(0).fingerprints
    assert make_tiny(0).fingerprint != make_tiny(1).fingerprint


def test_each_tensor_moves_the_hash_of_its_own_segment_and_of_the_whole(tiny: Backbone) -> None:
    before = tiny.fingerprints
    for name in ("stage1.0.conv1.weight", "stage1.0.bn1.running_var", "stage1.0.bn1.num_batches_tracked"):
        moved = make_tiny()
        with torch.no_grad():
            tensor = dict(moved.chain.segment_of(name).named_tensors())[name]
            tensor.view(-1)[-1] += 1
        after = load_backbone(moved.module, preprocessing=moved.preprocessing).fingerprints
        index = tiny.chain.segment_of(name).index
        assert [i for i, pair in enumerate(zip(before.segments, after.segments, strict=True)) if len({*pair}) == 2] == [
            index
        ]
        assert before.chain != after.chain
        assert before.whole != after.whole
        assert before.head == after.head


def test_another_classifier_moves_the_head_and_the_whole_but_not_the_chain(tiny: Backbone) -> None:
    other = make_tiny()
    other.module.fc = nn.Linear(16, 9)
    after = load_backbone(other.module, preprocessing=other.preprocessing).fingerprints
    assert after.chain == tiny.fingerprints.chain
    assert after.head != tiny.fingerprints.head
    assert after.whole != tiny.fingerprints.whole


def test_the_hash_is_sha256_over_name_type_shape_and_little_endian_bytes() -> None:
    numbers = torch.tensor([[1.0, 2.0]])
    expected = b"w|float32|(1, 2)|" + bytes.fromhex("0000803f00000040")
    assert hash_tensors([("w", numbers)]) == hashlib.sha256(expected).hexdigest()
    assert hash_texts(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("a", torch.ones(2, 3)), ("b", torch.ones(2, 3))),
        (("a", torch.ones(2, 3)), ("a", torch.ones(3, 2))),
        (("a", torch.zeros(2)), ("a", torch.zeros(2, dtype=torch.int32))),
        (("a", torch.zeros(1)), ("a", -torch.zeros(1))),
    ],
    ids=["name", "shape", "type", "sign of zero"],
)
def test_whatever_tells_two_tensors_apart_tells_their_hashes_apart(
    first: tuple[str, Tensor], second: tuple[str, Tensor]
) -> None:
    assert hash_tensors([first]) != hash_tensors([second])


def test_order_and_memory_layout_do_not_matter() -> None:
    a, b = torch.randn(3, 4), torch.randn(2)
    assert hash_tensors([("a", a), ("b", b)]) == hash_tensors([("b", b), ("a", a)])
    assert hash_tensors([("a", a)]) == hash_tensors([("a", a.t().contiguous().t())])
    assert hash_tensors([("a", torch.zeros(0))]) == hashlib.sha256(b"a|float32|(0,)|").hexdigest()


def test_verify_passes_on_an_untouched_backbone_and_names_what_moved(tiny: Backbone) -> None:
    tiny.verify()
    with torch.no_grad():
        tiny.module.stage2[0].bn1.running_mean += 1
        tiny.module.fc.bias += 1
    with pytest.raises(BackboneChangedError, match=r"in: stage2\.0, head\."):
        tiny.verify()


def test_running_the_backbone_moves_nothing() -> None:
    backbone = load_backbone(TinyNet().train(), preprocessing=small_preprocessing())
    backbone(torch.randn(4, 3, 16, 16))
    backbone.verify()
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
