"""Open vocabularies: a head made of words, never trained.

    row_k = scale * M e_k / |M e_k|,   e_k = mean over prompts p of text(p(class k)), of unit length
    logits = cos(features, row_k) * scale

The text tower of an `openclip:` backbone shares the image tower's space: M = 1. Beside a plain classifier stands a sentence
encoder, and M maps its space to the features: the ridge regression from the base's own class names X (C, E) to the rows of
its own classifier Y (C, D), both centred (a shift common to all classes changes no answer),

    M = (XᵀX + penalty)⁻¹ Xᵀ Y          the penalty that best predicts rows held out, in five folds, by their cosine

Radford et al. (CLIP, 2021), section 3.1.4, prompts; Frome et al. (DeViSE, 2013) for classifiers made of words.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.text_tower import TextTower, load_text
from modelpatch.errors import BackboneError, DataError
from modelpatch.heads.linear import CosineHead
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MethodRecord
from modelpatch.plain_files import read_plain
from modelpatch.tasks.kind import kind_of
from modelpatch.tasks.record import TaskRecord

TEMPLATES = ("a photo of a {}.",)
SCALE = 40.0  # of cosines: the least cross-entropy on the training images of imagenette and caltech101 (MobileNetV2)
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = 5


@dataclass(frozen=True)
class Vocabulary:
    """Builder of heads from class names for one backbone. `words` gives other words for classes whose names are no words."""

    backbone: Backbone
    tower: TextTower
    templates: tuple[str, ...] = TEMPLATES
    words: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise DataError(f"the prompt template {template!r} needs {{}} once, where the name goes.")
        if not self.templates:
            raise DataError("a head made of words needs at least one prompt template, such as 'a photo of a {}.'")

    def embed(self, names: Sequence[str]) -> Tensor:
        """Directions (K, E) of unit length: the mean over all templates."""
        written = [self.words.get(name, spell(name)) for name in names]
        texts = [[template.replace("{}", one) for one in written] for template in self.templates]
        return F.normalize(torch.stack([self.tower.encode(one) for one in texts]).mean(0), dim=1)

    def head(self, names: Sequence[str]) -> CosineHead:
        """A head (D, K) for these names; in eval mode, requires no gradients."""
        rows = self.embed(names)
        if not self.tower.shared:
            middle, matrix = self._bridge
            rows = F.normalize((rows - middle) @ matrix, dim=1)
        elif rows.shape[1] != self.backbone.chain.feature_dim:
            raise BackboneError(
                f"{self.tower.name} gives {rows.shape[1]} numbers, the image tower {self.backbone.chain.feature_dim}."
            )
        head = CosineHead(rows.shape[1], len(rows))
        with torch.no_grad():
            head.weight.copy_(rows * (self.tower.scale if self.tower.shared else SCALE))
        return head.to(self.backbone.device).eval().requires_grad_(False)

    def relabel(self, patch: Patch, labels: Sequence[str]) -> Patch:
        """The patch with a head for other labels. Raises `DataError` for labels that are no task."""
        if not kind_of(patch.task.kind).classifies:
            raise DataError(f"{patch.task.name} is a {patch.task.kind} task; labels name classes of whole images.")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise DataError(f"{len(labels)} labels, {len(set(labels))} different: give at least two, each once.")
        return patch.with_head(self.head(labels), TaskRecord(name=patch.task.name, classes=tuple(labels)))

    def mark(self, patch: Patch) -> Patch:
        """The patch with a note of the text tower and templates, by which `predict --labels` makes other heads."""
        used = {**patch.method.hyperparameters, "text": self.tower.name, "templates": list(self.templates)}
        return replace(patch, method=MethodRecord(name=patch.method.name, hyperparameters=used))

    @cached_property
    def _bridge(self) -> tuple[Tensor, Tensor]:
        """(mean embedding (E,), M (E, D)) fitted on the base's own classes."""
        own = self.backbone.chain.head
        if not isinstance(own, nn.Linear):
            raise BackboneError(
                f"{self.backbone.spec} has no linear classifier of its own that says what words look like. Use a backbone "
                "with one, or an openclip: backbone."
            )
        embeddings = replace(self, templates=TEMPLATES).embed(own_names(self.backbone))
        return fit_bridge(embeddings, own.weight.detach().float().cpu())


def fit_bridge(embeddings: Tensor, rows: Tensor, penalties: Sequence[float] = PENALTIES) -> tuple[Tensor, Tensor]:
    """(mean (E,), M (E, D)) from embeddings (C, E) and a classifier's rows (C, D), with the penalty that predicts best."""
    y = rows - rows.mean(0)
    folds = torch.arange(len(embeddings)) % FOLDS

    def held_out(penalty: float) -> float:
        cosines = []
        for fold in range(FOLDS):
            kept = folds != fold
            middle, matrix = _ridge(embeddings[kept], y[kept], penalty)
            cosines.append(F.cosine_similarity((embeddings[~kept] - middle) @ matrix, y[~kept]))
        return float(torch.cat(cosines).mean())

    best = max(penalties, key=held_out) if len(penalties) > 1 and len(embeddings) >= 2 * FOLDS else penalties[0]
    return _ridge(embeddings, y, best)


def _ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    middle = x.mean(0)
    a = (x - middle).double()
    gram = a.T @ a + penalty * torch.eye(a.shape[1], dtype=torch.float64)
    return middle, torch.linalg.solve(gram, a.T @ (y - y.mean(0)).double()).float()


def own_names(backbone: Backbone) -> tuple[str, ...]:
    """The names of the outputs of the base's own head; ImageNet's for 1,000 without names. Raises `BackboneError`."""
    outputs = backbone.chain.head.out_features if isinstance(backbone.chain.head, nn.Linear) else 0
    if len(backbone.classes) == outputs:
        return backbone.classes
    if outputs == 1000:
        return tuple(_imagenet().label_names())  # in the order all zoos use
    raise BackboneError(f"{backbone.spec} does not name its {outputs} classes, so no words can be learned from them.")


def spell(name: str) -> str:
    """A class name as words: WordNet ids by their synonyms, underscores and hyphens as spaces, lower case."""
    if re.fullmatch(r"n\d{8}", name) and name in _imagenet().label_names():
        return str(_imagenet().label_name_to_description(name)).lower()
    return " ".join(name.replace("_", " ").replace("-", " ").split()).lower()


@cache
def _imagenet() -> Any:
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k")


def read_words(path: str | Path) -> dict[str, str]:
    """Words by class name from a JSON file `{"00014": "a stop sign"}`. Raises `DataError`."""
    try:
        words = json.loads(read_plain(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as names of classes: {error}.") from error
    if not isinstance(words, dict) or not all(isinstance(word, str) and word.strip() for word in words.values()):
        raise DataError(f'{path} is no list of names. Expected JSON like {{"00014": "a stop sign"}}.')
    return words


def vocabulary_of(
    backbone: Backbone, text: str, templates: Sequence[str] = (), words: Mapping[str, str] | None = None
) -> Vocabulary:
    """The vocabulary that a text tower's spec gives a backbone (see `backbone/text_tower.py`)."""
    return Vocabulary(backbone, load_text(text, backbone.text), tuple(templates) or TEMPLATES, dict(words or {}))
