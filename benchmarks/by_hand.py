"""Every method as one would write it in plain PyTorch for timm's MobileNetV2: what `methods.py` compares the library with.

Each function takes the frozen network and the number of classes, and returns the model to train and its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Trainable = tuple[nn.Module, torch.optim.Optimizer]


def new_head(network: Any, classes: int) -> nn.Module:
    """The network, frozen and in eval mode, with a fresh classifier that is trained."""
    network.requires_grad_(False).eval()
    network.classifier = nn.Linear(network.classifier.in_features, classes)
    return network.classifier


def adam(*groups: tuple[list[nn.Parameter], float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": params, "lr": lr} for params, lr in groups], weight_decay=0.0, fused=True)


def train_named(network: Any, classes: int, chosen: Callable[[nn.Module], bool], lr: float) -> Trainable:
    """Train the parameters of the modules that are `chosen`, and the head."""
    head = new_head(network, classes)
    own = [p for m in network.modules() if m is not head and chosen(m) for p in m.parameters(recurse=False)]
    for parameter in own:
        parameter.requires_grad_(True)
    return network, adam((own, lr), (list(head.parameters()), 1e-2))


def linear_probe(network: Any, classes: int) -> Trainable:
    return train_named(network, classes, lambda module: False, 1e-3)


def scale_bias(network: Any, classes: int) -> Trainable:
    return train_named(network, classes, lambda module: isinstance(module, nn.BatchNorm2d), 1e-2)


def depthwise(network: Any, classes: int) -> Trainable:
    return train_named(network, classes, lambda module: isinstance(module, nn.Conv2d) and module.groups > 1, 1e-3)


def last_block(network: Any, classes: int) -> Trainable:
    inside = {id(module) for module in network.blocks[-1].modules()}
    return train_named(network, classes, lambda module: id(module) in inside, 1e-3)


def everything(network: Any, classes: int) -> Trainable:
    return train_named(network, classes, lambda module: True, 1e-3)


class Threshold(torch.autograd.Function):
    """1[r >= 0.005], straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return (scores >= 5e-3).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Masked(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.full_like(weight, 1e-2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * Threshold.apply(self.scores)


class Packed(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.kept = weight.abs() >= weight.abs().median()
        self.values = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept, weight, self.values)


def reparametrized(network: Any, classes: int, kind: type[nn.Module]) -> Trainable:
    """Every convolution's weight through a module of its own."""
    head = new_head(network, classes)
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", kind(module.weight.detach()))
    own = [p for name, p in network.named_parameters() if p.requires_grad and not name.startswith("classifier")]
    return network, torch.optim.Adam(
        [{"params": own, "lr": 3e-4}, {"params": head.parameters(), "lr": 1e-2}], fused=True
    )


def piggyback(network: Any, classes: int) -> Trainable:
    return reparametrized(network, classes, Masked)


def packnet(network: Any, classes: int) -> Trainable:
    return reparametrized(network, classes, Packed)


def lora(network: Any, classes: int) -> Trainable:
    """Through peft, on the same layers: dense convolutions within the blocks."""
    import peft

    names = [
        name for name, m in network.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Conv2d) and m.groups == 1
    ]
    head = new_head(network, classes)
    model = peft.get_peft_model(network, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names))
    own = [p for name, p in model.named_parameters() if "lora_" in name]
    head.requires_grad_(True)
    return model.eval(), adam((own, 2e-3), (list(head.parameters()), 1e-2))


class SkippingStage(nn.Module):
    """z_j = M_j(n_{j-1}) + sum of λ_ij n_i; the first block of a stage has no skip of its own."""

    def __init__(self, stage: Any, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(stage.children())
        width: int = stage[-1].bn3.num_features
        count, half = len(self.blocks), channels // 2
        self.edges = [(i, j) for j in range(2, count + 1) for i in range(1, j)]
        for block in stage:
            block.has_skip = False
        self.delta = nn.Sequential(
            nn.Conv2d(channels, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(half, len(self.edges)),
            nn.Sigmoid(),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.delta(x)
        nodes: list[Tensor] = []
        for j, block in enumerate(self.blocks, 1):
            z = block(x)
            for number, (i, to) in enumerate(self.edges):
                if to == j:
                    z = z + weights[:, number, None, None, None] * nodes[i - 1]
            x = self.norms[j - 1](z)
            nodes.append(x)
        return x


def delta(network: Any, classes: int) -> Trainable:
    """Δ-modules and BatchNorm in the last four stages that have more than one block."""
    head = new_head(network, classes)
    chosen = [number for number, stage in enumerate(network.blocks) if len(stage) > 1][-4:]
    for number in chosen:
        channels = network.blocks[number][0].conv_pw.in_channels
        network.blocks[number] = SkippingStage(network.blocks[number], channels)
    own = [p for name, p in network.named_parameters() if ".delta." in name or ".norms." in name]
    for number in chosen:
        network.blocks[number].delta.train()
        network.blocks[number].norms.train()
    return network, torch.optim.Adam(
        [{"params": own, "lr": 3e-3}, {"params": head.parameters(), "lr": 1e-2}], fused=True
    )


class AllBlocks(nn.Module):
    """Head2Toe before its choice: a head over the pooled outputs of all blocks, with a group lasso."""

    def __init__(self, network: Any, classes: int) -> None:
        super().__init__()
        new_head(network, classes)
        self.network = network
        self.pooled: list[Tensor] = []
        for module in (*(block for stage in network.blocks for block in stage), network.global_pool):
            module.register_forward_hook(lambda _, __, output: self.pooled.append(output))
        with torch.no_grad():
            network(torch.zeros(1, 3, 64, 64))
        self.head = nn.Linear(self._features().shape[1], classes)

    def _features(self) -> Tensor:
        flat = [out.mean((2, 3)) if out.ndim == 4 else out for out in self.pooled]
        self.pooled.clear()
        return torch.cat(flat, 1)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.network(images)
            features = self._features()
        return self.head(features)

    def penalty(self) -> Tensor:
        return 1e-4 * self.head.weight.norm(dim=0).sum()


def head2toe(network: Any, classes: int) -> Trainable:
    model = AllBlocks(network, classes)
    return model, adam((list(model.head.parameters()), 1e-2))


BY_HAND: dict[str, Callable[[Any, int], Trainable]] = {
    "linear-probe": linear_probe,
    "head2toe": head2toe,
    "scale-bias": scale_bias,
    "depthwise": depthwise,
    "delta(modules=4,batch_norm=true)": delta,
    "subset": last_block,
    "lora": lora,
    "piggyback": piggyback,
    "packnet": packnet,
    "full-finetune": everything,
}
