"""Targets that are a number for each output, some of them perhaps unknown, and what kinds with such targets share."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.tasks.drawing import Color, add_legend
from modelpatch.tasks.kind import ElementLoss, Kind, Target, View
from modelpatch.tasks.losses import find_loss


@dataclass(frozen=True, eq=False)
class Vector(Target):
    """A number for each output, `values` (K,) float64, NaN where it is unknown: neither trained on nor measured."""

    values: np.ndarray
    moves = False

    def content(self) -> bytes:
        return self.values.tobytes()

    def frame(self, image: Image.Image, preprocessing: Preprocessing) -> "Vector":
        return self

    @staticmethod
    def batch(framed: Sequence["Vector"], preprocessing: Preprocessing | None, matrices: Tensor | None) -> Tensor:
        """Float64 (B, K)."""
        return torch.from_numpy(np.stack([one.values for one in framed]))


class VectorKind(Kind):
    """A kind with a number for each output; answers are (B, K), targets (B, K) with NaN where one is unknown."""

    target = Vector
    draws = True

    def move(self, targets: Tensor, device: torch.device) -> Tensor:
        return targets.to(device, torch.float32 if device.type == "mps" else targets.dtype)  # which has no float64

    def weigh_images(self, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
        known = (~targets.isnan()).float()
        return (known if class_weights is None else known * class_weights.to(known)).sum(1)

    @torch.no_grad()
    def start_head(self, head: nn.Module) -> None:
        """Start a linear head at zero, which answers the mean, or even odds, for every image."""
        if isinstance(head, nn.Linear) and head.weight.requires_grad:
            head.weight.zero_()
            if head.bias is not None:
                head.bias.zero_()

    def make_loss(
        self,
        name: str,
        options: Mapping[str, Any],
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Callable[[Any, Any], Tensor]:
        each = find_loss(name, self.losses, self.name)
        kept = {"class_weights": class_weights, "label_smoothing": label_smoothing}
        return partial(self.loss, **kept, each=each, options=options)  # type: ignore[arg-type]

    def loss(
        self,
        output: Tensor,
        targets: Tensor,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        each: ElementLoss | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The mean of the losses of all known outputs; of class weights, the weighted mean."""
        known = ~targets.isnan()
        wanted = self.to_trained(targets.where(known, 0.0), options or {}, label_smoothing).float()
        losses = (each or next(iter(self.losses.values())))(output.float(), wanted).where(known, 0.0)
        if class_weights is not None:
            losses = losses * class_weights
        return losses.sum() / self.weigh_images(targets, class_weights).sum().clamp(min=1e-12)

    def join_options(self, records: Sequence[Any]) -> dict[str, Any]:
        """Lists of a number an output one after another, where all tasks have them."""
        lists = {name for one in records for name, value in one.options.items() if isinstance(value, list)}
        shared = [name for name in sorted(lists) if all(name in one.options for one in records)]
        return {name: [value for one in records for value in one.options[name]] for name in shared}

    @abstractmethod
    def to_trained(self, targets: Tensor, options: Mapping[str, Any], label_smoothing: float) -> Tensor:
        """Targets as the outputs of a model that is trained shall be."""

    @abstractmethod
    def list_entries(self, answer: Any, view: View) -> list[tuple[Color, str]]:
        """A colour and a line of text for everything that an answer tells."""

    def draw(self, answer: Any, view: View) -> Image.Image:
        """The image above a legend of its answer."""
        return add_legend(view.image, self.list_entries(answer, view))


def read_numbers(options: Mapping[str, Any], name: str, count: int) -> list[float]:
    """The list of that name among options: one finite number for each output. Raises ValueError for anything else."""
    given = options.get(name)
    usable = isinstance(given, list) and len(given) == count
    if not usable or not all(type(one) in (int, float) and np.isfinite(one) for one in given or ()):
        raise ValueError(f"{name} is {str(given)[:80]}; expected a list of {count} numbers")
    return [float(one) for one in given or ()]


def refuse_others(options: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    """Raise ValueError for an option that is not among the known ones."""
    if foreign := sorted(options.keys() - set(known)):
        raise ValueError(f"a {kind} task has no option {foreign[0]!r}; it has {', '.join(known)}")
