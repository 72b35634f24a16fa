"""PAINT: fine-tune the body under a head that does not move, then go back a part of the way to where it started.

    theta_alpha = (1 - alpha) theta_0 + alpha theta_1          alpha is the patch's strength, chosen afterwards

Ilharco, Wortsman, Gadre, Song, Hajishirzi, Kornblith, Farhadi, Schmidt: *Patching open-vocabulary models by interpolating
weights* (NeurIPS 2022), section 2. The paper's head is made of class names. With a closed vocabulary it is a linear probe
that stays frozen: trained together with the body it would belong to theta_1 alone. `recipes/painting.py` does all steps.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.fingerprint import hash_tensors
from modelpatch.errors import MethodError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.method import register_method
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel


@dataclass(frozen=True)
class Start:
    """Start of a fine-tuning besides the base's weights: a head that stays, and weights by the base's names."""

    head: nn.Module | None = None
    body: Mapping[str, Tensor] = field(default_factory=dict)


@register_method
class Paint(FullFinetune):
    """Trains every parameter of the body under a frozen head: `head_from` names a patch file of the task, a linear probe for
    one, whose head it is. Without any the head is trained along (the naive way). `start` is for Python.
    """

    name = "paint"
    paper = "Ilharco et al., Patching open-vocabulary models by interpolating weights, NeurIPS 2022"
    order = 11
    shares_across_tasks = False
    stands_alone = True

    head_from: str | None = None
    start: Start | None = field(default=None, repr=False, compare=False)

    def make_head(self, backbone: Backbone, classes: int) -> nn.Module:
        """The head that stays, or a fresh one. Raises `MethodError` for one of another width."""
        if self.start and self.start.head is not None:
            head: Any = copy.deepcopy(self.start.head)
        elif self.head_from is not None:
            patch = Patch.load(self.head_from)
            patch.check_backbone(backbone)
            head = patch.head.build()
            head.load_state_dict({name: tensor.float() for name, tensor in patch.head_tensors.items()})
        else:
            return super().make_head(backbone, classes)
        if classes != (outputs := head.record.outputs):
            raise MethodError(f"paint: the head has {outputs} outputs, the task {classes} classes. Give the task's.")
        return head.requires_grad_(False)

    @property
    def has_own_head(self) -> bool:
        return self.head_from is not None or bool(self.start and self.start.head)

    @torch.no_grad()
    def initialise(self, model: PatchedModel, backbone: Backbone) -> None:
        for name, value in self.start.body.items() if self.start else ():
            local = model.names.get(f"replace/{name}")
            if local is None:
                raise MethodError(f"paint: the given weights hold {name}, which is not trained here.")
            model.get_parameter(local).copy_(value)

    def hyperparameters(self) -> dict[str, Any]:
        """Plain values; a digest stands for `start`, so that runs are told apart."""
        plain = super().hyperparameters()
        if (start := plain.pop("start")) is None:
            return plain
        head = {} if start.head is None else {f"head.{name}": one for name, one in start.head.state_dict().items()}
        return {**plain, "start": hash_tensors([*head.items(), *start.body.items()])[:16]}
