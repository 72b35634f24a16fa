"""Processes that publish until they are killed, for `test_store_reliability`.

    python publishing.py STORE FILE FILE ...

Reads `start TURN COUNT` and forks a process that publishes the files in turn, COUNT of them from number TURN on, as
`flowers` with the tags `latest` and `prod`; it says when each publication begins and ends. `wait` waits for all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from modelpatch.store.store import Store


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # one system call: whole or not at all, however the process ends


def publish(store: Store, patches: list[bytes], first: int, count: int) -> None:
    for turn in range(first, first + count):
        say(f"begin {turn}")
        store.publish("flowers", patches[turn % len(patches)], tags=("latest", "prod"))
        say(f"end {turn}")


def main() -> None:
    store, patches = Store(sys.argv[1]), [Path(path).read_bytes() for path in sys.argv[2:]]
    children = []
    while line := sys.stdin.readline().split():
        if line[0] == "wait":
            ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            children = []
            say(f"ended {' '.join(map(str, ends))}")
            continue
        child = os.fork()
        if child == 0:
            try:
                publish(store, patches, int(line[1]), int(line[2]))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
        say(f"child {child}")


if __name__ == "__main__":
    main()
