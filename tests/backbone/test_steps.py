"""Segments that hand their calls more than the image's activation: at every size, batch size, and in clones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.steps import Bundle, Steps
from modelpatch.backbone.trace import trace_calls
from modelpatch.engine.engine import Engine
from modelpatch.errors import BackboneError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.subset import Subset
from tolerance import close


class RotaryBlock(nn.Module):
    """A block that takes a table of positions, a mask and the sides of its map."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, size: tuple[int, int], rope: Tensor, mask: Tensor | None = None) -> Tensor:
        assert x.shape[1] == size[0] * size[1]
        y = self.fc2(self.fc1(self.norm(x)).relu()) * rope
        return x + (y if mask is None else y * mask)


class Rotary(nn.Module):
    def __init__(self, queries: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.register_buffer("periods", torch.rand(8))
        self.blocks = nn.ModuleList([RotaryBlock() for _ in range(3)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        height, width = x.shape[2:]
        x = x + nn.functional.interpolate(self.position, (height, width), mode="bilinear")
        x = x.flatten(2).transpose(1, 2)
        rope = (torch.arange(height * width, device=x.device)[:, None] * self.periods).cos()
        mask = torch.ones(len(x), height * width, 1)
        mask[:, 0] = 0.5
        for block in self.blocks:
            x = block(x, (height, width), rope=rope, mask=mask)
        return self.fc(x.mean(1))


class Branches(nn.Module):
    """Two streams of different widths that every block reads and gives, the second with four rows an image."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.across = nn.Linear(8, 8), nn.Linear(2, 2), nn.Linear(8, 8)

        def forward(self, pair: list[Tensor]) -> list[Tensor]:
            one, two = pair
            return [one + self.across(self.one(one)) + two.reshape(len(one), -1), two + self.two(two)]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.blocks = nn.Sequential(*(self.Pair() for _ in range(3)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((2, 3)))
        pair = [x, x.reshape(-1, 2)]
        for block in self.blocks:
            pair = block(pair)
        return self.fc(pair[0])


def small(module: nn.Module) -> Backbone:
    torch.manual_seed(0)
    return load_backbone(module, preprocessing=small_preprocessing())


def images(rows: int, *size: int) -> Tensor:
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (32, 16)])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_with_more_than_their_input_are_segments_at_every_size_and_batch(
    rows: int, size: tuple[int, int]
) -> None:
    backbone = small(Rotary())
    assert [block.name for block in backbone.chain.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    x = images(rows, *size)
    assert close(backbone.chain.head(backbone.chain(x)), backbone(x))


def test_tables_that_blocks_share_are_hashed_and_what_one_segment_makes_of_its_parameters_learns() -> None:
    backbone = small(Rotary())
    assert list(backbone.chain.tables) == ["periods"]
    segment = backbone.chain.segment_of("position")
    clone = clone_module(segment.module, [name for name, base in segment.tensor_names.items() if base == "position"])
    clone(torch.zeros(2, *segment.input_shape)).sum().backward()
    grads = [p.grad for p in clone.parameters() if p.requires_grad]
    assert len(grads) == 1
    assert grads[0] is not None
    assert bool((grads[0] != 0).any())
    with torch.no_grad():
        backbone.module.periods.add_(1)  # type: ignore[operator, union-attr]
    with pytest.raises(BackboneError, match="tables"):
        backbone.verify()


def test_a_segment_that_never_met_a_size_says_what_to_run() -> None:
    backbone = small(Rotary())
    block = backbone.chain.blocks[0]
    with pytest.raises(BackboneError, match=r"\(B, 36, 8\).*check_image_size"):
        block.module(torch.zeros(1, 36, 8))
    clone = copy.deepcopy(block.module)
    backbone.check_image_size(24)
    assert clone(torch.zeros(1, 36, 8)).shape == (1, 36, 8)  # clones learn of sizes as well


@torch.no_grad()
@pytest.mark.parametrize("travel", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_backbone_that_goes_to_another_process_computes_there_at_every_size(travel: Callable[[Any], Any]) -> None:
    backbone = small(Rotary())
    arrived = travel(backbone)
    assert arrived.fingerprint == backbone.fingerprint
    assert arrived.module.position is not backbone.module.position
    for rows, side in ((3, 16), (1, 24)):
        x = images(rows, side, side)
        assert torch.equal(arrived.chain(x), backbone.chain(x))


@torch.no_grad()
def test_blocks_of_several_streams_are_cut_apart_and_the_streams_travel_as_one() -> None:
    backbone = small(Branches())
    chain, x = backbone.chain, images(3, 16, 16)
    assert [block.name for block in chain.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.input_shape for block in chain.blocks] == [(16,)] * 3
    assert chain.blocks[0].bundles
    assert not chain.blocks[-1].bundles
    assert close(chain.head(chain(x)), backbone(x))
    cut = chain.blocks[1].index
    prefix = chain.run(x, 0, cut)
    assert close(chain.run(prefix[1:2], cut, len(chain)), chain(x[1:2]))  # every row is one image's


def test_a_bundle_gives_back_what_it_was_made_of() -> None:
    values = {3: torch.randn(2, 4, 5), 7: torch.randn(6, 2)}
    bundle = Bundle.of(values, values, 2)
    assert bundle.shape == (26,)
    opened = bundle.open(bundle.close(values, 2))
    assert all(torch.equal(opened[number], value) for number, value in values.items())


@torch.no_grad()
def test_constants_follow_device_and_precision_of_the_input() -> None:
    backbone = small(Rotary())
    block = copy.deepcopy(backbone.chain.blocks[0].module)
    assert isinstance(block, Steps)
    x = torch.randn(1, 16, 8)
    half = block.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert float((half.float() - backbone.chain.blocks[0].module(x)).abs().max()) < 0.1


def test_a_tensor_that_several_blocks_share_stays_the_backbones() -> None:
    module = Rotary()
    module.blocks[1].fc1 = module.blocks[0].fc1
    backbone = small(module)
    tied = {"blocks.0.fc1.weight", "blocks.0.fc1.bias"}
    assert backbone.chain.blocks[0].tied == backbone.chain.blocks[1].tied == tied
    for method in (FullFinetune(), Piggyback(), Subset(blocks=("blocks.0",))):
        owned = method.blueprint(backbone).owned
        assert owned
        assert tied.isdisjoint(owned)


@torch.no_grad()
def test_sizes_with_as_many_positions_in_other_places_are_not_taken_for_each_other() -> None:
    backbone = small(Rotary())
    tall, wide = images(2, 32, 16), images(2, 16, 32)
    before = backbone.chain(tall)
    with pytest.raises(BackboneError, match=r"\(3, 16, 32\) cannot be told"):
        backbone.chain(wide)
    assert torch.equal(backbone.chain(tall), before)
    backbone.chain(images(1, 18, 16))  # as many positions, in the same places: the patches leave out two rows


class Masked(nn.Module):
    """Blocks that read their input alone, and a mask as well in larger images."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
            return sum(masks, x + self.fc2(self.fc1(x).relu()))

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks, self.fc = (
            nn.Conv2d(3, 8, 4, 4),
            nn.ModuleList([self.Block() for _ in range(2)]),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, torch.arange(x.shape[1])[:, None]) if x.shape[1] > 16 else block(x)
        return self.fc(x.mean(1))


@torch.no_grad()
def test_a_block_that_reads_more_at_another_size_is_not_run_without_it() -> None:
    backbone = small(Masked())
    x = images(2, 12, 12)
    assert close(backbone.chain.head(backbone.chain(x)), backbone(x))
    with pytest.raises(BackboneError, match="cut differently"):
        backbone.chain(images(2, 24, 24))


def test_a_table_that_another_thread_drops_at_once_is_given_all_the_same() -> None:
    block = small(Rotary()).chain.blocks[0].module
    assert isinstance(block, Steps)
    (program,) = block.programs.values()

    class Dropping:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            program.shared._kept.clear()

    program.shared._lock = Dropping()  # type: ignore[assignment]
    assert block(torch.zeros(5, 16, 8)).shape == (5, 16, 8)


class Kept(Masked):
    """The same blocks, all of which read a tensor that belongs to no module."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.rand(8)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, *self.kept)
        return self.fc(x.mean(1))


@torch.no_grad()
def test_a_segment_that_reads_a_tensor_of_no_module_can_be_traced_and_computes_as_before() -> None:
    backbone = small(Kept())
    x = images(2, 16, 16)
    before = backbone.chain(x)
    called = [node.target for node in trace_calls(backbone.chain.blocks[0].module).nodes if node.op == "call_module"]
    assert "blocks.0.fc1" in called
    assert torch.equal(backbone.chain(x), before)


class Extending(nn.Sequential):
    """Modules one after another, with one more for larger images."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x) if x.shape[-1] > 16 else x
        for module in list(self)[:5]:
            x = module(x)
        return x


@torch.no_grad()
def test_a_module_that_only_larger_images_pass_is_not_left_out_of_a_chain_of_modules_alone() -> None:
    backbone = small(Extending())
    assert not any(isinstance(segment.module, Steps) for segment in backbone.chain)
    x = images(2, 12, 12)
    assert close(backbone.chain.head(backbone.chain(x)), backbone(x))
    with pytest.raises(BackboneError, match="cut differently"):
        backbone.check_image_size(24)


class MapClassifier(nn.Module):
    """A network as SqueezeNet is: its classifier is a convolution of maps, whose answers are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 6, 4, 4))
        self.classifier = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).relu().mean((2, 3))


@torch.no_grad()
def test_features_of_a_classifier_of_maps_are_pooled_at_a_size_where_these_have_one_position_too() -> None:
    module = MapClassifier().eval()
    for pixels in (16, 32):
        backbone = load_backbone(module, classifier="classifier", preprocessing=small_preprocessing(pixels))
        for other in (16, 32):
            x = images(2, other, other)
            backbone.check_image_size(other)
            assert close(backbone.chain(x), module.features(x).mean((2, 3)))
            assert close(Engine(backbone)(x)["base"], module(x))
