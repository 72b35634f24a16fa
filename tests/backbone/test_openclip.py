"""Image towers of open_clip as backbones, and text towers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from conftest import CLIP_MODELS, draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.sources.openclip import ImageTower
from modelpatch.backbone.text_tower import SentenceEncoder, load_text
from modelpatch.errors import BackboneError, MissingExtraError, PatchError, UnknownBackboneError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import BackboneRecord
from tolerance import close

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CLIP_MODELS)
def test_an_image_tower_gives_open_clip_s_features_and_its_text_tower_is_frozen(clip_models: None, name: str) -> None:
    import open_clip

    backbone = load_backbone(f"openclip:{name}", pretrained=False, seed=3)
    torch.manual_seed(3)
    model = open_clip.create_model(name, pretrained=None).eval()
    images = torch.randn(2, *backbone.input_size)
    with torch.no_grad():
        assert close(backbone.chain(images), model.encode_image(images))
        texts = ["a cat", "a photo of two dogs"]
        expected = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    assert backbone.text is not None
    assert torch.allclose(backbone.text.encode(texts), expected, atol=1e-6)
    assert backbone.text.scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert backbone.text.shared
    assert len(backbone.chain) > 3


def test_a_tower_is_cut_between_its_blocks_and_patched_block_by_block(clip: Backbone, tmp_path: Path) -> None:
    names = [segment.name for segment in clip.chain]
    assert "visual.transformer.resblocks.1" in names
    patch = draft_patch(clip, Subset(blocks=("visual.transformer.resblocks.1",)))
    again = Patch.load(patch.save(tmp_path / "p.safetensors"))
    images = torch.randn(2, *clip.input_size)
    with torch.no_grad():
        assert close(clip.patched(again)(images), clip.patched(patch)(images))
    assert again.backbone.arguments == {"pretrained": False, "seed": 0}
    other = load_backbone(again.backbone.spec, **again.backbone.arguments)
    assert other.fingerprint == clip.fingerprint
    clip.verify()


def test_a_tower_that_is_not_a_transformer_is_run_as_it_is() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    assert not ImageTower(module).blockwise
    images = torch.randn(2, 3, 2, 2)
    assert close(ImageTower(module)(images), module(images))


@pytest.mark.parametrize(
    "name", ["nothing", "nothing/openai", "../x", "hf-hub:a/b", "local-dir:x", "ViT-B-32/../evil.pt", ""]
)
def test_what_open_clip_does_not_list_is_refused(name: str) -> None:
    with pytest.raises(UnknownBackboneError):
        load_backbone(f"openclip:{name}")


def test_a_tag_that_is_a_file_is_not_read(clip_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(b"\x80\x04")
    with pytest.raises(UnknownBackboneError, match=r"no weights 'evil\.pt'"):
        load_backbone(f"openclip:{CLIP_MODELS[0]}/evil.pt")


def test_a_patch_names_a_model_and_a_tag_and_no_path(clip: Backbone) -> None:
    record = BackboneRecord.of(clip)
    fields = record.model_dump()
    assert BackboneRecord(**{**fields, "spec": "openclip:ViT-B-32/openai"}).spec.endswith("openai")
    for spec in ("openclip:a/b/c", "openclip:../a", "openclip:hf-hub:a", "openclip:"):
        with pytest.raises(ValueError, match="plain name"):
            BackboneRecord(**{**fields, "spec": spec})


def test_full_fine_tuning_owns_the_image_tower_only(clip: Backbone) -> None:
    names = FullFinetune().blueprint(clip).owned
    assert names
    assert all(name.startswith("visual.") for name in names)


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[clip\]"):
        load_backbone("openclip:ViT-B-32/openai")


# text towers ------------------------------------------------------------------------------------------------------


def test_a_sentence_encoder_averages_its_tokens(sentence_encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tower = load_text(f"folder:{sentence_encoder}")
    assert isinstance(tower, SentenceEncoder)
    assert tower.name == f"folder:{sentence_encoder.name}"  # no path of this machine
    texts = ["a cat", "a photo of a dog and a cat", "a dog"]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(sentence_encoder),
        AutoModel.from_pretrained(sentence_encoder).eval(),
    )
    with torch.no_grad():
        for text, row in zip(texts, tower.encode(texts), strict=True):
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            assert torch.allclose(row, torch.nn.functional.normalize(states.mean(0), dim=0), atol=1e-5)
    assert not tower.shared


def test_a_text_tower_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, problem in (
        ("magic", "no text tower 'magic'"),
        ("own", "no text tower of its own"),
        (f"folder:{tmp_path}", "no config.json"),
    ):
        with pytest.raises(UnknownBackboneError, match=problem):
            load_text(spec)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="no sentence encoder"):
        load_text(f"folder:{tmp_path}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[text\]"):
        load_text(f"folder:{tmp_path}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"modelpatch\[minilm\]"):
        load_text("minilm")


def test_no_patch_can_be_made_for_what_no_file_can_name(tiny: Backbone) -> None:
    tiny.spec = "openclip:/home/me/model"
    with pytest.raises(PatchError, match="plain name"):
        BackboneRecord.of(tiny)
