"""PackNet: what is freed, trained, pruned and kept, one task after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import color_task, draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.errors import MethodError
from modelpatch.methods.packnet import Packed, PackNet, largest
from modelpatch.methods.piggyback import weight_names
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.train import fit


def test_the_largest_share_is_kept_and_ties_are_settled_by_place() -> None:
    assert largest(torch.tensor([[1.0, -3.0], [0.5, 2.0]]), 0.5).tolist() == [[False, True], [False, True]]
    assert largest(torch.zeros(4), 0.5).tolist() == [True, True, False, False]
    assert largest(torch.tensor([1.0, 2.0, -1.0, 1.0]), 0.75).tolist() == [True, True, True, False]
    assert not largest(torch.ones(3), 0).any()


def test_half_of_every_layer_is_kept_as_it_is_and_the_smallest_half_is_free(tiny: Backbone) -> None:
    tensors = PackNet().draft(tiny, 3).tensors()
    for name in weight_names(tiny):
        weight, kept = tiny.chain.tensor(name).detach(), tensors[f"mask/{name}"]
        assert int(kept.sum()) == round(weight.numel() / 2)
        assert weight[kept].abs().min() >= weight[~kept].abs().max()
        assert not tensors[f"delta/{name}"].any()
    freed = sum(tiny.chain.tensor(name).numel() - int(tensors[f"mask/{name}"].sum()) for name in weight_names(tiny))
    assert PackNet().count_parameters(tiny) == freed


def test_only_freed_weights_learn_and_a_quarter_of_them_is_left(tmp_path: Path) -> None:
    backbone = make_tiny()
    patch = fit(backbone, color_task(48), PackNet(lr=1e-2), epochs=8, batch_size=8)
    assert patch.metrics["test_top1"] >= 0.9
    for name in weight_names(backbone):
        kept, delta = patch.tensors[f"mask/{name}"], patch.tensors[f"delta/{name}"]
        assert not delta[kept].any()
        assert int(delta.count_nonzero()) <= round(int((~kept).sum()) / 4)
    assert Fingerprint.of(backbone.chain) == backbone.fingerprints
    assert Patch.load(patch.save(tmp_path / "p.safetensors")).content_hash == patch.content_hash
    dense = sum(t.numel() for n, t in patch.tensors.items() if n.startswith("delta/"))
    assert patch.inspect().tensor_bytes < 4 * dense


def test_pruning_keeps_the_largest_of_the_tasks_own_weights() -> None:
    module = Packed(torch.tensor([True, False, False, False, False]), torch.zeros(5))
    module.values.data = torch.tensor([9.0, 1.0, -4.0, 2.0, 3.0])
    module.prune(0.5)
    assert module.left.tolist() == [False, False, True, False, True]
    assert module.stored()["delta"].tolist() == [0, 0, -4, 0, 3]


def test_the_next_task_keeps_what_the_earlier_one_learned_and_takes_what_it_left(tmp_path: Path) -> None:
    """Claim: earlier weights stay; every next task finds less room."""
    backbone = make_tiny()
    first = fit(backbone, color_task(24), PackNet(), epochs=3)
    path = first.save(tmp_path / "first.safetensors")
    method = PackNet(after=str(path))
    assert method.count_parameters(backbone) < PackNet().count_parameters(backbone)
    second = fit(backbone, color_task(24, seed=1), method, epochs=3)
    for name in weight_names(backbone):
        earlier, now = first.tensors[f"delta/{name}"], second.tensors[f"delta/{name}"]
        assert torch.equal(now[earlier != 0], earlier[earlier != 0])
        assert torch.equal(first.tensors[f"mask/{name}"], second.tensors[f"mask/{name}"])


def test_only_a_packnet_patch_can_come_before(tiny: Backbone, tmp_path: Path) -> None:
    path = draft_patch(tiny, ScaleBias()).save(tmp_path / "norms.safetensors")
    with pytest.raises(MethodError, match="is a patch of scale-bias"):
        PackNet(after=str(path)).draft(tiny, 3)
