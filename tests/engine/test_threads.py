"""A thread's number of threads is its own affair."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modelpatch.engine.threads import compute_with


def in_a_thread(**options: object) -> int:
    with ThreadPoolExecutor(1, **options) as one:  # type: ignore[arg-type]
        return one.submit(torch.get_num_threads).result()


def test_one_thread_gets_its_own_number_and_all_others_keep_theirs() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert in_a_thread(initializer=compute_with, initargs=(1,)) == 1
        assert in_a_thread(initializer=compute_with, initargs=(3,)) == 3
        assert torch.get_num_threads() == 2
        assert in_a_thread() == 2
    finally:
        torch.set_num_threads(before)


COUNTED = """
import os, time, torch
from modelpatch.engine.threads import computing_pool

def threads():
    # one that has ended is listed for a moment longer
    counts = []
    for _ in range(50):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.01)
    return min(counts)

def convolve():
    torch.nn.functional.conv2d(torch.ones(1, 3, 64, 64), torch.ones(32, 3, 3, 3))
    return threads()

for count in (1, 3):
    before = threads()
    with computing_pool(count, "computing") as pool:
        print(count, pool.submit(convolve).result() - before)
"""


@pytest.mark.service
@pytest.mark.skipif(
    sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="counts Linux threads of several cores"
)
def test_a_thread_with_one_core_starts_no_helpers_whatever_it_computes_first() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 1", "3 3"]
