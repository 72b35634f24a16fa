"""A backbone by name, from a file or from a module: the same network every time, or an error that says what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import HOSTILE_ARGUMENTS, SHARED, TinyNet, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import METADATA_KEY, save_backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, register_source
from modelpatch.errors import BackboneError, UnknownBackboneError, UntraceableBackboneError
from tolerance import close

SMALL = "test_resnet"  # timm's own network for tests: 0.5 million parameters at 160 px


def save_plain(path: Path, **metadata: str) -> Path:
    torch.manual_seed(0)
    module = timm.create_model(SMALL, num_classes=4)
    save_file(module.state_dict(), path, metadata)
    return path


# names ------------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed_and_leave_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    first = load_backbone(f"timm:{SMALL}", pretrained=False, seed=1)
    torch.manual_seed(6)
    again = load_backbone(f"timm:{SMALL}", pretrained=False, seed=1)
    other = load_backbone(f"timm:{SMALL}", pretrained=False, seed=2)
    assert first.fingerprints == again.fingerprints != other.fingerprints
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_backbone(f"timm:{SMALL}", pretrained=False)
    assert torch.equal(torch.rand(3), expected)


def test_other_threads_compute_while_a_backbone_is_loaded() -> None:
    other, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(1, 4)
    expected, done, wrong = other(x), threading.Event(), []

    def compute() -> None:
        while not done.is_set():
            try:
                assert close(other(x), expected)
            except Exception as error:
                wrong.append(error)

    computing = threading.Thread(target=compute)
    computing.start()
    for _ in range(3):
        make_tiny()
    done.set()
    computing.join()
    assert not wrong


def test_what_is_recorded_loads_the_same_backbone_again() -> None:
    first = load_backbone(f"timm:{SMALL}", pretrained=False, seed=3, num_classes=4)
    again = load_backbone(first.spec, **first.arguments)
    assert again.fingerprints == first.fingerprints
    assert again.arguments == first.arguments == {"num_classes": 4, "pretrained": False, "seed": 3}


def test_torchvision_networks_bring_their_published_preprocessing() -> None:
    backbone = load_backbone("torchvision:mobilenet_v3_small", pretrained=False)
    assert backbone.preprocessing.image_size == 224
    assert backbone.preprocessing.resize_to == 256
    assert backbone.classifier == "classifier.3"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("resnet18", r"Expected bundled:NAME, .*timm:NAME"),
        ("nonsense:resnet18", r"Expected bundled:NAME, .*timm:NAME"),
        ("timm:", r"Expected bundled:NAME, .*timm:NAME"),
        ("timm:resnet1888", "Similar: .*resnet1"),
        ("timm:qqqqqqqqqq", "list_models"),
        ("torchvision:resnet1888", "list_models"),
        ("torchvision:raft_small", "no model 'raft_small' that could be a backbone"),
        ("file:missing.safetensors", "missing.safetensors"),
        ("bundled:nonsense", "nonsense"),
    ],
)
def test_a_spec_that_names_nothing_says_what_would(spec: str, hint: str) -> None:
    random = {} if spec.startswith(("file:", "bundled:")) else {"pretrained": False}
    with pytest.raises(UnknownBackboneError, match=hint):
        load_backbone(spec, **random)


@pytest.mark.parametrize("spec", [1, None, b"timm:resnet18", nn.Identity, ""])
def test_a_spec_that_is_no_text_says_what_would(spec: Any) -> None:
    with pytest.raises(UnknownBackboneError, match=r"is not a backbone\. Expected bundled:NAME, .*timm:NAME"):
        load_backbone(spec)


@pytest.mark.parametrize("name", ["../assets/tiny", "/tiny", "a\0b", "a" * 5000])
def test_what_is_bundled_lies_in_the_package(name: str) -> None:
    with pytest.raises(UnknownBackboneError, match="bundles no backbone"):
        load_backbone(f"bundled:{name}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pretrained", "no"),
        ("pretrained", 0),
        ("weights", 3),
        ("preprocessing", 1),
        ("preprocessing", {"crop_pct": 1.0}),
        ("classifier", 3),
        ("segments", 3),
        ("segments", "stem"),
        ("segments", [1]),
        ("segments", None),
        ("seed", "x"),
        ("seed", 0.5),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_an_option_of_another_kind_is_an_error_that_quotes_it(option: str, value: Any) -> None:
    with pytest.raises(BackboneError, match=rf"{option} is {re.escape(repr(value))}; expected "):
        load_backbone("bundled:tiny", **{option: value})


@pytest.mark.parametrize("option", [{"segments": ["stam"]}, {"classifier": "stam"}])
def test_a_module_that_is_not_there_is_named_with_those_that_are(option: dict[str, Any]) -> None:
    with pytest.raises(UntraceableBackboneError, match=r"TinyNet has no module 'stam'.* It has: stem"):
        load_backbone(TinyNet(), preprocessing=small_preprocessing(), **option)


@pytest.mark.parametrize("option", [{"num_classes": 3}, {"pretrained": False}, {"weights": "x.safetensors"}])
def test_a_module_at_hand_cannot_be_built_in_another_way(option: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match="TinyNet is built already"):
        load_backbone(TinyNet(), preprocessing=small_preprocessing(), **option)


def test_a_network_over_images_that_are_not_supported_says_so() -> None:
    module = timm.create_model(SMALL, num_classes=4)
    module.pretrained_cfg = module.pretrained_cfg | {"interpolation": "hamming"}
    with pytest.raises(BackboneError, match=r"'interpolation' is not valid.*preprocessing="):
        load_backbone(module)
    assert load_backbone(module, preprocessing=small_preprocessing(160)).preprocessing == small_preprocessing(160)


def test_a_network_that_is_built_so_that_it_gives_something_else_is_refused() -> None:
    with pytest.raises(BackboneError, match="does not run on images"):
        load_backbone(f"timm:{SMALL}", pretrained=False, features_only=True)


@pytest.mark.parametrize("arguments", [{"pretrained": False}, {"weights": "other.safetensors"}])
def test_a_file_of_weights_cannot_be_asked_for_other_weights(arguments: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match="bundled:tiny is a file of weights"):
        load_backbone("bundled:tiny", **arguments)


@pytest.mark.parametrize("spec", [f"timm:{SMALL}", "torchvision:resnet18"])
def test_an_argument_that_the_architecture_lacks_is_named(spec: str) -> None:
    with pytest.raises(BackboneError, match="nonsense"):
        load_backbone(spec, pretrained=False, nonsense=1)


def test_a_module_is_frozen_where_it_is() -> None:
    module = TinyNet().train()
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    assert backbone.module is module
    assert backbone.spec == "module:TinyNet"
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert "TinyNet" in repr(backbone)


def test_the_base_answers_with_its_own_logits() -> None:
    backbone = load_backbone(TinyNet(classes=5), preprocessing=small_preprocessing())
    assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert backbone.input_size == (3, 16, 16)
    assert not backbone(torch.randn(1, 3, 16, 16)).requires_grad


# files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Backbone:
    return load_backbone(f"timm:{SMALL}", pretrained=False, num_classes=4)


def test_a_saved_backbone_loads_with_everything_it_had(small: Backbone, tmp_path: Path) -> None:
    small.classes = tuple("abcd")
    save_backbone(small, tmp_path / "base.safetensors", SMALL, licence="Apache-2.0", top1=0.5)
    again = load_backbone(f"file:{tmp_path}/base.safetensors")
    assert again.fingerprints == small.fingerprints
    assert again.preprocessing == small.preprocessing
    assert again.classes == ("a", "b", "c", "d")
    assert again.about == {"licence": "Apache-2.0", "top1": 0.5}
    assert again.spec == "file:base.safetensors"


def test_half_precision_halves_the_file_and_loads_as_float32(small: Backbone, tmp_path: Path) -> None:
    save_backbone(small, tmp_path / "full.safetensors", SMALL)
    save_backbone(small, tmp_path / "half.safetensors", SMALL, half=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    numbers = sum(tensor.numel() for tensor in small.module.state_dict().values() if tensor.is_floating_point())
    assert sizes[0] - sizes[1] == pytest.approx(2 * numbers, rel=0.01)
    again = load_backbone(f"file:{tmp_path}/half.safetensors")
    for name, tensor in small.module.state_dict().items():
        other = again.module.state_dict()[name]
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor.half().float() if tensor.is_floating_point() else tensor)


def test_a_file_with_plain_metadata_is_understood(tmp_path: Path) -> None:
    path = save_plain(
        tmp_path / "plain.safetensors",
        architecture=SMALL,
        num_classes="4",
        input_size="3,64,64",
        mean="0.5,0.5,0.5",
        std="0.25,0.25,0.25",
        interpolation="bicubic",
        crop_pct="1.0",
        licence="MIT",
    )
    backbone = load_backbone(f"file:{path}")
    assert backbone.input_size == (3, 64, 64)
    assert backbone.preprocessing.mean == (0.5, 0.5, 0.5)
    assert backbone.preprocessing.std == (0.25, 0.25, 0.25)
    assert backbone.preprocessing.interpolation == "bicubic"
    assert backbone.preprocessing.resize_to == 64
    assert backbone.arguments == {"num_classes": 4}
    assert backbone.about == {"licence": "MIT"}


def test_weights_replace_the_published_ones(small: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small.module.state_dict(), path)
    backbone = load_backbone(f"timm:{SMALL}", weights=path, num_classes=4)
    assert backbone.fingerprints == small.fingerprints


def test_weights_that_do_not_fit_are_named(small: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small.module.state_dict(), path)
    with pytest.raises(BackboneError, match=r"weights\.safetensors do not fit ResNet: fc\.bias.*fc\.weight"):
        load_backbone(f"timm:{SMALL}", weights=path, num_classes=5)


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("not a safetensors file at all")
    with pytest.raises(BackboneError, match=r"text\.safetensors is not a readable safetensors file"):
        load_backbone(f"file:{path}")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"licence": "MIT"},
        {"architecture": SMALL, "num_classes": "four"},
        {"architecture": SMALL, "num_classes": "4", "mean": "0.5"},
        {"architecture": SMALL, "num_classes": "4", "crop_pct": "7"},
        {"architecture": "qqqqqqq"},
        {"modelpatch_backbone": "no json"},
        {"modelpatch_backbone": "{}"},
        {"modelpatch_backbone": json.dumps([1])},
        {"architecture": SMALL, "num_classes": "4", "input_size": "3,64"},
        {"architecture": SMALL, "num_classes": "4", "crop_pct": "nan"},
        {"architecture": SMALL, "num_classes": "4", "interpolation": "nonsense"},
        {"architecture": SMALL, "num_classes": str(10**9)},
        {"architecture": "hf-hub:timm/resnet18"},
        {"architecture": "local-dir:/tmp"},
    ],
    ids=lambda metadata: " ".join(f"{key}={value}" for key, value in metadata.items()) or "nothing",
)
def test_a_file_that_does_not_say_what_it_holds_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    path = save_plain(tmp_path / "plain.safetensors", **metadata)
    with pytest.raises(BackboneError):
        load_backbone(f"file:{path}")


@pytest.mark.parametrize(("name", "value"), HOSTILE_ARGUMENTS)
def test_a_file_cannot_pass_the_constructor_more_than_plain_values(
    small: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    path = write_described(small, tmp_path, arguments={name: value})
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("nothing may be built"))
    with pytest.raises(BackboneError, match=f"the metadata of {path} does not describe a backbone: 'arguments'"):
        load_backbone(f"file:{path}")


def write_described(backbone: Backbone, folder: Path, **changes: Any) -> Path:
    """The backbone's file with another description than its own."""
    described = {
        "architecture": SMALL,
        "arguments": {"num_classes": 4},
        "preprocessing": None,
        "classes": [],
        "about": {},
    }
    metadata = {METADATA_KEY: json.dumps(described | changes)}
    save_file(backbone.module.state_dict(), folder / "described.safetensors", metadata)
    return folder / "described.safetensors"


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_file_names_as_many_classes_as_its_network_has_outputs(small: Backbone, tmp_path: Path, count: int) -> None:
    path = write_described(small, tmp_path, classes=[str(number) for number in range(count)])
    with pytest.raises(BackboneError, match=f"names {count} classes for the 4 outputs"):
        load_backbone(f"file:{path}")


