"""Candidates that die or diverge on purpose."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modelpatch.methods.hooks import Batches, Hook
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.model import PatchedModel


@dataclass(frozen=True, kw_only=True)
class Killed(LinearProbe):
    """A linear probe whose process is killed the first `times` times that it trains."""

    name: ClassVar[str] = "killed"

    marker: str
    times: int = 1

    def hooks(self) -> tuple[Hook, ...]:
        return (Killing(self.marker, self.times),)


@dataclass(frozen=True)
class Killing(Hook):
    """The end of the process before its first step."""

    marker: str
    times: int

    def begin(self, model: PatchedModel, batches: Batches) -> None:
        for number in range(self.times):
            file = Path(f"{self.marker}-{number}")
            if not file.exists():
                file.touch()
                os.kill(os.getpid(), signal.SIGKILL)
