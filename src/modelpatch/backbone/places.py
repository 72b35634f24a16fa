"""Places on this machine that backbones were loaded from, by the hash of their chain: patches find them again.

    $MODELPATCH_CACHE/backbones/HASH.json      {"spec": "timm:resnet18", "weights": "/data/mine.pth", ...}

A patch file names no folder of any machine; this folder (by default `~/.cache/modelpatch`) does.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from modelpatch.atomic import write_bytes
from modelpatch.errors import ModelpatchError

CACHE, SEARCHED = "MODELPATCH_CACHE", "MODELPATCH_BACKBONES"


class LocalPlace(BaseModel, frozen=True, extra="forbid"):
    """All that `load_backbone` needs to load a backbone again on this machine; paths are absolute."""

    spec: str
    arguments: dict[str, Any] = {}
    weights: str | None = None
    segments: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `load_backbone`."""
        return {**self.arguments, "weights": self.weights, "segments": self.segments}

    @property
    def call(self) -> tuple[str, dict[str, Any]]:
        """The specification and the keyword arguments of `load_backbone`."""
        return self.spec, self.options

    def __str__(self) -> str:
        return self.spec if self.weights is None else f"{self.spec} with the weights {self.weights}"


def remember(chain: str, place: LocalPlace) -> None:
    """Write down where the backbone whose chain has this hash was loaded from; without effect in a read-only folder."""
    path = _path(chain)
    with suppress(ModelpatchError, OSError, TypeError, ValueError):
        text = json.dumps(place.model_dump(mode="json"), indent=2, sort_keys=True)
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, text.encode())


def recall(chain: str) -> LocalPlace | None:
    """The place that a backbone whose chain has this hash was last loaded from on this machine, if any."""
    try:
        return LocalPlace.model_validate_json(_path(chain).read_bytes())
    except (OSError, ValidationError):
        return None


def cache_folder() -> Path:
    """The folder of what this machine remembers: `MODELPATCH_CACHE`, else `modelpatch` in the user's cache."""
    own = os.environ.get(CACHE)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "modelpatch"


def searched_folders() -> list[Path]:
    """The folders of `MODELPATCH_BACKBONES`, which are separated as those of PATH are."""
    return [Path(one).expanduser() for one in os.environ.get(SEARCHED, "").split(os.pathsep) if one]


def _path(chain: str) -> Path:
    return cache_folder() / "backbones" / f"{chain}.json"
