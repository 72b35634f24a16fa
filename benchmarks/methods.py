"""What methods cost: their training steps and memory beside plain PyTorch, and the size and speed of mask files.

    step      milliseconds of a training step of every method beside the same method by hand (`by_hand.py`), no cache
    memory    live bytes of a Piggyback run beside backbone + 12 bytes a masked weight + activations, and beside by hand
    masks     bits a weight of trained masks beside their entropy, decoding speed, seconds from the file to a bound patch

    python benchmarks/methods.py --json benchmarks/results/methods.json

MobileNetV2 has its ImageNet weights; ResNet-50 random ones, which its masks are trained on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import modelpatch as mp
from by_hand import BY_HAND, everything, piggyback
from common import mobilenet, report, timed, unpack
from modelpatch.data.images import ImageStore
from modelpatch.data.task import Task
from modelpatch.engine import BoundPatch
from modelpatch.methods.piggyback import weight_names
from modelpatch.patch.entropy import decode_bits, encode_bits
from modelpatch.train import Callback, Trainer
from modelpatch.train.fitting import Fit
from modelpatch.train.settings import FitSettings

PIXELS, BATCH, WARM = 64, 32, 3
Rows = list[tuple[Any, ...]]


def load(name: str) -> mp.Backbone:
    return (
        mp.load_backbone(mobilenet())
        if name == "mobilenetv2_100"
        else mp.load_backbone("timm:resnet50", pretrained=False)
    )


class StepTimes(Callback):
    """Seconds from the end of each step to the end of the next one, its batch included."""

    def on_train_begin(self, trainer: Trainer) -> None:
        self.seconds: list[float] = []
        self.begin = time.perf_counter()

    def on_step_end(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.begin)
        self.begin = now


def time_steps(data: Task, backbone: mp.Backbone, method: mp.methods.Method) -> list[float]:
    """Seconds of each step of the library's own loop."""
    settings = FitSettings(epochs=1, batch_size=BATCH, image_size=PIXELS, cache=False, augment="none")
    run, times = Fit(backbone, data, method, settings), StepTimes()
    run.make_trainer(run.build(), [times]).train()
    return times.seconds


def hand_steps(data: Task, model: Any, optimizer: torch.optim.Optimizer, backbone: mp.Backbone) -> list[float]:
    store = ImageStore(data.train, backbone.preprocessing.with_image_size(PIXELS), 2**31)
    seconds = []
    for rows in torch.arange(len(store)).split(BATCH):
        begin = time.perf_counter()
        images = store.plain(rows).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(images), store.labels[rows])
        if hasattr(model, "penalty"):
            loss = loss + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure_steps(data: Task, rounds: int, names: list[str]) -> Rows:
    backbone = load("mobilenetv2_100")
    rows: Rows = []
    for name in names:
        ours: list[float] = []
        hand: list[float] = []
        for _ in range(rounds):
            model, optimizer = BY_HAND[name](copy.deepcopy(backbone.module), len(data.classes))
            hand += hand_steps(data, model, optimizer, backbone)[WARM:]
            ours += time_steps(data, backbone, mp.methods.make_method(name))[WARM:]
        both = 1e3 * statistics.median(ours), 1e3 * statistics.median(hand)
        rows.append(("step", name, "ms a step", *both, both[0] / both[1], "at most 1.10"))
    return rows


