"""The contract that every patch of every method keeps on every architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import color_task, make_timm, make_tiny
from modelpatch.backbone import Backbone, Fingerprint, load_backbone
from modelpatch.errors import DamagedPatchError, MethodNotApplicableError, WrongBackboneError
from modelpatch.methods import FullFinetune, LinearProbe, LoRA, Method, ScaleBias, Subset
from modelpatch.patch import BoundPatch, Patch
from modelpatch.train import fit

ARCHITECTURES: dict[str, Callable[[], Backbone]] = {
    "tiny": make_tiny,
    "resnet18": lambda: make_timm("resnet18", 32),
    "mobilenetv2_100": lambda: make_timm("mobilenetv2_100", 32),
    "convnext_atto": lambda: make_timm("convnext_atto", 32),
    "densenet121": lambda: make_timm("densenet121", 32),
    "vit_tiny": lambda: make_timm("vit_tiny_patch16_224", 32, img_size=32),
}
WITHOUT_BATCH_NORM = {"convnext_atto", "vit_tiny"}
SLOW = {"densenet121"}

METHODS: dict[str, Method] = {
    "probe": LinearProbe(),
    "scale-bias": ScaleBias(),
    "scale-bias learned": ScaleBias(statistics="learned"),
    "subset": Subset(),
    "lora": LoRA(),
    "full": FullFinetune(),
}
MORE_METHODS: dict[str, Method] = {
    "scale-bias recomputed": ScaleBias(statistics="recomputed"),
    "statistics only": ScaleBias(affine=False, statistics="recomputed"),
    "channel": ScaleBias(layers="channel"),
    "channel recomputed": ScaleBias(layers="channel", statistics="recomputed"),
    "channel learned": ScaleBias(layers="channel", statistics="learned"),
    "random head": ScaleBias(head="random"),
    "subset stage": Subset(blocks=("stage-1",)),
    "subset learned": Subset(statistics="learned"),
    "full learned": FullFinetune(statistics="learned"),
}
PAIRS = [
    pytest.param((architecture, method), id=f"{architecture}, {name}")
    for architecture in ARCHITECTURES
    for name, method in {**METHODS, **({} if architecture in SLOW else MORE_METHODS)}.items()
    if architecture not in WITHOUT_BATCH_NORM or getattr(method, "statistics", "frozen") == "frozen"
]


@dataclass
class Fitted:
    """A patch that a real fit made and its file; `before` holds the base's logits from before any fit."""

    backbone: Backbone
    other: Backbone
    patch: Patch
    file: Path
    images: Tensor
    before: Tensor


@cache
def architecture(name: str) -> tuple[Backbone, Backbone, Tensor, Tensor]:
    """The backbone, one that differs from it in one number, images, and the backbone's logits for them."""
    backbone = ARCHITECTURES[name]()
    module = copy.deepcopy(backbone.module)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 0.5
    other = load_backbone(module, preprocessing=backbone.preprocessing)
    images = torch.randn(3, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    return backbone, other, images, backbone(images)


@pytest.fixture(scope="module", params=PAIRS)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fitted]:
    name, method = request.param
    backbone, other, images, before = architecture(name)
    data = color_task(12, backbone.preprocessing.image_size)
    patch = fit(backbone, data, method, epochs=1, batch_size=6)
    file = tmp_path_factory.mktemp("patch") / "colors.safetensors"
    yield Fitted(backbone, other, patch, patch.save(file), images, before)
    file.unlink()


def test_the_base_is_bit_for_bit_what_it_was_buffers_included(fitted: Fitted) -> None:
    assert Fingerprint.of(fitted.backbone.chain) == fitted.backbone.fingerprints
    assert torch.equal(fitted.backbone(fitted.images), fitted.before)


def test_a_saved_patch_answers_bit_for_bit_as_before(fitted: Fitted) -> None:
    loaded = Patch.load(fitted.file)
    logits = fitted.backbone.patched(fitted.patch)(fitted.images)
    assert torch.equal(fitted.backbone.patched(loaded)(fitted.images), logits)
    assert torch.equal(BoundPatch(fitted.backbone, loaded)(fitted.images), logits)
    assert logits.shape == (3, 3)
    assert logits.isfinite().all()


def test_the_file_is_as_large_as_inspect_says(fitted: Fitted) -> None:
    assert fitted.patch.inspect().file_bytes == fitted.file.stat().st_size


def test_a_base_with_one_other_number_is_refused(fitted: Fitted) -> None:
    with pytest.raises(WrongBackboneError, match="differs in 1 of"):
        fitted.other.patched(fitted.patch)


def test_a_file_with_one_other_byte_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    data = bytearray(fitted.file.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    with pytest.raises(DamagedPatchError):
        Patch.load(damaged)


@pytest.mark.parametrize("pair", PAIRS)
def test_everything_training_changes_is_in_the_patch(pair: tuple[str, Method]) -> None:
    backbone, _, images, _ = architecture(pair[0])
    method = pair[1]
    trained = method.draft(backbone, 3)
    method.prepare(trained, lambda: [images])
    method.train_mode(trained)
    optimizer = method.make_optimizer(trained)
    F.cross_entropy(trained(images), torch.arange(3)).backward()
    optimizer.step()
    trained.eval()
    rebuilt = method.draft(backbone, 3)
    rebuilt.load_tensors(trained.tensors())
    with torch.no_grad():
        assert torch.equal(rebuilt(images), trained(images))


@pytest.mark.parametrize("name", sorted(WITHOUT_BATCH_NORM))
@pytest.mark.parametrize("statistics", ["recomputed", "learned"])
def test_statistics_of_a_network_that_has_none_are_refused(name: str, statistics: str) -> None:
    method = ScaleBias(affine=False, statistics=statistics)  # type: ignore[arg-type]
    with pytest.raises(MethodNotApplicableError, match="running statistics"):
        fit(architecture(name)[0], color_task(12, 32), method, epochs=1)
