"""The interface of sources of backbones, and their registry.

    @register_source("timm")
    class TimmSource(BackboneSource): ...

`load_backbone("timm:resnet50")` asks the source `timm` to build `resnet50`. Other distributions list theirs as entry points of
the group `modelpatch.backbones`.
"""

import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.text_tower import TextTower
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.registry import Registry

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container on Linux
DRAWING = frozenset(
    str.split("add_ clamp_ copy_ div_ erfinv_ fill_ kaiming_normal_ kaiming_uniform_ mul_ normal_ sub_ uniform_ zero_")
)
MOST_MODULES = 4096  # of a network that is given arguments: NASNet and EfficientNet-L2 have 1,800
UNKNOWN = 2**36  # bytes of memory where the system does not say


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


def check_size(build: Callable[[], nn.Module], what: str) -> None:
    """Raise `BackboneError` for a network that the memory does not hold, which is built without numbers to be weighed, or one
    of more than `MOST_MODULES` modules.

    Arguments come from files too: each may be small, and their product not. A network that cannot be built so is passed.
    """
    module, parts, own = None, itertools.count(1), threading.get_ident()

    def count(*registered: Any) -> None:
        if threading.get_ident() == own and next(parts) > MOST_MODULES:
            raise TooManyModulesError

    counting = register_module_module_registration_hook(count)
    try:
        with suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"), Undrawn():
            module = build()  # of what fails, the real construction tells more
    except TooManyModulesError:
        raise BackboneError(
            f"{what} would have more than {MOST_MODULES:,} modules; the largest networks of the zoos have half as many.",
            "Give arguments of a smaller network, or build the module yourself.",
        ) from None
    finally:
        counting.remove()
    needed = (
        sum(tensor.nbytes for part in (module.parameters(), module.buffers()) for tensor in part)
        if module is not None
        else 0
    )
    if needed > (held := find_memory()):
        raise BackboneError(
            f"{what} would take {needed / 1e9:,.0f} GB; this machine has {held / 1e9:,.0f} GB of memory.",
            "Give arguments of a smaller network.",
        )


class TooManyModulesError(BaseException):
    """A network that is too deep to be built: no `Exception`, which constructors may catch."""


class Undrawn(TorchFunctionMode):
    """A context in which no weights are drawn: without numbers that takes longer than with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = getattr(func, "__name__", "") in DRAWING
        return next(iter((*args, *kwargs.values()))) if drawn else func(*args, **kwargs)  # of `nn.init`, by keyword


def find_memory() -> int:
    """Bytes of memory that this process may take: the machine's, or less in a container."""
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in LIMITS:
        with suppress(ValueError, OSError):
            found.append(int(Path(path).read_text()))
    return min(found, default=UNKNOWN)
