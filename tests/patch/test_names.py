"""Names of tensors: those of real networks are legal, what a terminal, page or path would read otherwise is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import make_tiny
from modelpatch.errors import HostileNameError, InvalidPatchError, PatchError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.text import MAX_LENGTH

PATCH = LinearProbe().build(make_tiny(), ("a", "b")).to_patch(("letters", ("a", "b")))
PLACES = ("replace/", "delta/", "left/", "graft/0-3/")
parts = st.text(st.sampled_from("abzAZ019_-+:@=~,()# éßγ層"), min_size=1, max_size=12)
names = st.lists(parts, min_size=1, max_size=6).flatmap(
    lambda words: st.sampled_from("./").map(lambda joint: joint.join(words))
)


def with_tensor(name: str, tensor: Tensor, int8: bool = False) -> Patch:
    return replace(PATCH, tensors={**PATCH.tensors, name: tensor}, int8=frozenset([name] if int8 else []))


@given(name=names, place=st.sampled_from(PLACES))
def test_names_of_real_networks_are_written_and_read(name: str, place: str) -> None:
    patch = with_tensor(place + name, torch.ones(3))
    assert patch.check_savable() > 0
    assert decode_patch(encode_patch(patch)).tensors.keys() == patch.tensors.keys()


@given(name=st.text(max_size=20), place=st.sampled_from((*PLACES, "head.", "", "other/")))
def test_what_is_checked_before_training_is_what_is_written_and_read(name: str, place: str) -> None:
    patch = with_tensor(place + name, torch.ones(3))
    try:
        patch.check_savable()
    except HostileNameError:
        with pytest.raises(HostileNameError):
            encode_patch(patch)
    except InvalidPatchError:
        assert place == "head."
        with pytest.raises(InvalidPatchError, match="not those of a linear head"):
            encode_patch(patch)
    else:
        assert decode_patch(encode_patch(patch)).tensors.keys() >= PATCH.tensors.keys()


@pytest.mark.parametrize("name", ["head.x", "head.weight"])
def test_a_head_that_no_reader_would_take_is_found_before_training(name: str) -> None:
    patch = with_tensor(name, torch.ones(3))
    for save in (patch.check_savable, lambda: encode_patch(patch)):
        with pytest.raises(InvalidPatchError, match="not those of a linear head"):
            save()


@pytest.mark.parametrize("int8", [False, True])
def test_the_longest_name_is_read_whatever_a_codec_puts_before_it(int8: bool) -> None:
    name = "replace/" + "a" * (MAX_LENGTH - len("replace/"))
    patch = with_tensor(name, torch.ones(2, 3), int8)
    patch.check_savable()
    assert name in decode_patch(encode_patch(patch)).tensors
    with pytest.raises(HostileNameError, match=rf"{MAX_LENGTH + 1} characters.*at most {MAX_LENGTH}"):
        with_tensor(name + "a", torch.ones(2, 3), int8).check_savable()


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.complex64)])
def test_types_that_no_file_holds_are_refused(tensor: Tensor) -> None:
    with pytest.raises(PatchError, match=r"replace/x has dtype .*; a patch holds float32"):
        with_tensor("replace/x", tensor).check_savable()
