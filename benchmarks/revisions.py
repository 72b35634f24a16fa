"""A benchmark of this checkout beside the same benchmark of another revision, run in turns: medians and their ratios.

Every run is a process of its own over its revision's `src/` and `benchmarks/`, with the same interpreter and packages.
Arguments behind `--` go to both.

    python benchmarks/revisions.py fit_speed --against 9115b2b --same-script -- --epochs 3 --rounds 1 --sides fit
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import report

HERE = Path(__file__).resolve().parents[1]
Figure = tuple[str, str]  # the row's words and the column


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A temporary work tree of a revision."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", path, revision], cwd=HERE, check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", path], cwd=HERE, check=True)


def measure(root: Path, benchmark: str, arguments: list[str]) -> dict[Figure, float]:
    """Figures of one run of a revision's benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        script = root / "benchmarks" / f"{benchmark}.py"
        paths = os.pathsep.join([str(root / "src"), str(root / "studies" / "src"), str(root / "benchmarks")])
        environment = os.environ | {"PYTHONPATH": paths, "MODELPATCH_SHARED": str(HERE.parent / "shared")}
        subprocess.run([sys.executable, script, "--json", out, *arguments], cwd=root, env=environment, check=True)
        return dict(figures(json.loads(out.read_text())))


def figures(written: dict[str, Any]) -> Iterator[tuple[Figure, float]]:
    """Numbers of a benchmark's JSON by row and column. A row is known by its first cell and the words beside it."""
    for part in [written] if "rows" in written else written.values():
        for cells in part["rows"]:
            names = list(cells)
            words = [names[0], *(name for name in names[1:] if re.search("[a-z]", str(cells[name])))]
            row = re.sub(r", batches of \d+$", "", ", ".join(str(cells[name]) for name in words))
            for name in names[1:]:
                if isinstance(cells[name], int | float):
                    yield (f"{part['title'].split(',')[0]}: {row}", name), float(cells[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", help="a script of benchmarks/, without its suffix")
    parser.add_argument("--against", default="HEAD~1", help="the revision to compare with")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--same-script", action="store_true", help="run this checkout's script over both packages")
    parser.add_argument("--json", type=Path)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    seen: dict[Figure, dict[str, list[float]]] = defaultdict(lambda: {"before": [], "now": []})
    with checkout(options.against) as other:
        if options.same_script:
            script = f"benchmarks/{options.benchmark}.py"
            shutil.copyfile(HERE / script, other / script)
        for _ in range(options.turns):
            for side, root in (("before", other), ("now", HERE)):
                for figure, value in measure(root, options.benchmark, arguments).items():
                    seen[figure][side].append(value)
    rows = []
    for (row, column), sides in seen.items():
        before, now = (statistics.median(values) if values else "" for values in sides.values())
        share = now / before if isinstance(now, float) and isinstance(before, float) and before else ""
        rows.append((row, column, before, now, share))
    title = f"{options.benchmark} of this checkout beside {options.against}, medians of {options.turns} runs in turns"
    report(title, ("row", "figure", "before", "now", "now / before"), rows, options.json)


if __name__ == "__main__":
    main()
