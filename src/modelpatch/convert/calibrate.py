"""Fit the scales of a lossy patch so that its outputs match those of the checkpoint it was extracted from.

    min_s  mean over images |logits(W + s sign(delta)) - logits(checkpoint)|² / variance of the checkpoint's logits

Signs and the choice of a scale per number stay fixed. The scales s, one or two an output channel, and the vectors (scale and
bias of norm layers, biases) are trained for a few hundred steps of Adam on unlabelled training images. Liu et al., *BitDelta*
(2024), section 3.1, scale distillation.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import TrainingError
from modelpatch.patch.codec import sizes_of
from modelpatch.patch.contents import Patch

RATE = 1e-2  # of the logarithm of a scale
STATISTICS = ("running_mean", "running_var")


def calibrate(
    backbone: Backbone, patch: Patch, teacher: nn.Module, batches: Callable[[int], Iterable[Tensor]], steps: int = 200
) -> Patch:
    """The patch with fitted scales. `batches(epoch)` yields normalised images (B, C, H, W) of the task in random order.

    Tensors keep their names and types. Raises `TrainingError` for a patch without scales, and below one step.
    """
    student = backbone.patched(patch)
    device = backbone.device
    found = {name: sizes_of(delta) for name, delta in patch.tensors.items() if name.startswith("delta/")}
    first = {name: sizes.to(device) for name, sizes in found.items() if sizes is not None}
    signs = {name: torch.where(patch.tensors[name] < 0, -1.0, 1.0).to(device) for name in first}
    places = {  # of each number's scale among the k of its channel: (C, N)
        name: (patch.tensors[name].to(device).flatten(1).abs() == sizes[:, -1:]).long() * (sizes.shape[1] - 1)
        for name, sizes in first.items()
    }
    if steps < 1:
        raise TrainingError(f"steps={steps} is too few. Expected at least 1.")
    if not signs:
        raise TrainingError(f"the patch of {patch.task.name} has no scales. Expected the codec sign or two-bit.")
    frozen = {name: tensor.detach() for segment in backbone.chain for name, tensor in segment.named_tensors()}
    logs = {name: torch.zeros_like(scale).requires_grad_(True) for name, scale in first.items()}
    vectors = {
        name: delta.float().to(device).clone().requires_grad_(True)
        for name, delta in patch.tensors.items()
        if name.startswith("delta/") and delta.ndim == 1 and not name.endswith(STATISTICS)
    }
    names = {name: student.names[f"replace/{name.removeprefix('delta/')}"] for name in (*signs, *vectors)}

    def sized(name: str) -> Tensor:
        sizes = (first[name] * logs[name].exp()).sort(1).values
        return signs[name] * sizes.gather(1, places[name]).view_as(signs[name])

    def weights() -> dict[str, Tensor]:
        made = {name: sized(name) for name in signs} | vectors
        return {names[name]: frozen[name.removeprefix("delta/")] + delta for name, delta in made.items()}

    groups = [{"params": list(logs.values()), "lr": RATE}, {"params": list(vectors.values()), "lr": RATE / 20}]
    search = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.LambdaLR(search, lambda done: 0.5 * (1 + math.cos(math.pi * done / steps)))
    for images in itertools.islice(itertools.chain.from_iterable(map(batches, itertools.count())), steps):
        with torch.no_grad():
            wanted = teacher(images)
        with torch.enable_grad():
            given = torch.func.functional_call(student, weights(), (images,))
            loss = (given - wanted).square().mean() / wanted.var().clamp(min=1e-12)
            search.zero_grad(set_to_none=True)
            loss.backward()
        search.step()
        schedule.step()
    with torch.no_grad():
        better = {name: (sized(name) + 0.0).cpu() for name in signs}
        better |= {name: vector.detach().cpu().to(patch.tensors[name].dtype) for name, vector in vectors.items()}
    return replace(patch, tensors={**patch.tensors, **better})
