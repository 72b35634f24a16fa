"""The number of cores that a thread computes with.

Every thread that computes has OpenMP workers of its own, and where a process has more of both than cores they wake up late
between any two layers. So one thread computes with all cores, and any other with one. PyTorch's setting alone is not enough: a
thread whose first work is a convolution starts with as many workers as there are cores.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_CHANGING = threading.Lock()


def compute_with(threads: int) -> None:
    """Set the number of cores of the calling thread alone.

    PyTorch sets it together with the number that new threads start with; the second is put back.
    """
    with _CHANGING:
        others = torch.get_num_threads()
        torch.set_num_threads(threads)
        putting_back = threading.Thread(target=torch.set_num_threads, args=(others,))
        putting_back.start()
        putting_back.join()


def computing_pool(threads: int, name: str, workers: int = 1) -> ThreadPoolExecutor:
    """A pool of `workers` threads that each compute with `threads` cores."""
    return ThreadPoolExecutor(workers, name, initializer=compute_with, initargs=(threads,))
