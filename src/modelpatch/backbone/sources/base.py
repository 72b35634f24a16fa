"""The interface of sources of backbones, and their registry.

    @register_source("timm")
    class TimmSource(BackboneSource): ...

`load_backbone("timm:resnet50")` asks the source `timm` to build `resnet50`. Other distributions list theirs as entry points of
the group `modelpatch.backbones`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.text_tower import TextTower
from modelpatch.errors import UnknownBackboneError
from modelpatch.registry import Registry


@dataclass(frozen=True, kw_only=True)
class BuiltNetwork:
    """A network as its source built it, see `Backbone`. `spec` and `arguments` are recorded instead of those given."""

    module: nn.Module
    preprocessing: Preprocessing
    spec: str | None = None
    arguments: dict[str, Any] | None = None
    classes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    text: TextTower | None = None


class BackboneSource(ABC):
    """A place that networks come from by name."""

    holds_weights: ClassVar[bool] = False  # names stand for weights as well: `pretrained` and `weights` do not apply
    outputs: ClassVar[str] = "num_classes"  # what constructors call the number of a classifier's outputs
    address: ClassVar[str] = ""  # of the host that published weights are downloaded from, as a URL

    @abstractmethod
    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        """The network of that name, with its published weights or random ones that follow torch's random state.

        Raises `UnknownBackboneError` for an unknown name, `BackboneError` for arguments that do not fit.
        """

    def is_portable(self, name: str) -> bool:
        """True for a name that a patch file may hold: one that names no folder of a machine."""
        return Path(name).name == name

    def names_file(self, name: str) -> bool:
        """True if a name, or one that a patch file holds, stands for a file or folder of some machine."""
        return False

    def find_repository(self, name: str) -> str | None:
        """The repository of a name that anybody may have published, None for names that the source's makers did."""
        return None


SOURCES = Registry[type[BackboneSource]](
    "source of backbones", "modelpatch.backbones", folder="modelpatch.backbone.sources", error=UnknownBackboneError
)
register_source = SOURCES.register  # under the word before the colon of a specification
