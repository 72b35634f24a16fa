"""Fixtures: those of the repository's tests that the studies need, and the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from conftest import Result, colors, real_backbone, real_data, tiny
from modelpatch_studies.command import main

__all__ = ["colors", "real_backbone", "real_data", "tiny"]
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `modelpatch-studies ARGUMENTS` in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["modelpatch-studies", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return (
            Result(code, out, err)
            if isinstance(code, int)
            else Result(int(code is not None), out, err + str(code or ""))
        )

    return call
