"""What a store costs: publishing, resolving and loading one patch, and listing many, in a folder and in memory.

    python benchmarks/store.py --versions 100000 --json benchmarks/results/store.json

    publish    bytes checked, written durably, tagged
    resolve    a name to its version
    load       a name to its patch, checked
    list       all versions by a new process's first listing, and again by the same store
    rebuild    the index made from all files

The versions to list are records put there directly, all tagged; only the patch that is published and loaded is real.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import modelpatch as mp
from common import mobilenet, report, timed, untrained
from modelpatch.patch.contents import encode_patch
from modelpatch.store import Version

Put = Callable[[str, bytes], None]


def put_into_folder(root: Path) -> Put:
    """Plain writes: durable ones would take hours."""

    def put(path: str, data: bytes) -> None:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)

    return put


def put_into_memory(root: str) -> Put:
    """Straight into the dictionary: fsspec's own writes look at every file there is."""
    system = MemoryFileSystem()

    def put(path: str, data: bytes) -> None:
        place = f"{root}/{path}"
        system.store[place] = MemoryFile(system, place, data)

    return put


def fill(version: Version, count: int, put: Put) -> None:
    for number in range(count):
        one = replace(version, name=f"patch-{number:06}", hash=secrets.token_hex(32))
        put(f"patches/{one.name}/{one.hash}.json", one.record())
        put(f"patches/{one.name}/latest.tag", one.hash.encode())


def measure(place: str, url: str, put: Put, patch: bytes, count: int, rounds: int) -> list[tuple[Any, ...]]:
    """Rows of milliseconds."""
    store = mp.Store(url)
    version = store.publish("measured", patch)
    fill(version, count - 1, put)
    _, rebuilt = timed(store.rebuild)
    works: dict[str, Callable[[], object]] = {
        "list, first": lambda: mp.Store(url).list(),
        "list, again": store.list,
        "publish": lambda: store.publish("measured", patch),
        "resolve": lambda: store.resolve("measured"),
        "load": lambda: store.load("measured"),
    }
    assert len(store.list()) == count
    rows: list[tuple[Any, ...]] = [(place, "rebuild", count, 1000 * rebuilt)]
    for name, work in works.items():
        rows.append((place, name, count, 1000 * statistics.median(timed(work)[1] for _ in range(rounds))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", help="by default the real MobileNetV2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backbone = mp.load_backbone(arguments.backbone or mobilenet())
    patch = encode_patch(untrained(backbone, mp.methods.ScaleBias(), 43))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure("folder", folder, put_into_folder(Path(folder)), patch, arguments.versions, arguments.rounds)
    rows += measure("memory", "memory://store", put_into_memory("/store"), patch, arguments.versions, arguments.rounds)
    title = f"a store of {arguments.versions:,} versions; the patch has {len(patch):,} bytes"
    report(title, ("place", "what", "versions", "ms"), rows, arguments.json)


if __name__ == "__main__":
    main()
