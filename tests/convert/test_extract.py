"""A fine-tuned checkpoint comes back from its patch, exactly or as near as the codec says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from conftest import TinyNet, make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.states import read_states
from modelpatch.convert import extract
from modelpatch.convert.exporting import state_dict_of
from modelpatch.convert.extraction import DELTA_CODECS, factorise
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, NonFiniteTensorError, PatchError
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from tolerance import close

pytestmark = pytest.mark.slow


def finetuned(base: Backbone, size: float = 0.05, classes: int = 4, frozen: tuple[str, ...] = ()) -> nn.Module:
    """A network with other numbers than the base's but in the modules named in `frozen`, and another head."""
    torch.manual_seed(1)
    module = TinyNet(classes)
    state = {name: tensor for name, tensor in base.module.state_dict().items() if not name.startswith("fc.")}
    module.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not name.startswith((*frozen, "fc.")):
                tensor.mul_(1 + size * torch.randn_like(tensor))
            elif not tensor.is_floating_point():
                tensor.add_(7)
    return module.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_an_exact_patch_computes_what_the_checkpoint_computes(tiny: Backbone, images: Tensor, tmp_path: Path) -> None:
    module = finetuned(tiny, frozen=("stem.", "stage1.0."))
    patch = extract(tiny, module.state_dict(), codec="exact", classes=("a", "b", "c", "d"))
    loaded = Patch.load(patch.save(tmp_path / "p.safetensors"))
    with torch.no_grad():
        assert close(tiny.patched(loaded)(images), module(images))
        assert close(BoundPatch(tiny, loaded)(images), module(images))
    assert loaded.task.classes == ("a", "b", "c", "d")
    touched = {name.partition("/")[2] for name in loaded.tensors if not name.startswith("head.")}
    assert touched
    assert not any(name.startswith(("stem.", "stage1.0.")) or "num_batches" in name for name in touched)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_networks_of_every_kind_come_back_exactly(name: str) -> None:
    size = {"img_size": 32} if name.startswith("vit") else {}
    backbone = make_timm(name, 32, **size)
    torch.manual_seed(3)
    module = timm.create_model(name, num_classes=3, **size).eval()
    body = {n: t for n, t in backbone.module.state_dict().items() if not n.startswith(f"{backbone.classifier}.")}
    tuned = {n: t * (1 + 0.05 * torch.randn_like(t)) if t.is_floating_point() else t for n, t in body.items()}
    module.load_state_dict(tuned, strict=False)
    patch = extract(backbone, module.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert close(backbone.patched(patch)(images), module(images))
    state = state_dict_of(backbone, patch)
    assert all(torch.equal(state[n], tensor) for n, tensor in module.state_dict().items())


@pytest.mark.parametrize("codec", DELTA_CODECS)
def test_every_codec_is_read_back_written_again_the_same_and_turned_to_the_base(
    tiny: Backbone, images: Tensor, codec: str
) -> None:
    patch = extract(tiny, finetuned(tiny).state_dict(), codec=codec, rank=1)
    data = encode_patch(patch)
    again = decode_patch(data)
    assert encode_patch(again) == data
    assert again.content_hash == patch.content_hash
    with torch.no_grad():
        assert close(tiny.patched(again)(images), tiny.patched(patch)(images))
        assert torch.allclose(BoundPatch(tiny, again)(images), tiny.patched(again)(images), atol=1e-6)
        off = tiny.patched(again.with_alpha(0))
        assert close(off.run_prefix(images, off.end), tiny.chain(images))


def test_smaller_codecs_are_nearer_to_the_checkpoint_than_the_base_is(tiny: Backbone) -> None:
    module = finetuned(tiny)
    base = dict(tiny.module.named_parameters())
    errors = {}
    for codec in DELTA_CODECS:
        model = tiny.patched(extract(tiny, module.state_dict(), codec=codec, rank=1))
        values = {name: dict(model.named_parameters())[local] for name, local in model.names.items() if "conv" in name}
        pairs = [(value, module.state_dict()[name.partition("/")[2]]) for name, value in values.items()]
        errors[codec] = sum(float((value - target).square().sum()) for value, target in pairs)
    nothing = sum(float((base[n] - t).square().sum()) for n, t in module.state_dict().items() if "conv" in n)
    assert errors["exact"] == 0
    assert errors["float16"] < errors["bfloat16"] < errors["int8"] * 10
    assert errors["int8"] < errors["two-bit"] < errors["sign"] < nothing
    assert errors["low-rank"] < nothing


def test_files_shrink_with_the_codec() -> None:
    base = make_tiny()
    state = finetuned(base).state_dict()
    sizes = {codec: extract(base, state, codec=codec).inspect().tensor_bytes for codec in DELTA_CODECS}
    assert sizes["float16"] == sizes["bfloat16"] == sizes["exact"] / 2
    assert sizes["sign"] < sizes["two-bit"] < sizes["int8"] < sizes["float16"]


def test_the_factors_are_the_nearest_of_their_rank() -> None:
    torch.manual_seed(0)
    delta = torch.randn(6, 2, 3, 3)
    left, right = factorise(delta, 2)
    error = (left @ right - delta.flatten(1)).square().sum()
    assert torch.allclose(error, torch.linalg.svdvals(delta.flatten(1))[2:].square().sum(), rtol=1e-4)
    exact_left, exact_right = factorise(delta, 6)
    assert torch.allclose(exact_left @ exact_right, delta.flatten(1), atol=1e-5)


def low_rank(tiny: Backbone) -> Patch:
    return extract(tiny, finetuned(tiny).state_dict(), codec="low-rank", rank=1)


def test_factors_are_stored_where_they_are_smaller(tiny: Backbone) -> None:
    def factored(rank: int) -> set[str]:
        patch = extract(tiny, finetuned(tiny).state_dict(), codec="low-rank", rank=rank)
        return {name for name in patch.tensors if name.startswith(("left/", "right/"))}

    depthwise, dense = "left/stage2.1.conv1.weight", "left/stage2.1.conv2.weight"  # 16 x 9 and 16 x 16 numbers
    assert {depthwise, dense} <= factored(2)  # 2 * 2 (16 + 9) = 100 < 144, 2 * 2 (16 + 16) = 128 < 256 bytes
    assert {depthwise, dense} & factored(3) == {dense}  # 150 > 144, 192 < 256
    assert all(f"right/{name.removeprefix('left/')}" in factored(3) for name in factored(3) if name.startswith("left/"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"right/stage2.1.conv2.weight": None}, "without the other"),
        ({"right/stage2.1.conv2.weight": torch.zeros(1, 7)}, r"expects \(16, r\) and \(r, 16\)"),
        ({"left/stage2.1.conv2.weight": torch.zeros(16, 2)}, "have shapes"),
        ({"delta/stage2.1.conv2.weight": torch.ones(16, 16, 1, 1)}, "a difference of .* and factors"),
        ({"left/nothing.weight": torch.zeros(2, 1), "right/nothing.weight": torch.zeros(1, 1)}, "no .* segment"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tiny: Backbone, change: dict[str, Any], problem: str) -> None:
    patch = low_rank(tiny)
    tensors = {name: tensor for name, tensor in {**patch.tensors, **change}.items() if tensor is not None}
    broken = replace(patch, tensors=tensors)
    for bind in (tiny.patched, lambda one: BoundPatch(tiny, one)):
        with pytest.raises(ForeignTensorError, match=problem):
            bind(broken)


# checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_read_from_every_usual_form(tiny: Backbone, images: Tensor, tmp_path: Path) -> None:
    module = finetuned(tiny)
    state = module.state_dict()
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "plain.pth")
    with torch.no_grad():
        for name in ("plain.safetensors", "wrapped.pth", "plain.pth"):
            assert close(tiny.patched(extract(tiny, tmp_path / name))(images), module(images))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_no_pickle_but_tensors_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(PatchError, match="cannot be read as plain tensors"):
        read_states(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "cannot be read"), (b"garbage", "cannot be read"), (None, "does not exist. Expected a safetensors file")],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    for name in ("x.pth", "x.safetensors"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PatchError, match=problem):
            read_states(tmp_path / name)


