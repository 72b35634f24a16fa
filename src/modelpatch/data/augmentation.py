"""Random views of images: the library's own, a whole batch at a time, and a user's transform, one image at a time.

The library's own views cut a crop from every image of a batch on its own, stretch it and flip it, in one `grid_sample`. For
32 images on one thread that took 1.2 ms at 32 px, 4.9 at 64 and 55.5 at 224; torchvision, image by image, 6.3, 8.1 and 23.9.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modelpatch.backbone.preprocessing import open_image
from modelpatch.data.samples import to_boxes, to_image, to_mask
from modelpatch.data.splits import Split, Transform, source_size
from modelpatch.errors import DataError
from modelpatch.tasks.detection import Boxes
from modelpatch.tasks.kind import Target
from modelpatch.tasks.segmentation import PixelMask

SMALL_SOURCE = 64
AugmentName = Literal["auto", "none", "light", "standard", "strong"]
GREY = torch.tensor([0.299, 0.587, 0.114])
KEPT = np.arange(256, dtype=np.int16)  # the table of a mask whose values are class indices


@dataclass(frozen=True)
class Augmentation:
    """A random crop of relative area within `area` and aspect ratio up to `stretch`, flipped half the time if `flip`.

    Brightness, contrast and saturation change by factors within 1 ± `colors`; a square of at most the share `erased` of the
    view becomes its mean colour (Zhong et al., *Random Erasing Data Augmentation*, 2020).
    """

    name: str
    area: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    flip: bool = False
    colors: float = 0.0
    erased: float = 0.0

    def __call__(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Float (B, 3, R, R) to (B, 3, size, size), each image cropped on its own; values keep their range."""
        grid = F.affine_grid(
            self.matrices(len(images), generator), [*images.shape[:2], size, size], align_corners=False
        )
        views = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        if self.colors:
            views = self._recolor(views, generator)
        return self._erase(views, generator) if self.erased else views

    def _recolor(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """Saturation, contrast and brightness of every view, in the range of 8 bits."""
        factors = 1 + self.colors * (2 * torch.rand(3, len(views), 1, 1, 1, generator=generator) - 1)
        grey = views.mean(1, keepdim=True)
        if views.shape[1] == len(GREY):
            grey = torch.einsum("bchw,c->bhw", views, GREY)[:, None]
        views = grey + factors[0] * (views - grey)
        views = grey.mean((2, 3), keepdim=True) + factors[1] * (views - grey.mean((2, 3), keepdim=True))
        return (views * factors[2]).clamp(0, 255)

    def _erase(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """Every view with a square, anywhere and of any size up to the largest, in its mean colour."""
        size, (sides, lefts, tops) = views.shape[-1], torch.rand(3, len(views), 1, generator=generator)
        sides = sides * self.erased**0.5 * size
        places = torch.arange(size) + 0.5
        columns = (places >= lefts * (size - sides)) & (places < lefts * (size - sides) + sides)
        rows = (places >= tops * (size - sides)) & (places < tops * (size - sides) + sides)
        return torch.where((rows[:, :, None] & columns[:, None])[:, None], views.mean((2, 3), keepdim=True), views)

    def matrices(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2, 3): the map from places of each view, in [-1, 1], to its image. Diagonal, but for the shift."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        side = uniform(*self.area).sqrt()
        ratio = torch.exp(uniform(-np.log(self.stretch), np.log(self.stretch)) / 2)
        width, height = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
        left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
        sign = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if self.flip else torch.ones(count)
        zero = torch.zeros(count)
        return torch.stack([torch.stack([width * sign, zero, left], 1), torch.stack([zero, height, top], 1)], 1)


AUGMENTATIONS = {
    "none": Augmentation("none"),
    "light": Augmentation("light", area=(0.6, 1.0), stretch=1.15),
    "standard": Augmentation("standard", area=(0.35, 1.0), stretch=4 / 3, flip=True),
    "strong": Augmentation("strong", area=(0.2, 1.0), stretch=4 / 3, flip=True, colors=0.4, erased=0.25),
}


def choose_augmentation(name: AugmentName, split: Split) -> Augmentation:
    """The augmentation of that name.

    `auto` is `none` for images with random transforms of the user's, `light` for small pictures (digits, signs: a flip may
    change the answer), `standard` for photos. `strong` is that with smaller crops, other colours and
    squares left out.
    """
    if name == "auto":
        name = "none" if split.augments else "light" if source_size(split) <= SMALL_SOURCE else "standard"
    return AUGMENTATIONS[name]


def apply_transform(transform: Transform, image: Image.Image, target: Target | int) -> tuple[Image.Image, Target | int]:
    """The transformed image and target.

    Class indices and targets of whole images stay as they are. Masks and boxes are given as tv_tensors, as the second
    argument. Raises `DataError` for a transform that fails or returns something else.
    """
    try:
        if isinstance(target, int) or not target.moves:
            return open_image(to_image(transform(image))), target
        from torchvision import tv_tensors

        if isinstance(target, PixelMask):
            view, mask = transform(image, tv_tensors.Mask(torch.from_numpy(np.array(target.read()))))
            return open_image(to_image(view)), PixelMask(to_mask(mask), KEPT)
        assert isinstance(target, Boxes)
        corners = torch.from_numpy(target.corners)
        boxes: Any = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(image.height, image.width))
        labels, difficult = torch.from_numpy(target.labels), torch.from_numpy(target.difficult)
        view, found = transform(image, {"boxes": boxes, "labels": labels, "difficult": difficult})
        return open_image(to_image(view)), to_boxes(found)
    except DataError as error:
        raise DataError(f"the transform's result cannot be used: {error}") from error
    except Exception as error:
        raise DataError(f"the transform failed on an image of {image.size}: {error!r}") from error
