"""Every tensor of a patch is read back value for value, whatever its file stores."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from conftest import draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MissingExtraError, PatchError
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.subset import Subset
from modelpatch.patch import entropy
from modelpatch.patch.codec import (
    LEAST_NUMBERS,
    Codec,
    channel_scale,
    most_numbers,
    pack,
    snap_int8,
    snap_signs,
    snap_sizes,
    unpack,
)
from modelpatch.patch.contents import Patch, decode_patch, encode_patch


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 5)), *draw(st.lists(st.integers(0, 7), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    values = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["float32", "float16", "bfloat16", "bool", "ternary", "int32"]))
    if kind == "bool":
        return values < draw(st.floats(-3, 3))
    if kind == "ternary":
        return (values * 2).round().clamp(-1, 1).to(torch.int8)
    return values.to(getattr(torch, kind))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name])


@settings(deadline=None, max_examples=80)
@given(
    st.dictionaries(st.sampled_from(["mask/a", "replace/b", "head.c", "delta/d.e"]), tensors(), max_size=4),
    st.booleans(),
)
def test_packed_tensors_come_back(given: dict[str, Tensor], compress: bool) -> None:
    stored, codecs = pack(given, compress=compress)
    assert_same(unpack(stored, codecs), given)


def test_a_binary_mask_takes_a_bit_a_weight_and_a_ternary_one_two() -> None:
    binary, ternary = torch.rand(64, 64) < 0.5, torch.randint(-1, 2, (64, 64), dtype=torch.int8)
    stored, codecs = pack({"mask/b": binary, "mask/t": ternary}, compress=False)
    assert stored["mask/b"].nbytes == 64 * 64 / 8
    assert stored["mask/t"].nbytes == 2 * 64 * 64 / 8
    assert codecs == {"mask/b": "bits:64x64", "mask/t": "trits:64x64"}


@pytest.mark.parametrize(("ternary", "bits"), [(False, 1), (True, 2)])
def test_a_packed_mask_costs_its_bits_beside_the_32_of_a_weight(
    tiny: Backbone, tmp_path: Path, ternary: bool, bits: int
) -> None:
    """A task costs 1/32 of the float32 weights it masks (Piggyback, section 4), and `inspect` says so."""
    patch = draft_patch(tiny, Piggyback(ternary=ternary))
    generator = torch.Generator().manual_seed(0)
    masks = {  # bits that no code makes smaller; kept and masked, and for ternary ones the signs, are as likely
        name: torch.rand(tensor.shape, generator=generator) < 0.5
        if not ternary
        else torch.tensor([-1, 0, 0, 1], dtype=torch.int8)[torch.randint(4, tensor.shape, generator=generator)]
        for name, tensor in patch.tensors.items()
        if name.startswith("mask/")
    }
    patch = replace(patch, tensors={**patch.tensors, **masks})
    weights = [tiny.chain.tensor(name.removeprefix("mask/")) for name in masks]
    assert all(weight.dtype == torch.float32 and weight.numel() % 8 == 0 for weight in weights)
    float_bytes = sum(weight.nbytes for weight in weights)
    with safe_open(patch.save(tmp_path / "packed.safetensors", compress=False), "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in masks)
    assert stored == float_bytes * bits / 32
    figures = patch.inspect().masks
    assert figures is not None
    if not ternary:  # of a ternary weight's two bits the sign is needed only where it is kept
        assert figures.bits_per_weight == 8 * stored / figures.weights == bits
    assert figures.bound <= figures.bits_per_weight <= bits


def test_a_sparse_difference_takes_a_bit_a_weight_and_its_values() -> None:
    delta = torch.randn(40, 40) * (torch.rand(40, 40) < 0.1)
    stored, codecs = pack({"delta/x": delta}, compress=False)
    assert sum(tensor.nbytes for tensor in stored.values()) == 200 + 4 * int(delta.count_nonzero())
    assert_same(unpack(stored, codecs), {"delta/x": delta})


def test_sparse_masks_are_smaller_when_coded_and_small_ones_are_left_alone() -> None:
    mask = torch.rand(256, 512) < 0.95
    assert pack({"mask/a": mask})[1]["mask/a"] == "entropy-bits:256x512"
    assert pack({"mask/a": mask[:4, :8]})[1]["mask/a"] == "bits:4x8"


# signs ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 9), st.booleans())
def test_signs_with_a_size_a_channel_come_back(seed: int, channels: int, numbers: int, empty: bool) -> None:
    delta = torch.randn(channels, numbers, generator=torch.Generator().manual_seed(seed))
    if empty:
        delta[seed % channels] = 0
    snapped = snap_signs(delta)
    assert torch.allclose(snap_signs(snapped), snapped)
    stored, codecs = pack({"delta/w": snapped})
    back = unpack(stored, codecs)["delta/w"]
    assert torch.equal(back.view(torch.int32), snapped.view(torch.int32))
    if snapped.any():
        assert codecs["delta/w"] == f"signs:{channels}x{numbers}"
        assert stored["delta/w"].nbytes == -(-channels * numbers // 8)
        assert stored["scale/delta/w"].shape == (channels,)


def test_no_other_sizes_have_a_smaller_squared_error_than_the_mean() -> None:
    delta = torch.randn(4, 50)
    best = (snap_signs(delta) - delta).square().sum(1)
    for factor in (0.9, 1.1):
        assert ((snap_signs(delta) * factor - delta).square().sum(1) > best).all()


def test_only_differences_of_one_size_a_channel_are_stored_as_signs() -> None:
    snapped = snap_signs(torch.randn(3, 4))
    other = snapped.clone()
    other[1, 2] *= 1.5
    third = other.clone()
    third[1, 3] *= 2
    few = torch.zeros(3, 40)
    few[:, 0] = 2.0  # two sizes, of which nearly all numbers have 0
    changes = {"delta/a": snapped, "delta/c": third, "delta/d": snapped[:, 0], "delta/e": other, "delta/g": few}
    changes["delta/f"] = other[:, 1:3]
    assert pack({**changes, "replace/b": snapped})[1] == {
        "delta/a": "signs:3x4",
        "replace/b": "float32",
        "delta/c": "float32",
        "delta/d": "float32",
        "delta/e": "sizes:3x4",
        "delta/g": "sparse:3x40",
        "delta/f": "float32",  # two numbers always have two sizes
    }


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(4, 40), st.booleans())
def test_two_sizes_a_channel_come_back_in_two_bits_a_number(
    seed: int, channels: int, numbers: int, empty: bool
) -> None:
    delta = torch.randn(channels, numbers, generator=torch.Generator().manual_seed(seed))
    if empty and channels > 1:
        delta[seed % channels] = 0
    snapped = snap_sizes(delta)
    stored, codecs = pack({"delta/w": snapped})
    back = unpack(stored, codecs)["delta/w"]
    assert codecs["delta/w"] == f"sizes:{channels}x{numbers}"
    assert torch.equal(back.view(torch.int32), snapped.view(torch.int32))
    assert stored["delta/w"].nbytes == 2 * -(-channels * numbers // 8)
    assert (snapped - delta).square().sum() <= (snap_signs(delta) - delta).square().sum()


def test_the_two_sizes_of_a_normal_distribution_are_those_of_its_best_quantiser() -> None:
    normal = torch.distributions.Normal(0, 1).icdf(torch.linspace(0, 1, 40_003)[1:-1])
    low, high = snap_sizes(normal.view(1, -1)).abs().unique().tolist()
    assert (low, high) == (pytest.approx(0.4528, abs=2e-3), pytest.approx(1.510, abs=2e-3))  # Max (1960), table I


@pytest.mark.parametrize(
    ("codec", "change", "problem"),
    [
        ("signs:3x4", {"scale/delta/a": torch.ones(4)}, "has scales"),
        ("signs:3x4", {"scale/delta/a": -torch.ones(3)}, "below 0"),
        ("signs:3x40", {}, "does not hold"),
        ("signs:12", {}, "no channels"),
        ("entropy-signs:3x4", {}, "no codec"),
        ("signs", {}, "no codec"),
    ],
)
def test_signs_that_do_not_fit_are_refused(codec: str, change: dict[str, Tensor], problem: str) -> None:
    stored, _ = pack({"delta/a": snap_signs(torch.randn(3, 4))})
    with pytest.raises(ValueError, match=problem):
        unpack({**stored, **change}, {"delta/a": codec})


@pytest.mark.parametrize(
    ("codec", "change", "problem"),
    [
        ("sizes:3x4", {"scale/delta/a": torch.ones(3)}, "has scales"),
        ("sizes:3x4", {"scale/delta/a": torch.tensor([[2.0, 1.0]] * 3)}, "in order"),
        ("sizes:3x4", {"scale/delta/a": torch.tensor([[-1.0, 1.0]] * 3)}, "below 0"),
        ("signs:3x4", {}, "does not hold"),
        ("sizes:12", {}, "no channels"),
        ("entropy-sizes:3x4", {}, "no codec"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(codec: str, change: dict[str, Tensor], problem: str) -> None:
    stored, _ = pack({"delta/a": snap_sizes(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))})
    with pytest.raises(ValueError, match=problem):
        unpack({**stored, **change}, {"delta/a": codec})


# int8 -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.floats(-30, 30))
def test_integers_with_a_scale_a_channel_are_a_fixed_point(seed: int, exponent: float) -> None:
    tensor = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    tensor[seed % 6] = 0
    snapped = snap_int8(tensor)
    assert torch.equal(snap_int8(snapped), snapped)
    stored, codecs = pack({"replace/w": snapped}, int8={"replace/w"})
    assert stored["replace/w"].dtype == torch.int8
    assert_same(unpack(stored, codecs), {"replace/w": snapped})
    step = channel_scale(tensor).view(-1, 1, 1)
    assert ((snapped - tensor).abs() <= 0.5001 * step).all()
    assert (step[tensor.flatten(1).abs().amax(1) > 0] <= tensor.abs().max() / 127 * (1 + 2**-15)).all()


def test_a_patch_in_integers_is_read_back_and_written_again_the_same(tiny: Backbone) -> None:
    patch = draft_patch(tiny, Subset(blocks=("stage2",))).astype("int8")
    data = encode_patch(patch)
    again = decode_patch(data)
    assert again.int8 == patch.int8
    assert "head.weight" in again.int8
    assert again.content_hash == patch.content_hash
    assert encode_patch(again) == data
    full = draft_patch(tiny, Subset(blocks=("stage2",)))
    assert patch.inspect().tensor_bytes < 0.5 * full.inspect().tensor_bytes
    assert encode_patch(patch.astype("float32")) != data


# files ------------------------------------------------------------------------------------------------------


def masked(tiny: Backbone, ternary: bool = False) -> Patch:
    """A patch with random masks, large enough to be worth coding."""
    patch = draft_patch(tiny, Piggyback(ternary=ternary))
    generator = torch.Generator().manual_seed(0)
    masks = {n: t for n, t in patch.tensors.items() if n.startswith("mask/")}
    sparse = {n: torch.rand(t.shape, generator=generator) < 0.97 for n, t in masks.items()}
    big = {n: t.to(torch.int8) if ternary else t for n, t in sparse.items()}
    return replace(
        patch, tensors={**patch.tensors, **big, "mask/other": torch.rand(300, 300, generator=generator) < 0.97}
    )


@pytest.mark.parametrize("ternary", [False, True])
def test_coded_and_packed_files_hold_the_same_patch(tiny: Backbone, ternary: bool, tmp_path: Path) -> None:
    patch = masked(tiny, ternary)
    coded, packed = patch.save(tmp_path / "coded"), patch.save(tmp_path / "packed", compress=False)
    assert coded.stat().st_size < packed.stat().st_size
    assert_same(dict(Patch.load(coded).tensors), dict(patch.tensors))
    assert Patch.load(coded).content_hash == Patch.load(packed).content_hash == patch.content_hash


def test_without_constriction_masks_are_packed_and_coded_ones_are_refused_by_the_extras_name(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = masked(tiny)
    coded = encode_patch(patch)
    monkeypatch.setitem(sys.modules, "constriction", None)
    packed = encode_patch(patch)
    assert packed == encode_patch(patch, compress=False)
    assert decode_patch(packed).content_hash == patch.content_hash
    with pytest.raises(MissingExtraError, match=r"constriction.*modelpatch\[compress\]"):
        decode_patch(coded)


@pytest.mark.parametrize(
    ("codec", "problem"),
    [
        ("bits", "no codec"),
        ("bits:4x", "no codec"),
        ("pickle", "no codec"),
        ("bits:4x9", "does not hold"),
        ("trits:4x8", "does not hold"),
        ("int8", "expected torch.int8"),
        ("float32", "expected torch.float32"),
        ("entropy-bits:4x8", "masks is missing"),
        ("sparse:4x8", "bits/mask/a is missing"),
        ("bits:999999999x999999999", "at most"),
    ],
)
def test_a_codec_that_does_not_fit_its_tensor_is_refused(codec: str, problem: str) -> None:
    stored, _ = pack({"mask/a": torch.rand(4, 8) < 0.5}, compress=False)
    with pytest.raises(ValueError, match=problem):
        unpack(stored, {"mask/a": codec})


def test_masks_of_more_numbers_than_are_allowed_are_refused_before_they_are_unfolded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored, codecs = pack(
        {"mask/a": torch.ones(64, 64, dtype=torch.bool), "mask/b": torch.ones(8, 8, dtype=torch.bool)}
    )
    assert "masks" in stored
    unpack(stored, codecs, most=64 * 64 + 8 * 8)
    monkeypatch.setattr(entropy, "_decode", None)
    with pytest.raises(ValueError, match=r"4,160 packed numbers; at most 4,159"):
        unpack(stored, codecs, most=64 * 64 + 8 * 8 - 1)
    with pytest.raises(ValueError, match="a stream of 4160 bits"):
        unpack(stored, {**codecs, "mask/a": "entropy-bits:8x8"})


def test_a_tensor_without_a_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="no codec describes tensor 'mask/a'"):
        unpack(pack({"mask/a": torch.rand(4, 8) < 0.5})[0], {})


def test_codecs_are_spelled_one_way() -> None:
    for text in ("float32", "int8", "bits:3x4", "entropy-trits:1x2x3", "sparse:7"):
        assert str(Codec.parse(text)) == text


def test_a_tensor_of_another_type_cannot_be_written(tiny: Backbone) -> None:
    patch = draft_patch(tiny)
    with pytest.raises(PatchError, match="float64"):
        encode_patch(replace(patch, tensors={**patch.tensors, "replace/x": torch.zeros(2, dtype=torch.float64)}))
    with pytest.raises(PatchError, match="int8 stores float32 matrices"):
        encode_patch(replace(patch, int8=frozenset({"head.bias"})))


@pytest.mark.parametrize("scale", [0.5, 3e38], ids=["not that of the numbers", "numbers become infinite"])
def test_int8_scales_that_no_writer_gives_are_refused(scale: float) -> None:
    stored, codecs = pack({"head.weight": snap_int8(torch.randn(2, 3))}, int8=["head.weight"])
    unpack(stored, codecs)
    stored["head.weight"] //= 2
    stored["scale/head.weight"] = torch.full((2,), scale)
    with pytest.raises(ValueError, match="scales that are not those of its numbers"):
        unpack(stored, codecs)


def test_a_mask_so_even_that_no_reader_would_unfold_it_is_packed() -> None:
    rows = 2 * LEAST_NUMBERS // 4096
    tensors = {"mask/a": torch.ones(rows, 4096, dtype=torch.bool)}
    stored, codecs = pack(tensors)
    assert codecs == {"mask/a": f"bits:{rows}x4096"}
    size = sum(entry.nbytes for entry in stored.values())
    assert torch.equal(unpack(stored, codecs, most_numbers(size))["mask/a"], tensors["mask/a"])
