"""Fine-tune some blocks of the backbone and a head: the body of SubTuning.

    f = chain with theta_S trained from the pretrained values, S a subset of the blocks; all else frozen

Kaplun, Gurevich, Swisa, David, Shalev-Shwartz, Malach: *Less is More: Selective Layer Finetuning with SubTuning*
(2023), section 2. Blocks are chosen by the profile and by greedy selection there; here they are named.
"""

import copy
from dataclasses import field
from typing import Annotated

from pydantic import Field, NonNegativeFloat
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodNotApplicableError
from modelpatch.methods.blocks import Statistics, find_segments, own_segments, start_at
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.model import PatchedModel


@register_method
class Subset(Method):
    """Trains every parameter of the named blocks: `Subset("layer4")`, `Subset(("layer3.1", "layer4"))`.

    `blocks` needs no keyword. It holds names of segments (`layer4.1`), prefixes of names (`layer4`), stages (`stage0`,
    `stage-1`) or `last`, the last block; a name that the network itself uses means the network's. `statistics="learned"`
    runs their BatchNorm layers in train mode and stores what they learn, which needs large batches. `reinitialize`, the
    paper's control, resets every layer with a `reset_parameters`; frozen statistics and other parameters (a layer scale)
    keep the base's values.
    """

    name = "subset"
    paper = "Kaplun et al., Less is More: Selective Layer Finetuning with SubTuning, 2023"
    order = 4
    compared = ("subset",)
    searched = ("subset", "scale-bias+subset")
    shares_across_tasks = True
    names_blocks = True

    blocks: Annotated[tuple[str, ...], Field(min_length=1)] = field(default=("last",), kw_only=False)
    statistics: Statistics = "frozen"
    weight_decay: NonNegativeFloat = 1e-2
    reinitialize: bool = False

    def changes(self, backbone: Backbone) -> Blueprint:
        return own_segments(find_segments(backbone, self.blocks), self.statistics)

    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        """Draw the blocks' values anew if they are to be. Raises `MethodNotApplicableError` if no layer can be reset."""
        if self.reinitialize:
            for segment in find_segments(backbone, self.blocks):
                start_at(model, segment, self._reset(segment.module))

    def _reset(self, module: nn.Module) -> nn.Module:
        """A copy whose layers drew their values anew. Statistics of BatchNorm stay where they are frozen."""
        fresh = copy.deepcopy(module)
        layers = [layer for layer in fresh.modules() if callable(getattr(layer, "reset_parameters", None))]
        if not layers:
            raise MethodNotApplicableError(f"{type(module).__name__} has no layer that says how it is initialised.")
        for layer in layers:
            layer.reset_parameters()  # type: ignore[operator]
        if self.statistics == "frozen":
            for name, buffer in module.named_buffers():
                fresh.get_buffer(name).copy_(buffer)
        return fresh
