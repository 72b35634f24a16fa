"""A clone shares what is frozen, owns what it is told to, and cannot move what it was cloned from."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from conftest import TinyBlock
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.load import load_backbone
from tolerance import close


def test_a_clone_shares_frozen_parameters_and_owns_the_named_ones() -> None:
    block = TinyBlock(4, 4, 1)
    clone = clone_module(block, {"bn1.weight"})
    for (name, base), other in zip(block.named_parameters(), clone.parameters(), strict=True):
        if name == "bn1.weight":
            assert other is not base
            assert torch.equal(other, base)
            assert other.requires_grad
        else:
            assert other is not base
            assert other.data_ptr() == base.data_ptr()
            assert not other.requires_grad or base.requires_grad


def test_a_clone_never_shares_a_buffer() -> None:
    block = TinyBlock(4, 4, 1)
    clone = clone_module(block)
    shared = {buffer.data_ptr() for buffer in block.buffers()} & {buffer.data_ptr() for buffer in clone.buffers()}
    assert not shared


def test_a_clone_in_train_mode_leaves_the_original_as_it_was() -> None:
    block = TinyBlock(4, 4, 1).eval()
    before = copy.deepcopy(block.state_dict())
    clone = clone_module(block).train()
    clone(torch.randn(8, 4, 8, 8))
    assert not block.training
    assert not torch.equal(clone.bn1.running_mean, block.bn1.running_mean)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_a_clone_is_in_eval_mode_and_may_be_edited() -> None:
    block = TinyBlock(4, 4, 1).train()
    clone = clone_module(block)
    assert not any(module.training for module in clone.modules())
    clone.act = nn.Identity()
    assert isinstance(block.act, nn.ReLU)


def test_hooks_on_a_clone_do_not_fire_on_the_original() -> None:
    block, calls = TinyBlock(4, 4, 1).eval(), []
    clone_module(block).register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(1, 4, 8, 8))
    assert not calls


def test_a_name_that_the_module_lacks_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        clone_module(TinyBlock(4, 4, 1), {"nonsense"})


def test_a_tensor_that_two_modules_share_stays_one_tensor_in_the_clone() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    clone = clone_module(nn.Sequential(first, second), {"0.weight"})
    assert clone[0].weight is clone[1].weight
    assert clone[0].weight is not first.weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "vit"])
def test_every_segments_clone_gives_the_segments_output_without_a_byte_of_parameters(name: str, tiny: Backbone) -> None:
    if name == "vit":  # its class token and positions are parameters of traced segments, not of modules
        tiny = load_backbone(timm.create_model("test_vit", img_size=32))
    x = torch.randn(1, *tiny.input_size)
    for segment in tiny.chain:
        clone = clone_module(segment.module)
        assert [p.data_ptr() for p in clone.parameters()] == [p.data_ptr() for p in segment.module.parameters()]
        expected = segment.module(x)
        assert close(clone(x), expected)
        x = expected
