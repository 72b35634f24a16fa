"""Eager PyTorch: nothing is compiled, modules run as the engine's tuning freezes them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from modelpatch.engine.backends.base import BACKENDS, Backend, Compiled
from modelpatch.errors import EngineError


@BACKENDS.register("eager")
class Eager(Backend):
    """Run modules as they are."""

    name = "eager"
    compiles = False
    devices = ("cpu", "cuda", "mps", "xpu", "meta")

    def load(self, path: Path, inputs: Sequence[Tensor], threads: int, fixed: bool) -> Compiled:
        """Raises `EngineError`: there are no files."""
        raise EngineError(f"{path} cannot be loaded: the eager backend compiles nothing.")
