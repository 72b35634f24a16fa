"""Time from a command to its end beside `python -c "import torch"`, in turns: help, and verbs that look at a patch.

python benchmarks/start.py --json benchmarks/results/start.json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import modelpatch as mp
from common import compare_ways, ratio, report, untrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        patch = untrained(mp.load_backbone("bundled:tiny"), mp.methods.ScaleBias(), 10)
        file, store = patch.save(Path(folder) / "patch.safetensors"), mp.Store(Path(folder) / "store")
        store.publish("digits", patch)
        program = [sys.executable, "-m", "modelpatch"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "--version": [*program, "--version"],
            "-h": [*program, "-h"],
            "fit -h": [*program, "fit", "-h"],
            "inspect": [*program, "inspect", str(file)],
            "verify": [*program, "verify", str(file)],
            "store ls": [*program, "store", "ls", str(Path(folder) / "store")],
        }
        run = partial(subprocess.run, check=True, capture_output=True)
        times = compare_ways({name: partial(run, words) for name, words in commands.items()}, options.rounds)
    rows = [(name, statistics.median(taken), ratio(taken, times["import torch"])) for name, taken in times.items()]
    report("Start of the command line", ("command", "ms", "of import torch"), rows, options.json)


if __name__ == "__main__":
    main()
