"""Patch files that the first edition wrote load, verify and give the answers they gave then.

`files/` holds one patch of every family of methods, of several codecs and heads, for a small network with random weights. In
`expected.safetensors` are the network's tensors, three images and every patch's answers; `masks` is for `bundled:tiny` and
answers a ramp. They were made with the code of commit 9115b2b and stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import TinyNet, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.patch.contents import Patch, decode_patch, encode_patch

FILES = Path(__file__).parent / "files"
NAMES = sorted(path.stem for path in FILES.glob("*.safetensors") if path.stem != "expected")
CODED = {"masks": "entropy-bits", "piggyback": "bits", "int8": "int8", "float16": "float16", "extract-sign": "signs"}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FILES / "expected.safetensors")


@pytest.fixture(scope="module")
def backbone(expected: dict[str, Tensor]) -> Backbone:
    module = TinyNet()
    tensors = {name.removeprefix("backbone."): t for name, t in expected.items() if name.startswith("backbone.")}
    module.load_state_dict(tensors)
    return load_backbone(module, preprocessing=small_preprocessing())


def needed(name: str) -> None:
    """Skip where what the file needs is not installed."""
    for stem, library in (("masks", "constriction"), ("lora", "peft")):
        if name == stem:
            pytest.importorskip(library)


def test_every_family_has_a_file() -> None:
    assert len(NAMES) >= 15
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_first_edition_gives_the_answers_of_then(
    name: str, backbone: Backbone, expected: dict[str, Tensor]
) -> None:
    needed(name)
    patch = Patch.load(FILES / f"{name}.safetensors")
    images = expected["images"]
    if name == "masks":  # of a network with enough weights for the entropy coder
        backbone = load_backbone("bundled:tiny")
        images = torch.linspace(-2, 2, 3 * backbone.input_size[1] ** 2).view(1, *backbone.input_size)
    patch.check_backbone(backbone)
    for model in (backbone.patched(patch), BoundPatch(backbone, patch)):
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected[f"logits.{name}"], rtol=1e-4, atol=1e-5)
    backbone.verify()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_first_edition_is_written_again_with_the_same_values(name: str) -> None:
    needed(name)
    patch = Patch.load(FILES / f"{name}.safetensors")
    again = decode_patch(encode_patch(patch))
    assert again == replace(patch, tensors=again.tensors)
    assert again.content_hash == patch.content_hash
    assert patch.inspect().parts


@pytest.mark.parametrize(("name", "codec"), CODED.items())
def test_codecs_of_then_are_among_the_files(name: str, codec: str) -> None:
    assert f':\\"{codec}' in (FILES / f"{name}.safetensors").read_text(encoding="latin-1")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_first_edition_rounds_as_it_did_and_keeps_its_bytes(name: str) -> None:
    needed(name)
    data = (FILES / f"{name}.safetensors").read_bytes()
    patch = decode_patch(data)
    assert patch.preprocessing.rounding == "first"
    assert encode_patch(patch, compress=name == "masks") == data
    again = decode_patch(
        encode_patch(replace(patch, preprocessing=patch.preprocessing.model_copy(update={"rounding": "exact"})))
    )
    assert again.preprocessing.rounding == "exact"