def test_weights_that_are_not_finite_are_named(small: Backbone, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in small.module.state_dict().items()}
    state["fc.bias"][0] = float("nan")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(BackboneError, match=r"fc\.bias of .*weights\.safetensors holds NaN"):
        load_backbone(f"timm:{SMALL}", weights=tmp_path / "weights.safetensors", num_classes=4)


@pytest.mark.parametrize(
    ("architecture", "about", "message"),
    [
        (f"timm:{SMALL}", {}, "does not describe a backbone: 'architecture'"),
        (SMALL, {"maker": object()}, "cannot be written to .*JSON"),
    ],
)
def test_what_no_reader_would_accept_is_not_written(
    small: Backbone, tmp_path: Path, architecture: str, about: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        save_backbone(small, tmp_path / "base.safetensors", architecture, **about)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", "/", "a\0b", "a" * 5000])
def test_a_path_that_can_be_no_file_is_refused(path: str) -> None:
    for given in ({"spec": f"file:{path}"}, {"spec": f"timm:{SMALL}", "weights": path}):
        with pytest.raises(BackboneError):
            load_backbone(**given)


def test_a_module_without_any_linear_layer_has_no_classifier() -> None:
    backbone = load_backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)))
    assert backbone.classifier is None


# the real backbone ------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_real_mobilenet_knows_real_photographs(real_backbone: Backbone) -> None:
    archive = SHARED / "weights" / "imagenet1000_128.tar"
    if not archive.exists():
        pytest.skip(f"the photographs {archive} are not on this machine")
    assert sum(parameter.numel() for parameter in real_backbone.module.parameters()) == 3_504_872
    preprocessing = real_backbone.preprocessing.with_image_size(128)
    right = 0
    with tarfile.open(archive) as tar:
        members = {Path(m.name).parent.name: m for m in tar.getmembers() if m.isfile() and m.name.endswith(".jpg")}
        chosen = [(label, wnid) for label, wnid in enumerate(sorted(members)) if label % 10 == 0]
        assert len(chosen) == 100
        for label, wnid in chosen:
            image = preprocessing(tar.extractfile(members[wnid]).read())
            right += int(real_backbone(image).argmax()) == label
    assert right / len(chosen) > 0.5


def test_a_source_of_another_distribution_is_found_by_its_name(registries: None) -> None:
    @register_source("shop")
    class Shop(BackboneSource):
        def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
            preprocessing = small_preprocessing()
            return BuiltNetwork(module=TinyNet(**arguments), preprocessing=preprocessing, about={"name": name})

    backbone = load_backbone("shop:shoes", pretrained=False, seed=3, classes=4)
    assert backbone.about == {"name": "shoes"}
    assert backbone.arguments == {"classes": 4, "pretrained": False, "seed": 3}
    again = load_backbone(backbone.spec, **backbone.arguments)
    assert again.fingerprint == backbone.fingerprint
    assert load_backbone("shop:shoes", classes=4).arguments == {"classes": 4}


@pytest.mark.service
def test_no_library_of_networks_is_imported_before_it_is_used() -> None:
    code = "import sys, modelpatch.backbone.load, modelpatch.patch; print({'timm', 'torchvision'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
