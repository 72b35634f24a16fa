"""A few kilobytes of header do not cost gigabytes or minutes: what is too large is refused before it is built."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import draft_patch
from modelpatch import methods
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.computation import SIDES
from modelpatch.backbone.files import MAX_NUMBER, MAX_REPEATED, METADATA_KEY, check_arguments
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.sources import base
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.errors import BackboneError, ForeignTensorError, InvalidPatchError, ModelpatchError
from modelpatch.patch.blueprint import LARGEST, MOST_DEPTH, MOST_GRAFTS, MOST_ITEMS, Graft
from modelpatch.patch.codec import LEAST_NUMBERS, most_numbers
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.patch.finding import find_backbone

MEGABYTES = 10 * 2**20
SECONDS = 2.0  # of processor time, four times what is measured


class Allocations(TorchDispatchMode):
    """A context that adds up the bytes of all results of operations that are not on the meta device."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nbytes += sum(one.nbytes for one in tree_leaves(result) if isinstance(one, Tensor) and not one.is_meta)
        return result


@contextmanager
def cheap() -> Iterator[None]:
    """A context that may not allocate more than a few megabytes of tensors, nor take more than a moment of the processor."""
    begin = time.process_time()
    with Allocations() as counted:
        yield
    assert counted.nbytes < MEGABYTES
    assert time.process_time() - begin < SECONDS


def refused(backbone: Backbone, patch: Patch, match: str, kind: type[ModelpatchError] = ForeignTensorError) -> None:
    """Both ways to bind a patch refuse it."""
    engine = Engine(backbone, tuning=Tuning())
    for bind in (backbone.patched, lambda given: engine.add("task", given)):
        with cheap(), pytest.raises(kind, match=match):
            bind(patch)


def with_grafts(patch: Patch, change: Any) -> Patch:
    """The patch with other arguments of its added modules."""
    grafts = tuple(graft.model_copy(update={"arguments": {**graft.arguments, **change}}) for graft in patch.grafts)
    return replace(patch, grafts=grafts)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (methods.DeltaNetwork(), {"channels": 8192}),
        (methods.DeltaNetwork(), {"width": 8192}),
        (methods.Widened(), {"inputs": 8192, "outputs": 8192, "filters": 1024, "kernel": 7}),
        (methods.Widened(), {"filters": 9}),
    ],
    ids=["delta", "delta-norms", "widened", "one more"],
)
def test_modules_of_other_shapes_than_the_files_tensors_are_not_made(
    tiny: Backbone, method: Any, change: dict[str, int]
) -> None:
    patch = with_grafts(draft_patch(tiny, replace(method, batch_norm=True) if "width" in change else method), change)
    refused(tiny, patch, "what the patch adds expects")


def test_modules_are_not_added_thousands_of_times_to_a_span(tiny: Backbone) -> None:
    patch = draft_patch(tiny, methods.Widened())
    refused(tiny, replace(patch, grafts=patch.grafts[:1] * 2000), "2,000 times")
    refused(tiny, replace(patch, grafts=patch.grafts[:1] * (MOST_GRAFTS + 1)), "17 times")


@pytest.mark.parametrize(
    "value",
    [
        10**400,
        float("inf"),
        float("nan"),
        LARGEST + 1,
        "a" * 257,
        [0] * (MOST_ITEMS + 1),
        [[[[[[[[[]]]]]]]]],
        {"a" * 300: 1},
    ],
    ids=["int", "inf", "nan", "large", "word", "list", "deep", "key"],
)
def test_arguments_of_modules_have_a_size(value: Any) -> None:
    with pytest.raises(ValidationError):
        Graft(kind="lora", start=0, end=1, arguments={"rank": 1, "scale": value, "layers": []})
    assert MOST_DEPTH == 8


def test_a_scale_without_bounds_is_named(tiny: Backbone) -> None:
    pytest.importorskip("peft")
    patch = with_grafts(draft_patch(tiny, methods.LoRA(rank=1)), {"scale": 10**400})
    refused(tiny, patch, "do not fit segments")


def test_pictures_are_limited_by_the_network(tiny: Backbone) -> None:
    patch = draft_patch(tiny)
    for pixels in (4096, 8192, SIDES * tiny.input_size[1] + 1):
        large = replace(patch, preprocessing=patch.preprocessing.with_image_size(pixels))
        refused(tiny, large, f"more than {SIDES} times", BackboneError)
    tiny.check_image_size(2 * tiny.input_size[1])


