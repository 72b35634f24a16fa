"""Weights that several tasks train together, each through a patched model of its own.

    dL/dW = sum_t s_t dL_t/dW          s_t the share of task t, adding up to 1

Mudrakarta, Sandler, Zhmoginov, Howard: *K for the Price of 1* (ICLR 2019), section 4.3. The models read the same bytes; the
gradients of all tasks are added up here, and one step is taken when every task has taken its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.method import METHODS, Method
from modelpatch.patch.blueprint import Graft
from modelpatch.patch.changes import Reweighting
from modelpatch.patch.model import PatchedModel
from modelpatch.train.distributed import Team


class SharedWeights:
    """The weights of `backbone`, a copy, which `method` would train in a patch.

    Its rates, weight decay and optimizer are the shared weights'; its settings of heads are not used. Raises `MethodError`
    for a method that trains anything but weights as they are: masks, added modules and statistics belong to a task.
    """

    def __init__(self, backbone: Backbone, method: Method) -> None:
        self.backbone, self.method = backbone, method
        owned, parameters = method.blueprint(backbone).owned, dict(backbone.module.named_parameters())
        able = all(one.shares_across_tasks and not getattr(one, "reinitialize", False) for one in method.members)
        if not able or set(owned) - parameters.keys():
            names = [kind.name for kind in METHODS.values() if kind.shares_across_tasks]
            raise MethodError(
                f"{method.name} with these options does more than train weights as they are, which is all that tasks can "
                f"share. Name as shared {', '.join(names)}, with frozen statistics."
            )
        self._candidates = {name: parameters[name] for name in owned}
        for parameter in self._candidates.values():
            parameter.requires_grad_()
        self.weights: dict[str, nn.Parameter] = {}  # those that a task's model reads
        self.origins: Mapping[str, Graft] = {}  # none of them was added

    def join(self, model: PatchedModel, private: Method, share: float) -> None:
        """Register gradient hooks on the shared weights of a task's model. Call it before the first step, for all tasks.

        Raises `MethodError` for a private method whose patches would not follow the weights as they move.
        """
        if model.reading.both:
            raise MethodError(f"{private.name}: a siamese head reads the base's own features, which move here.")
        for base, path in model.reweighted.items():
            if _is_fixed(model.get_submodule(path), self.backbone.chain.tensor(base)):
                raise MethodError(
                    f"{private.name} holds weights at the base's values, which move here. Choose another private method."
                )
        places = {parameter.data_ptr(): name for name, parameter in self._candidates.items()}
        for parameter in model.parameters():
            name = places.get(parameter.data_ptr())
            if name is not None and parameter.requires_grad:
                self.weights[name] = self._candidates[name]
                parameter.register_post_accumulate_grad_hook(partial(self._collect, self._candidates[name], share))

    @staticmethod
    def _collect(weight: nn.Parameter, share: float, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if weight.grad is None:
            weight.grad = share * parameter.grad
        else:
            weight.grad.add_(parameter.grad, alpha=share)
        parameter.grad = None

    def begin(self, private: Method) -> None:
        """After the last `join`: make the optimizer. Raises `MethodError` where nothing is left to share."""
        if not self.weights:
            raise MethodError(
                f"{private.name} makes everything private that {self.method.name} would share. Use `modelpatch fit` for "
                "tasks that share nothing, or choose a smaller private method."
            )
        self.optimizer = self.method.make_optimizer(self, self.backbone)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights by the names that they would have in a patch file."""
        return ((f"replace/{name}", weight) for name, weight in self.weights.items())

    def step(self, factor: float, clip: float, team: Team) -> None:
        """One step at `factor` times the method's learning rates with the gradients of all the team's processes."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        team.add_up_gradients(self.weights.values())
        if clip:
            nn.utils.clip_grad_norm_(self.weights.values(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> dict[str, Any]:
        """Return the state that an interrupted run resumes from."""
        return {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        for name, weight in self.weights.items():
            weight.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])


def _is_fixed(module: nn.Module, weight: Tensor) -> bool:
    """Return True for a reweighting whose result does not depend on the given weight."""
    assert isinstance(module, Reweighting)
    given = weight.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(module(given).sum(), given, allow_unused=True)[0] is None
