"""Scales that are learned bring a patch of signs nearer to its checkpoint, and change nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from conftest import TinyNet, draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.convert import extract
from modelpatch.convert.calibrate import calibrate
from modelpatch.errors import TrainingError
from modelpatch.patch.contents import decode_patch, encode_patch

pytestmark = pytest.mark.slow

IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def batches(epoch: int) -> Iterator[Tensor]:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch))
    return (IMAGES[rows] for rows in order.split(16))


@pytest.mark.parametrize("codec", ["sign", "two-bit"])
def test_calibrated_sizes_answer_more_like_the_checkpoint(tiny: Backbone, codec: str) -> None:
    torch.manual_seed(1)
    module = TinyNet(4)
    state = {
        n: t * (1 + 0.3 * torch.randn_like(t)) for n, t in tiny.module.state_dict().items() if t.is_floating_point()
    }
    state = {n: t.abs() if "running_var" in n else t for n, t in state.items() if not n.startswith("fc.")}
    state |= {n: t for n, t in module.state_dict().items() if n.startswith("fc.")}
    patch, exact = (extract(tiny, state, codec=one) for one in (codec, "exact"))
    teacher = tiny.patched(exact)
    better = calibrate(tiny, patch, teacher, batches, steps=60)
    held = IMAGES[48:]
    with torch.no_grad():
        before, after = ((tiny.patched(one)(held) - teacher(held)).square().mean() for one in (patch, better))
    assert after < 0.7 * before
    assert better.tensors.keys() == patch.tensors.keys()
    for name, tensor in patch.tensors.items():
        assert better.tensors[name].dtype == tensor.dtype
        if name.startswith("delta/") and tensor.ndim > 1:
            assert torch.equal(better.tensors[name].sign(), tensor.sign())
        if name.startswith("head.") or "running" in name:
            assert torch.equal(better.tensors[name], tensor)
    data = encode_patch(better)
    assert len(data) == pytest.approx(len(encode_patch(patch)), abs=8)
    assert encode_patch(decode_patch(data)) == data
    tiny.verify()


def test_the_same_images_give_the_same_scales(tiny: Backbone) -> None:
    state = {n: t + 0.01 * (n.endswith("weight") and t.ndim > 1) for n, t in tiny.module.state_dict().items()}
    patch, exact = (extract(tiny, state, codec=codec) for codec in ("sign", "exact"))
    runs = [calibrate(tiny, patch, tiny.patched(exact), batches, steps=4) for _ in range(2)]
    assert runs[0].content_hash == runs[1].content_hash


def test_what_has_no_signs_is_refused(tiny: Backbone) -> None:
    patch = draft_patch(tiny)
    with pytest.raises(TrainingError, match="no scales"):
        calibrate(tiny, patch, tiny.module, batches)
    with pytest.raises(TrainingError, match="steps=0"):
        calibrate(tiny, patch, tiny.module, batches, steps=0)