def test_a_list_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "x.pth")
    with pytest.raises(PatchError, match="no tensors by name"):
        read_states(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stem.0.weight": None}, "lacks 1 of"),
        ({"stage2.7.conv1.weight": torch.zeros(2)}, "does not have 1 tensor of"),
        ({"dist_token": torch.zeros(2)}, "does not have 1 tensor of"),
        ({"stem.0.weight": torch.zeros(8, 3, 5, 5)}, "has shape"),
        ({"fc.weight": torch.zeros(4, 9)}, "classifier has a weight of shape"),
        ({"fc.weight": None}, "no classifier fc"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tiny: Backbone, change: dict[str, Any], problem: str) -> None:
    state = {n: t for n, t in {**finetuned(tiny).state_dict(), **change}.items() if t is not None}
    with pytest.raises(PatchError, match=problem):
        extract(tiny, state)


def test_options_that_make_no_sense_are_refused(tiny: Backbone) -> None:
    state = finetuned(tiny).state_dict()
    with pytest.raises(PatchError, match="unknown codec 'zip'"):
        extract(tiny, state, codec="zip")
    with pytest.raises(PatchError, match="rank is 0"):
        extract(tiny, state, codec="low-rank", rank=0)
    with pytest.raises(PatchError, match="4 outputs; 2 classes"):
        extract(tiny, state, classes=("a", "b"))


def test_a_difference_too_large_for_16_bits_is_not_written(tiny: Backbone) -> None:
    state = finetuned(tiny).state_dict()
    state["stem.1.running_var"] = state["stem.1.running_var"] + 1e6
    with pytest.raises(NonFiniteTensorError, match=r"stem\.1\.running_var"):
        encode_patch(extract(tiny, state, codec="float16"))
    encode_patch(extract(tiny, state, codec="bfloat16"))