# memory -----------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made while it is active, now and at most; what kernels use inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        before = {id(t.untyped_storage()): t for t in _tensors((arguments, keywords))}
        known = {t.untyped_storage().data_ptr() for t in before.values()}
        result = function(*arguments, **(keywords or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage.data_ptr() not in known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, values)
    return found


def measure_memory(data: Task, names: list[str]) -> Rows:
    rows: Rows = []
    for name in names:
        backbone = load(name)
        base = sum(tensor.nbytes for tensor in backbone.module.state_dict().values())
        masked = sum(backbone.chain.tensor(weight).numel() for weight in weight_names(backbone))
        few = replace(data, train=data.train.take(np.arange(3 * BATCH)))
        activations = _activations(few, backbone)
        with LiveBytes() as live:
            time_steps(few, backbone, mp.methods.Piggyback())
        ours = base + live.most - _images(few, backbone)
        with LiveBytes() as live:
            model, optimizer = piggyback(_with_classifier(backbone), len(data.classes))
            hand_steps(few, model, optimizer, backbone)
        hand = base + live.most - _images(few, backbone)
        bound = base + 3 * masked * 4 + activations
        rows.append(("memory", name, "MB, by hand", ours / 1e6, hand / 1e6, ours / hand, ""))
        rows.append(("memory", name, "MB, bound", ours / 1e6, bound / 1e6, ours / bound, "at most 1"))
    return rows


def _with_classifier(backbone: mp.Backbone) -> Any:
    network = copy.deepcopy(backbone.module)
    network.classifier = getattr(network, "classifier", None) or network.fc
    return network


def _images(data: Task, backbone: mp.Backbone) -> int:
    """Bytes of the decoded images, which are no part of a training step."""
    side = backbone.preprocessing.with_image_size(PIXELS).resize_to
    return len(data.train) * 3 * side * side


def _activations(data: Task, backbone: mp.Backbone) -> int:
    """Bytes that a forward pass keeps where every weight needs a gradient."""
    model, _ = everything(_with_classifier(backbone), len(data.classes))
    store = ImageStore(data.train, backbone.preprocessing.with_image_size(PIXELS), 2**31)
    with LiveBytes() as live:
        images = store.plain(torch.arange(BATCH)).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(images), store.labels[:BATCH])
        kept = live.now
    del loss
    return kept


# masks ------------------------------------------------------------------------------------------------------


def measure_masks(data: Task, epochs: dict[str, int], folder: Path) -> Rows:
    rows: Rows = []
    for name, count in epochs.items():
        backbone = load(name)
        path = folder / f"{name}.safetensors"
        patch = mp.fit(backbone, data, mp.methods.Piggyback(lr=1e-3), epochs=count, image_size=PIXELS, out=path)
        figures = patch.inspect().masks
        assert figures is not None
        rows.append(
            ("masks", name, "bits a weight", figures.bits_per_weight, figures.bound, figures.bits_per_weight / figures.bound,
             f"at most 1.04; {1 - figures.kept:.1%} masked, {path.stat().st_size:,} bytes, packed {figures.weights // 8:,}")
        )  # fmt: skip
        bits = torch.cat([t.flatten() for n, t in patch.tensors.items() if n.startswith("mask/")]).numpy()
        stream = encode_bits(bits)
        seconds = statistics.median(timed(partial(decode_bits, stream))[1] for _ in range(7))
        rate = len(bits) / 8e6 / seconds
        rows.append(("masks", name, "MB/s of bits", rate, 40.0, rate / 40, "at least 1"))
        ready = statistics.median(timed(partial(bind, backbone, path))[1] for _ in range(7))
        rows.append(("masks", name, "s, file to ready", ready, 0.5, ready / 0.5, "at most 1 for resnet50"))
    return rows


def bind(backbone: mp.Backbone, path: Path) -> BoundPatch:
    return BoundPatch(backbone, mp.Patch.load(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=("step", "memory", "masks"), nargs="+", default=["step", "memory", "masks"])
    parser.add_argument("--methods", choices=BY_HAND, nargs="+", default=list(BY_HAND))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=320, help="Training images for steps and memory.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    data = mp.load_task(unpack("gtsrb", arguments.cache))
    few = data.subsample(arguments.images)
    rows: Rows = []
    if "step" in arguments.parts:
        rows += measure_steps(few, arguments.rounds, arguments.methods)
    if "memory" in arguments.parts:
        rows += measure_memory(few, ["mobilenetv2_100", "resnet50"])
    if "masks" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_masks(data, {"mobilenetv2_100": 5, "resnet50": 2}, Path(folder))
    title = f"{PIXELS} px, batches of {BATCH}, median of {arguments.rounds} rounds"
    report(title, ("part", "what", "unit", "ours", "other", "ratio", "asked"), rows, arguments.json)


if __name__ == "__main__":
    main()
