"""A store whose writers are killed, and many of which write at once, while others read and collect.

`MODELPATCH_KILLS=500` makes the long run whose figures stand in docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import draft_patch, make_tiny
from modelpatch.errors import UnknownPatchError
from modelpatch.patch.contents import encode_patch
from modelpatch.store.files import Index
from modelpatch.store.store import Store
from modelpatch.store.version import Version

pytestmark = pytest.mark.service

KILLS = int(os.environ.get("MODELPATCH_KILLS", "20"))
TINY = make_tiny()
FILES = [encode_patch(draft_patch(TINY, seed=seed)) for seed in range(5)]
HASHES = [Version.of("flowers", data, draft_patch(TINY, seed=seed)).hash for seed, data in enumerate(FILES)]
ENDLESS = 10**9


@dataclass
class Publishers:
    """The process that forks publishers, and what they have said."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def start(self, turn: int, count: int) -> int:
        """Let another process publish. Returns its number."""
        return int(self._ask(f"start {turn} {count}", "child")[0])

    def wait(self) -> list[int]:
        """How each of them ended."""
        return [int(code) for code in self._ask("wait", "ended")]

    def _ask(self, text: str, word: str) -> list[str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            assert line, "the publishers' process ended"
            if line.startswith(word):
                return line.split()[1:]
            self.said.append(line.strip())


@pytest.fixture
def publishers(tmp_path: Path) -> Iterator[Publishers]:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    paths = []
    for number, data in enumerate(FILES):
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(data)
    command = [
        sys.executable,
        str(Path(__file__).with_name("publishing.py")),
        str(tmp_path / "store"),
        *map(str, paths),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Publishers(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_writer_killed_at_any_moment_leaves_the_old_version_or_the_new(
    publishers: Publishers, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.publish("flowers", FILES[0], tags=("latest", "prod"))
    begin = time.perf_counter()
    store.publish("flowers", FILES[0], tags=("latest", "prod"))
    span = 3 * (time.perf_counter() - begin)
    chance = random.Random(0)
    old = dict.fromkeys(("latest", "prod"), HASHES[0])
    interrupted, turn = 0, 1
    for _ in range(KILLS):
        publishers.said.clear()
        child = publishers.start(turn, ENDLESS)
        time.sleep(chance.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        assert publishers.wait() == [-signal.SIGKILL]
        begun = [int(line.split()[1]) for line in publishers.said if line.startswith("begin")]
        ended = [int(line.split()[1]) for line in publishers.said if line.startswith("end")]
        new = HASHES[begun[-1] % len(FILES)] if begun else None
        if ended:
            old = dict.fromkeys(old, HASHES[ended[-1] % len(FILES)])
        interrupted += len(begun) > len(ended)
        for tag in old:
            version = store.resolve(f"flowers@{tag}")
            assert version.hash in (old[tag], new)
            assert store.read(f"flowers@{tag}") == FILES[HASHES.index(version.hash)]
            store.load(f"flowers@{tag}")
            old[tag] = version.hash
        assert store.list() == Index(store._storage).scan()
        assert store.verify() == []
        turn = begun[-1] + 1 if begun else turn
    print(f"{KILLS} kills, {interrupted} of them inside a publication")
    assert interrupted > KILLS // 4
    store.collect()
    assert {version.hash for version in store.list()} == set(old.values())


def test_processes_publish_at_once_while_others_read_and_collect(publishers: Publishers, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish("flowers", FILES[0], tags=("latest", "prod"))
    for number in range(3):
        publishers.start(number, 8)
    done: list[list[int]] = []
    waiting = threading.Thread(target=lambda: done.append(publishers.wait()))
    waiting.start()
    reads = 0
    while waiting.is_alive():
        for reference in ("flowers", "flowers@prod"):
            store.load(reference)
            reads += 1
        store.collect()
        assert {version.name for version in store.list()} == {"flowers"}
    waiting.join()
    assert done == [[0, 0, 0]]
    assert reads > 0
    assert store.verify() == []
    assert store.list() == Index(store._storage).scan()


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_threads_publish_tag_remove_collect_and_list_at_once(place: str, tmp_path: Path) -> None:
    """Every name's tag `keep` is set to a version that others collect; whoever succeeds finds the version there."""
    url = str(tmp_path / "store") if place == "folder" else f"memory://{tmp_path}"
    names, failures = ("flowers", "birds"), []
    stop = threading.Event()

    def write(seed: int) -> None:
        chance, store = random.Random(seed), Store(url)
        for _ in range(15):
            name = chance.choice(names)
            version = store.publish(name, chance.choice(FILES), tags=("latest", f"own-{seed}"))
            assert store.resolve(f"{name}@own-{seed}").hash == version.hash
            assert store.load(f"{name}@own-{seed}")
            try:
                store.tag(name, "keep", chance.choice(store.versions(name)))
            except UnknownPatchError:  # collected meanwhile, and said so
                continue

    def collect() -> None:
        store = Store(url)
        while not stop.is_set():
            store.collect()
            store.list()

    def guarded(work: object, *arguments: int) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=guarded, args=(write, seed)) for seed in range(4)]
    collectors = [threading.Thread(target=guarded, args=(collect,)) for _ in range(2)]
    for thread in (*writers, *collectors):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in collectors:
        thread.join()
    assert failures == []
    store = Store(url)
    assert store.verify() == []
    assert store.list() == Index(store._storage).scan()
    for version in store.list():
        store.load(version)
    store.collect()
    assert all(version.tags for version in store.list())