@pytest.mark.parametrize("name", ["depth", "depths", "num_layers", "layers", "num_blocks", "block_count"])
def test_a_file_names_no_network_of_a_million_blocks(name: str) -> None:
    check_arguments({name: 24, "embed_dim": 4096})
    for value in (MAX_REPEATED + 1, [2, 2**20], 2**20):
        with pytest.raises(ValueError, match="no plain value"):
            check_arguments({name: value})
    with pytest.raises(ValueError, match="no plain value"):
        check_arguments({"embed_dim": MAX_NUMBER + 1})


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 24, "embed_dim": 2**20, "num_heads": 1}),
        ("torchvision:resnet50", {"groups": 1024, "width_per_group": 1024}),
        ("transformers:vit", {"num_hidden_layers": 2, "hidden_size": 2**20, "intermediate_size": 2**20}),
    ],
)
def test_a_network_that_the_memory_does_not_hold_is_weighed_before_it_is_built(
    tiny: Backbone, tmp_path: Path, spec: str, arguments: dict[str, Any]
) -> None:
    kind, _, name = spec.partition(":")
    pytest.importorskip(kind)
    described = {"architecture": name, "arguments": arguments, "preprocessing": None, "classes": [], "about": {}}
    path = tmp_path / "file.safetensors"
    save_file({"weight": torch.zeros(1)}, path, {METADATA_KEY: json.dumps(described)})
    record = draft_patch(tiny).backbone.model_copy(
        update={"spec": spec, "arguments": {**check_arguments(arguments), "pretrained": False}}
    )
    for load in (
        lambda: load_backbone(spec, pretrained=False, **arguments),
        lambda: find_backbone(record),
        *([lambda: load_backbone(f"file:{path}")] if kind == "timm" else []),
    ):
        with cheap(), pytest.raises(BackboneError, match=r"would take [\d,]+ GB; this machine has"):
            load()


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 1024, "embed_dim": 8, "num_heads": 1}),
        ("timm:resnet50", {"layers": [1024, 1024, 1024, 1024]}),
    ],
)
def test_a_network_of_thousands_of_modules_is_not_built(tiny: Backbone, spec: str, arguments: dict[str, Any]) -> None:
    """Small numbers whose sum takes minutes to build and to record, wherever a file may state them."""
    record = draft_patch(tiny).backbone
    given = {**check_arguments(arguments), "pretrained": False}
    with cheap(), pytest.raises(BackboneError, match="more than 4,096 modules"):
        find_backbone(record.model_copy(update={"spec": spec, "arguments": given}))


def test_modules_that_other_threads_make_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MOST_MODULES", 8)

    def build() -> nn.Module:
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(lambda: nn.Sequential(*(nn.ReLU() for _ in range(100)))).result()
        return nn.Sequential(nn.ReLU(), nn.ReLU())

    base.check_size(build, "it")
    with pytest.raises(BackboneError, match="it would have more than 8 modules"):
        base.check_size(lambda: nn.Sequential(*(nn.ReLU() for _ in range(9))), "it")


def test_a_network_is_weighed_by_its_parameters_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    for held in (size, size - 1):
        monkeypatch.setattr(base, "find_memory", lambda held=held: held)
        with nullcontext() if held == size else pytest.raises(BackboneError, match="it would take"):
            base.check_size(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), "it")


@pytest.mark.parametrize(
    "spec",
    [
        *(f"timm:test_{name}" for name in ("convnext", "resnet", "efficientnet", "vit", "mambaout")),
        "timm:swin_tiny_patch4_window7_224",
        "timm:levit_128",
        "torchvision:resnet18",
        "torchvision:fcn_resnet50",
        "torchvision:swin_t",
    ],
)
def test_networks_of_every_sort_can_be_weighed(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setattr(base, "find_memory", lambda: 1)
    with cheap(), pytest.raises(BackboneError, match="would take"):
        load_backbone(spec, pretrained=False, num_classes=3)


def test_weighing_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = load_backbone("timm:test_vit", pretrained=False, depth=1).fingerprint
    monkeypatch.setattr("modelpatch.backbone.sources.timm.check_size", lambda build, what: None)
    assert load_backbone("timm:test_vit", pretrained=False, depth=1).fingerprint == weighed


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32])
@pytest.mark.parametrize("name", ["replace/stage1.0.bn1.weight", "head.weight", "graft/1-2/scale"])
def test_numbers_of_another_kind_than_the_networks_are_refused(tiny: Backbone, name: str, dtype: torch.dtype) -> None:
    """Both ways to bind: one would convert them, the other fail in the middle of an answer."""
    patch = draft_patch(tiny, methods.ScaleBias())
    if name.startswith("graft/"):
        patch = draft_patch(tiny, methods.DeltaNetwork())
        name = next(one for one in patch.tensors if one.startswith("graft/"))
    other = replace(patch, tensors={**patch.tensors, name: torch.ones_like(patch.tensors[name]).to(dtype)})
    refused(tiny, other, f"{name} holds torch.* expects floating-point numbers")


def test_masks_do_not_unfold_without_end(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")
    patch = draft_patch(tiny)
    mask = torch.from_numpy(np.zeros((2, LEAST_NUMBERS), np.bool_))
    monkeypatch.setattr(
        "modelpatch.patch.codec.most_numbers", lambda size: mask.numel() + size
    )  # which no writer allows itself
    data = encode_patch(replace(patch, tensors={**patch.tensors, "mask/stage1.0.conv1.weight": mask}))
    assert len(data) < 20_000
    with cheap(), pytest.raises(InvalidPatchError, match="packed numbers; at most"):
        decode_patch(data)
    assert most_numbers(len(data)) > LEAST_NUMBERS
