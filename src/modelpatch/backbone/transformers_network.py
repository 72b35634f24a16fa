"""A vision model of `transformers` as a network from images to one tensor.

    images -> model -> logits                        of a model with a classifier, whose input are the features
                    -> image_embeds, pooler_output   of a tower, as its makers pool it
                    -> the mean of tokens or of the last map, where a model does not pool

The network has the model's own modules under the model's own names, so that its state dicts and PEFT's folders fit.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.cuts import has_children, opens

POOLED = ("logits", "image_embeds", "pooler_output")


class TransformersNetwork(nn.Module):
    """Images (B, C, H, W) to logits (B, K), or to features (B, D) of a model without a classifier.

    With `reversed_channels` the model reads blue before red, and gets its images so. `opened` are the modules inside of which
    the blocks are, for the chain.
    """

    def __init__(self, model: Any, reversed_channels: bool = False) -> None:
        super().__init__()
        model = _with_sized_tables(model)
        self._share(model)
        self.reversed_channels = reversed_channels
        self.base_model_prefix = model.base_model_prefix  # which PEFT reads beside the configuration
        self.heads = find_heads(model)
        self.opened = frozenset(_find_opened(model))
        headless = copy.copy(model)  # shares all but the classifiers
        headless._modules = {
            name: nn.Identity() if any(head.split(".")[0] == name for head in self.heads) else child
            for name, child in model._modules.items()
        }
        self._headless = (headless,)
        taken = inspect.signature(model.forward).parameters
        self.interpolates = "interpolate_pos_encoding" in taken
        self.image_size = image_size_of(model.config)

    def _share(self, model: Any) -> None:
        """Have the model's modules and tensors as one's own; the model itself is kept aside, in no name."""
        self._model = (model,)
        for part in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[part] = model.__dict__[part]

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model[0].config

    def forward(self, images: Tensor) -> Tensor:
        return pool(self._run(self._model[0], images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The input of the classifiers, the mean if there are several that read different tokens."""
        return pool(self._run(self._headless[0], images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The features themselves: several classifiers cannot be computed from their mean."""
        if not pre_logits:
            raise NotImplementedError("the logits need the whole network")
        return features

    def get_classifier(self) -> nn.Module | list[nn.Module]:
        """The classifier; several in a list; an identity for a model that has none."""
        found = [self.get_submodule(name) for name in self.heads]
        return found if len(found) > 1 else found[0] if found else nn.Identity()

    def train(self, mode: bool = True) -> "TransformersNetwork":
        for model in (self._model[0], self._headless[0]):
            model.training = mode
        return super().train(mode)

    def _run(self, model: Any, images: Tensor) -> Any:
        images = images.flip(1) if self.reversed_channels else images
        resized = self.interpolates and images.shape[-1] != self.image_size
        return model(pixel_values=images, **({"interpolate_pos_encoding": True} if resized else {}))


def pool(output: Any) -> Tensor:
    """The one tensor of a model's output that stands for a whole image."""
    for name in POOLED:
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    maps = getattr(output, "feature_maps", None)
    last = maps[-1] if maps else output.last_hidden_state
    return last.mean(1) if last.ndim == 3 else last.mean((2, 3))


def image_size_of(config: Any) -> int | None:
    """The pixels that a configuration names for square images; None where it names none."""
    size = getattr(config, "image_size", None)
    first, *rest = size if isinstance(size, list | tuple) else [size]
    return first if type(first) is int and all(one == first for one in rest) else None


def find_heads(model: Any) -> list[str]:
    """The names of the classifiers: modules outside of the trunk that end in as many outputs as there are labels.

    A layer in a Sequential with nothing else that has weights stands for it; other composite heads count as one module.
    """
    outputs, trunk = getattr(model.config, "num_labels", 0), getattr(model, model.base_model_prefix or "", None)
    heads: list[str] = []
    if "ForImageClassification" not in type(model).__name__:
        return heads
    for name, child in model.named_children():
        linear = [one for one in child.modules() if isinstance(one, nn.Linear)]
        if child is trunk or not linear or linear[-1].out_features != outputs:
            continue
        weighted = [inner for inner, part in child.named_children() if any(True for _ in part.parameters())]
        alone = isinstance(child, nn.Sequential) and len(weighted) == 1
        heads.append(f"{name}.{weighted[0]}" if alone else name)
    return heads


class SizedTable(nn.Module):
    """A module that reads nothing of an image but its size, such as rotary positions: it is given a blank one.

    So the chain knows that its table is the same for every image.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Any:
        return self.table(torch.zeros(1, *images.shape[1:], dtype=images.dtype, device=images.device))


def _with_sized_tables(model: Any) -> Any:
    """The model, or where it has tables of positions a shallow copy whose modules for them are told the size alone."""
    tables = {
        name: SizedTable(child)
        for name, child in model.named_children()
        if "rope" in name and not has_children(child) and not any(True for _ in child.parameters())
    }
    if tables:
        model = copy.copy(model)
        model._modules = {name: tables.get(name, child) for name, child in model._modules.items()}
    return model


def _find_opened(model: nn.Module) -> Iterator[str]:
    """The modules on the way to those whose parts run one after another, and tables of positions."""
    for name in _find_outermost(model):
        yield from (name[:place] for place, letter in enumerate(name) if letter == ".")
    yield from (name for name, child in model.named_children() if isinstance(child, SizedTable))


def _find_outermost(module: nn.Module, name: str = "") -> Iterator[str]:
    if name and opens(module):
        yield name
        return
    for part, child in module.named_children():
        yield from _find_outermost(child, f"{name}.{part}".lstrip("."))
