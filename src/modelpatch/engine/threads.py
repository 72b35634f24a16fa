"""How many cores a thread computes with.

Every thread that computes keeps helpers of its own. As soon as a process has more computing threads and helpers than cores,
OpenMP lets all of them sleep between any two layers, and they wake up late, which can take longer than the layers. So one
thread of a process computes with all cores, and what else computes has one. PyTorch's own number does not see to that: a
thread whose first work is a convolution starts with as many as there are cores.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_CHANGING = threading.Lock()


def compute_with(threads: int) -> None:
    """Let the calling thread compute with so many, and all others go on as they are.

    PyTorch sets the number of the calling thread together with the one that new threads start with; the second is put back.
    """
    with _CHANGING:
        others = torch.get_num_threads()
        torch.set_num_threads(threads)
        putting_back = threading.Thread(target=torch.set_num_threads, args=(others,))
        putting_back.start()
        putting_back.join()


def computing_pool(threads: int, name: str, workers: int = 1) -> ThreadPoolExecutor:
    """Worker threads that each compute with so many."""
    return ThreadPoolExecutor(workers, name, initializer=compute_with, initargs=(threads,))
