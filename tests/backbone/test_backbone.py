"""The backbone as an object: which images it takes, and what is refused when it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conftest import TinyNet, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import MAX_PIXELS
from modelpatch.errors import BackboneError, UntraceableBackboneError


def make_flat() -> Backbone:
    """A network without a global pool: its number of features follows the image size."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 2))
    return load_backbone(module, preprocessing=small_preprocessing())


def make_narrow() -> Backbone:
    """A network whose first convolution is larger than the smallest images."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return load_backbone(module, preprocessing=small_preprocessing())


@pytest.mark.parametrize(
    ("make", "pixels", "reason"),
    [
        (lambda: make_timm("test_vit", 160), 150, "patch size"),
        (lambda: make_timm("test_vit", 160), 1, "patch size"),
        (make_flat, 8, rf"{4 * 8 * 8} features instead of {4 * 16 * 16}"),
        (make_narrow, 1, "[Kk]ernel size"),
    ],
)
def test_a_size_that_the_network_refuses_is_an_error_that_says_what_it_was_loaded_for(
    make: Callable[[], Backbone], pixels: int, reason: str
) -> None:
    backbone = make()
    own = backbone.preprocessing.image_size
    backbone.check_image_size(own)
    for _ in range(2):  # asked again, it is refused again
        with pytest.raises(
            BackboneError, match=rf"no images of {pixels} x {pixels} pixels .*{reason}.* for {own}\."
        ) as e:
            backbone.check_image_size(pixels)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("pixels", [0, MAX_PIXELS + 1])
def test_a_size_out_of_range_is_never_tried(tiny: Backbone, pixels: int) -> None:
    with pytest.raises(BackboneError, match=f"expected .* 1 to {MAX_PIXELS}"):
        tiny.check_image_size(pixels)


def test_a_size_is_run_once_and_the_own_size_never(tiny: Backbone) -> None:
    shapes: list[torch.Size] = []
    handle = tiny.module.stem.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    first = tiny.module.stem[0].register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    for pixels in (16, 16, 24, 24, 8):
        tiny.check_image_size(pixels)
    handle.remove()
    first.remove()
    assert {shape[2] for shape in shapes} == {24, 8}
    assert len([shape for shape in shapes if shape[0] == 1]) == 2


def test_trying_a_size_changes_neither_buffers_nor_random_state(tiny: Backbone) -> None:
    before = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    tiny.check_image_size(24)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tiny.module.state_dict().items())
    tiny.verify()


# what is no backbone ----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Answers with two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x


def make_broken() -> nn.Module:
    module = TinyNet()
    nn.init.constant_(module.fc.weight, float("nan"))
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Pair, "does not end a chain with one tensor alive"),
        (lambda: nn.Linear(3, 4), "does not run on images of shape"),
        (lambda: TinyNet().double(), "does not run on images of shape .*float32"),
        (make_broken, "TinyNet answers with NaN or infinity"),
        (nn.Identity, "nothing before its classifier"),
    ],
)
def test_a_module_that_is_no_network_over_images_is_refused_in_one_line(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(make(), preprocessing=small_preprocessing())
    assert "\n" not in str(caught.value)


def test_a_script_is_refused() -> None:
    with pytest.raises(UntraceableBackboneError, match="Give the module it came from"):
        load_backbone(torch.jit.script(make_tiny().module), preprocessing=small_preprocessing())
