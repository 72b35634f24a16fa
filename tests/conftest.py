"""Fixtures: tiny real networks, made-up images for fast tests, the command line in this process, the real images and backbone
for `real` tests."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.places import CACHE, SEARCHED
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.base import SOURCES as BACKBONES
from modelpatch.cli.main import app, main
from modelpatch.data.sources.base import SOURCES as DATA_SOURCES
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.heads.base import HEADS
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.registry import METHODS
from modelpatch.patch.blueprint import GRAFTS
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.registry import Registry
from modelpatch.serve.client import Client
from modelpatch.store.store import Store
from modelpatch.tasks.kind import KINDS
from modelpatch.tasks.record import TaskRecord

SHARED = Path(os.environ.get("MODELPATCH_SHARED", Path(__file__).parents[2] / "shared"))
CLASSES = ("red", "green", "blue")
HOSTILE_ARGUMENTS: list[tuple[str, object]] = [
    ("pretrained_cfg", "x"),
    ("pretrained_cfg_overlay", {"file": "evil.pth"}),
    ("checkpoint_path", "evil.pth"),
    ("cache_dir", "/tmp"),
    ("hf_hub_id", "evil/evil"),
    ("weights", "evil.safetensors"),
    ("features_only", True),
    ("spec", "file:evil.safetensors"),
    ("classifier", "fc"),
    ("segments", ["fc"]),
    ("preprocessing", None),
    ("block_args", {"a": 1}),
    ("block_args", [[{"a": 1}]]),
    ("act_layer", "\x1b[31m"),
    ("act_layer", "a" * 1000),
    ("num_classes", 10**9),
    ("num_classes", -(10**9)),
    ("dims", [8] * 1000),
    ("a" * 1000, 1),
    ("a\nb", 1),
]  # what no file may pass to the constructor of a network


def skip_without(*libraries: str) -> None:
    """Skip a file of tests where a library is not installed; none is imported before a test needs it."""
    for library in libraries:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed", allow_module_level=True)


class Library:
    """A library that is imported when a test first uses it; a file of tests is skipped where it is not installed."""

    def __init__(self, name: str) -> None:
        skip_without(name.partition(".")[0])
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


def pytest_configure() -> None:
    """Collect all of the garbage less often: it takes a tenth of the time otherwise."""
    gc.set_threshold(700, 10, 50)


def pytest_collection_finish() -> None:
    """Leave what imports and collection made out of every later garbage collection: it is most of all objects, and stays."""
    gc.collect()
    gc.freeze()


class TinyNet(nn.Module):
    """Two stages of residual blocks over 16 px images: BatchNorm, a depthwise convolution, in-place activations."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage1 = nn.Sequential(TinyBlock(8, 8, 1), TinyBlock(8, 8, 1))
        self.stage2 = nn.Sequential(TinyBlock(8, 16, 2), TinyBlock(16, 16, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.flatten(self.pool(self.stage2(self.stage1(self.stem(x))))))


class TinyBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


def small_preprocessing(pixels: int = 16) -> Preprocessing:
    return Preprocessing(input_size=(3, pixels, pixels), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


@cache
def loaded_tiny(seed: int, outputs: int) -> Backbone:
    torch.manual_seed(seed)
    module = TinyNet(outputs)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, std=0.1)
            child.running_mean.normal_(std=0.1)
            child.running_var.uniform_(0.5, 1.5)
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    assert backbone.computing.record.probes  # taken once for all copies
    return backbone


def make_tiny(seed: int = 0, outputs: int = 5) -> Backbone:
    """A `TinyNet` with seeded weights and running statistics that are not the identity: a copy of one that was cut once."""
    loaded = loaded_tiny(seed, outputs)
    own = {id(programs): type(programs)(programs) for programs in loaded.chain.sizes._steps.values()}  # it shares them
    torch.manual_seed(seed)
    return copy.deepcopy(loaded, own)


@pytest.fixture
def tiny() -> Backbone:
    return make_tiny()


def make_timm(name: str, pixels: int, **arguments: object) -> Backbone:
    """A timm architecture with seeded random weights at a small image size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, num_classes=7, **arguments)
    return load_backbone(module, preprocessing=small_preprocessing(pixels))


def color_task(count: int = 24, pixels: int = 16, seed: int = 0) -> Task:
    """Noisy squares of three colours: a task that a linear head can learn from almost any features."""
    generator = np.random.default_rng(seed)

    def split(rows: int) -> Split:
        labels = np.arange(rows) % 3
        images = generator.integers(0, 120, (rows, pixels, pixels, 3), dtype=np.uint8)
        images[np.arange(rows), :, :, labels] += 120
        return Split(list(images), labels.astype(np.int64))

    return Task(TaskRecord(name="colors", classes=CLASSES), split(count), split(12))


@pytest.fixture
def colors() -> Task:
    return color_task()


def draft_patch(backbone: Backbone, method: Method | None = None, classes: int = 3, seed: int = 0) -> Patch:
    """A patch with random numbers where a trained one would have learned ones; no training needed."""
    method = method or LinearProbe()
    # the generator itself: beside a server of this process that compiles, `torch.manual_seed` meets the state of torch.export
    torch.default_generator.manual_seed(seed)
    model: PatchedModel = method.draft(backbone, classes)
    with torch.no_grad():
        for name, tensor in model.state().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * (0.1 if "running_var" in name else 0.2))
    return model.to_patch(("draft", [f"class {i}" for i in range(classes)]), method=method.name)


def write_folder(root: Path, classes: Sequence[str] = CLASSES) -> Path:
    """Class folders `train/` and `test/` with the pictures of `color_task` as small PNG files."""
    data = color_task()
    for name, split in (("train", data.train), ("test", data.test)):
        for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            folder = root / name / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03}.png")  # type: ignore[arg-type]
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "colors")


# open vocabularies --------------------------------------------------------------------------------------------

CLIP_MODELS = ("modelpatch-test-vit", "modelpatch-test-resnet")
CLIP_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CLIP_VISION = (
    {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None},
)


@pytest.fixture(scope="session")
def clip_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small models of open_clip's kinds, known to it by the names `CLIP_MODELS`."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    for name, vision in zip(CLIP_MODELS, CLIP_VISION, strict=True):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": CLIP_TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture
def clip(clip_models: None) -> Backbone:
    """A small open_clip vision transformer with random weights."""
    return load_backbone(f"openclip:{CLIP_MODELS[0]}", pretrained=False)


@pytest.fixture(scope="session")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small sentence encoder with random weights and a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "of",
        "photo",
        "and",
        "cat",
        "dog",
        "two",
        "dogs",
        "car",
        "truck",
        "ship",
        "bird",
        "deer",
        "frog",
        "horse",
        "airplane",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own: what they load is not remembered for their user, nor found by another test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        patch.delenv(SEARCHED, raising=False)
        yield


# the command line -------------------------------------------------------------------------------------------


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `modelpatch ARGUMENTS` in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["modelpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code
        return Result(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders that many tests read."""
    return write_folder(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="session")
def patches(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two patches of different tasks and methods, each trained for one epoch."""
    root = tmp_path_factory.mktemp("patches")
    paths = {method: root / f"{method}.safetensors" for method in ("linear-probe", "scale-bias")}
    other = write_folder(root / "shades", ("dark", "light", "medium"))
    for (method, path), data in zip(paths.items(), (folder, other), strict=True):
        result = CliRunner().invoke(app, ["fit", str(data), "-o", str(path), "-m", method, "--epochs", "1"])
        assert result.exit_code == 0, result.output
    return paths


# serving ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of four drafted patches for the tiny network."""
    from serving import fill

    return fill(tmp_path / "store")


@pytest.fixture
def server(store: Store) -> Iterator[Any]:
    """A server over that store, in a thread of this process."""
    from serving import serving

    with serving(store) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    """A client of that server, with its token."""
    with server.client() as opened:
        yield opened


@pytest.fixture
def image() -> bytes:
    """An encoded image of noise."""
    from serving import picture

    return picture()


# real -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks one of the real data sets once a session; skips where they are absent."""
    root = tmp_path_factory.mktemp("real")

    def unpack(name: str) -> Path:
        archive = SHARED / "data" / f"{name}.tar"
        if not archive.exists():
            pytest.skip(f"the real images {archive} are not on this machine")
        if not (root / name).exists():
            with tarfile.open(archive) as tar:
                tar.extractall(root, filter="data")
        return root / name

    return unpack


@pytest.fixture(scope="session")
def real_backbone() -> Backbone:
    """The real ImageNet MobileNetV2; skips where it is absent."""
    path = SHARED / "weights" / "mobilenetv2_100_imagenet.safetensors"
    if not path.exists():
        pytest.skip(f"the real backbone {path} is not on this machine")
    return load_backbone(f"file:{path}")


@contextmanager
def forgetting(registry: Registry[Any]) -> Iterator[None]:
    """A context at whose end a registry forgets the names that were registered in it."""
    registry.names()  # the package's own files stay registered
    before = dict(registry._registered)
    try:
        yield
    finally:
        registry._registered = before


@pytest.fixture(scope="module")
def small_bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`bundled:tiny` with the same names, fewer blocks and channels, random weights and 32 px: a tenth of the time."""
    folder = tmp_path_factory.mktemp("assets")
    bundled = load_backbone("bundled:tiny")
    arguments = {**bundled.arguments, "depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}
    preprocessing = bundled.preprocessing.with_image_size(32)
    architecture = "convnext_atto"
    small = load_backbone(f"timm:{architecture}", pretrained=False, preprocessing=preprocessing, **arguments)
    small.classes = bundled.classes
    save_backbone(small, folder / "tiny.safetensors", architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelpatch.backbone.sources.file.ASSETS", folder)
        yield


@pytest.fixture
def registries() -> Iterator[None]:
    """Registries that forget after the test what it registers."""
    with ExitStack() as stack:
        for registry in (BACKBONES, GRAFTS, HEADS, KINDS, METHODS, DATA_SOURCES):
            stack.enter_context(forgetting(registry))
        yield
