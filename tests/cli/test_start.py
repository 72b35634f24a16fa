"""A start in milliseconds: a subprocess says which modules a command imports. Seconds are not measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelpatch.cli.main import VERBS
from modelpatch.store.store import Store

pytestmark = pytest.mark.slow

HEAVY = {"torch", "numpy", "timm", "torchvision", "datasets", "pyarrow", "fastapi", "matplotlib", "PIL"}
USED = {"torch", "numpy", "PIL"}  # what reading a patch needs
PROGRAM = """
import json, runpy, sys
sys.argv = ["modelpatch", *sys.argv[1:]]
try:
    runpy.run_module("modelpatch", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(*arguments: object) -> set[str]:
    """The packages in memory after `modelpatch` has run."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [("--version",), ("-h",), *((verb, "-h") for verb in VERBS)], ids=" ".join)
def test_help_imports_no_heavy_library(arguments: tuple[str, ...]) -> None:
    assert imported(*arguments) & HEAVY == set()


@pytest.mark.parametrize("verb", ["inspect", "verify", "ls"])
def test_a_look_at_a_patch_imports_what_reads_it(verb: str, patches: dict[str, Path], tmp_path: Path) -> None:
    arguments: tuple[object, ...] = (verb, patches["scale-bias"])
    if verb == "ls":
        Store(tmp_path / "store").publish("colors", patches["scale-bias"])
        arguments = ("store", "ls", tmp_path / "store")
    assert imported(*arguments) & HEAVY <= USED
