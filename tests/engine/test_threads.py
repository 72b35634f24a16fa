"""A thread's number of threads is its own affair."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modelpatch.engine.threads import compute_with, computing_pool


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


@pytest.mark.skipif(
    sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="counts Linux threads of several cores"
)
def test_a_thread_with_one_core_starts_no_helpers_whatever_it_computes_first() -> None:
    def convolve() -> int:
        torch.nn.functional.conv2d(torch.ones(1, 3, 64, 64), torch.ones(32, 3, 3, 3))
        return len(os.listdir("/proc/self/task"))

    before = len(os.listdir("/proc/self/task"))
    with computing_pool(1, "one") as one:
        assert one.submit(convolve).result() == before + 1
    with computing_pool(3, "three") as three:
        assert three.submit(convolve).result() == before + 3
