"""Blocks taken apart and stages found, whatever family of network they come from."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from conftest import TinyBlock, make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.trace import trace_calls
from modelpatch.errors import UntraceableBackboneError
from modelpatch.methods.residual import SplitBlock, WholeBlock, form_of, skip_edges, split_block
from tolerance import close


class Plain(nn.Module):
    """Two convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Projected(Plain):
    """Adds a projection, in place, by the operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x), inplace=True))
        y += self.first(x)
        return F.relu_(y)


class AddsMethod(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).add_(x).relu()


class Twice(Plain):
    """Two sums in a row, as in a transformer block."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class WeightsAfter(Plain):
    """A sum, and a convolution after it: nothing to cut between branch and activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


class AddsConstant(Plain):
    """Adds a number and a parameter, which are no shortcuts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + 1) + self.first.bias.view(-1, 1, 1)


class Depends(Plain):
    """What it computes depends on its input's values: torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("kind", "shortcut", "part"),
    [
        (Plain, "none", WholeBlock),
        (Projected, "projection", SplitBlock),
        (AddsMethod, "identity", SplitBlock),
        (Twice, "identity", WholeBlock),
        (WeightsAfter, "identity", WholeBlock),
        (AddsConstant, "none", WholeBlock),
        (Depends, "none", WholeBlock),
        (lambda: TinyBlock(4, 4, 1), "identity", SplitBlock),
        (lambda: TinyBlock(4, 8, 2), "projection", SplitBlock),
        (lambda: nn.Conv2d(4, 4, 1), "none", WholeBlock),
    ],
)
def test_the_form_of_a_block_follows_from_its_wiring(kind: Callable[[], nn.Module], shortcut: str, part: type) -> None:
    block = kind().eval()
    x = torch.randn(2, 4, 6, 6)
    taken = split_block(block)
    assert form_of(block).shortcut == shortcut
    assert type(taken) is part
    with torch.no_grad():
        assert close(taken(x), block(x))
        branch, added = taken.before(x)
        assert (added is None) == (shortcut == "none")
        if shortcut == "identity":
            assert added is x or torch.equal(added, x)  # type: ignore[arg-type]
        together = branch if added is None else branch + added
        torch.testing.assert_close(taken.after(together), block(x))


def test_the_branch_holds_the_weights_and_the_shortcut_the_projection() -> None:
    block = TinyBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        branch, shortcut = split_block(block).before(x)
        assert close(shortcut, block.shortcut(x))  # type: ignore[arg-type]
        assert close(branch, block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))


def test_a_block_taken_apart_shares_every_tensor_with_the_block() -> None:
    block = clone_module(make_tiny().chain.blocks[0].module)
    tensors = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
    taken = split_block(block)
    assert {id(tensor) for tensor in (*taken.parameters(), *taken.buffers())} == tensors


def test_taking_a_block_apart_leaves_its_input_as_it_was() -> None:
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    for kind in (Projected, AddsMethod, Twice):
        taken = split_block(kind().eval())
        taken.after(taken.before(x)[0])
        assert torch.equal(x, before)


def test_edges_are_all_pairs_of_an_earlier_and_a_later_node() -> None:
    assert skip_edges(0, 3) == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert skip_edges(1, 3) == ((1, 2), (1, 3), (2, 3))
    assert skip_edges(1, 1) == ()
    for k in range(1, 10):
        assert len(skip_edges(0, k)) == k * (k + 1) // 2
        assert len(skip_edges(1, k)) == k * (k - 1) // 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_timm("densenet121", 32).module.features.denseblock1,
        lambda: torchvision.models.densenet121().features.denseblock1,
    ],
)
def test_the_layers_of_a_dense_block_are_found_in_order(make: Callable[[], nn.Module]) -> None:
    block = make()
    assert form_of(block).layers == tuple(name for name, _ in block.named_children())


@pytest.mark.parametrize("kind", [Plain, Twice, Depends, lambda: TinyBlock(4, 4, 1)])
def test_other_blocks_have_no_dense_layers(kind: Callable[[], nn.Module]) -> None:
    assert form_of(kind()).layers == ()


def test_what_cannot_be_traced_says_so() -> None:
    with pytest.raises(UntraceableBackboneError, match="Depends cannot be traced"):
        trace_calls(Depends())


def test_a_segment_that_passes_a_block_more_than_its_input_is_looked_through() -> None:
    backbone: Backbone = make_timm("beit_base_patch16_224", 32, img_size=32, depth=2, embed_dim=32, num_heads=2)
    assert [form_of(block.module).shortcut for block in backbone.chain.blocks] == ["identity"] * 2


def test_networks_run_in_other_threads_while_blocks_are_traced() -> None:
    block, done, failures = TinyBlock(4, 4, 1).eval(), threading.Event(), list[BaseException]()

    def run() -> None:
        x = torch.randn(1, 4, 6, 6)
        while not done.is_set():
            try:
                block(x)
            except BaseException as error:
                failures.append(error)
                return

    runner = threading.Thread(target=run)
    runner.start()
    tracers = [threading.Thread(target=lambda: [trace_calls(Twice()) for _ in range(20)]) for _ in range(3)]
    for thread in tracers:
        thread.start()
    for thread in tracers:
        thread.join()
    done.set()
    runner.join()
    assert failures == []


class Narrower(Plain):
    """Adds its input to the first of its channels, as RexNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(self.first(x))
        return torch.cat([wide[:, 0:4] + x, wide[:, 4:]], 1)


def test_an_input_that_is_added_to_some_channels_is_no_shortcut() -> None:
    assert form_of(Narrower()).shortcut == "none"
