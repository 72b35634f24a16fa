"""`bundled:NAME`: a backbone file that ships with the package (`bundled:tiny`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, register_source
from modelpatch.backbone.sources.file import build_file
from modelpatch.errors import UnknownBackboneError

ASSETS = Path(__file__).parents[1] / "assets"


@register_source("bundled")
class BundledSource(BackboneSource):
    """The package's own files."""

    holds_weights = True

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        bundled = {asset.stem: asset for asset in sorted(ASSETS.glob("*.safetensors"))}
        if name not in bundled:
            have = ", ".join(f"bundled:{stem}" for stem in bundled)
            raise UnknownBackboneError(f"the package bundles no backbone {name[:80]!r}. It has: {have}.")
        return build_file(bundled[name], f"bundled:{name}", arguments)
