"""`file:PATH`: a safetensors file whose metadata names an architecture of timm, arguments and preprocessing.

`bundled:NAME` is one that ships with the package (`bundled:tiny`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from modelpatch.backbone.files import describe, load_state, read_tensors
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, register_source
from modelpatch.backbone.sources.timm import TimmSource
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.text import nearest

ASSETS = Path(__file__).parents[1] / "assets"


@register_source("file")
class FileSource(BackboneSource):
    """Files as `save_backbone` writes them."""

    holds_weights = True

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        return build_file(Path(name).expanduser(), f"file:{Path(name).name}", arguments)

    def names_file(self, name: str) -> bool:
        return True


@register_source("bundled")
class BundledSource(BackboneSource):
    """The package's own files."""

    holds_weights = True

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        bundled = {asset.stem: asset for asset in sorted(ASSETS.glob("*.safetensors"))}
        if name not in bundled:
            have = ", ".join(f"bundled:{stem}" for stem in bundled)
            hint = nearest(name[:80], bundled)
            raise UnknownBackboneError(f"the package bundles no backbone {name[:80]!r}.{hint} It has: {have}.")
        return build_file(bundled[name], f"bundled:{name}", arguments)


def build_file(path: Path, spec: str, arguments: dict[str, Any]) -> BuiltNetwork:
    """The network of a file, recorded as `spec`. Raises `BackboneError` for a file that describes none."""
    tensors, metadata = read_tensors(path)
    described = describe(metadata, path)
    recorded = described.preprocessing.model_dump(exclude_unset=True) if described.preprocessing else {}
    arguments = {**described.arguments, **arguments}
    built = TimmSource().build(described.architecture, False, arguments)
    load_state(built.module, tensors, str(path))
    outputs = getattr(built.module, "num_classes", None)
    if described.classes and len(described.classes) != outputs:
        raise BackboneError(f"{path} names {len(described.classes)} classes for the {outputs} outputs of its network.")
    seen, facts = Preprocessing(**{**built.preprocessing.model_dump(), **recorded}), described.about
    return replace(built, preprocessing=seen, spec=spec, arguments=arguments, classes=described.classes, about=facts)
