"""Random numbers that follow a seed of several numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_generator(seed: tuple[int, ...]) -> torch.Generator:
    """A generator that follows all numbers of the seed."""
    return torch.Generator().manual_seed(mix(*seed))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the random numbers of Python, NumPy and torch within the context, and restore their state after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = mix(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
