"""A thread's number of threads is its own affair."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
