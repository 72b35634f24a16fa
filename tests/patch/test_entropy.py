"""Entropy-coded bits come back as they were, take what their entropy says, and are checked before they are used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpatch.patch.entropy import CHUNKS, HEADER, LEVELS, decode_bits, encode_bits, entropy_bits


def random_bits(density: float, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < density


@settings(deadline=None, max_examples=60)
@given(
    density=st.sampled_from([0.0, 1e-3, 0.1, 0.48, 0.5, 0.9, 1.0]) | st.floats(0, 1),
    count=st.integers(0, 40_000),
    seed=st.integers(0, 5),
)
def test_bits_come_back_as_they_were(density: float, count: int, seed: int) -> None:
    bits = random_bits(density, count, seed)
    assert np.array_equal(decode_bits(encode_bits(bits)), bits)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.8, 0.97])
def test_independent_bits_take_their_entropy(density: float) -> None:
    bits = random_bits(density, 2_000_000)
    floor = entropy_bits(int(bits.sum()), len(bits))
    assert floor <= 1.01 * 8 * len(encode_bits(bits)) <= 1.03 * floor


def test_layers_of_different_density_take_the_sum_of_their_entropies() -> None:
    layers = [random_bits(density, 200_000, seed) for seed, density in enumerate(np.linspace(0, 0.5, 12))]
    floor = sum(entropy_bits(int(layer.sum()), len(layer)) for layer in layers)
    assert 8 * len(encode_bits(np.concatenate(layers))) <= 1.02 * floor


def test_the_entropy_is_that_of_a_coin() -> None:
    assert entropy_bits(50, 100) == 100
    assert entropy_bits(0, 100) == entropy_bits(100, 100) == 0
    assert entropy_bits(25, 100) == pytest.approx(100 * (2 - 0.75 * np.log2(3)))


def tampered(position: int, value: bytes) -> bytes:
    data = encode_bits(random_bits(0.2, 10_000))
    return data[:position] + value + data[position + len(value) :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(HEADER.size + 4 * LEVELS - 1),
        tampered(0, (CHUNKS[0] + 1).to_bytes(2, "little")),
        tampered(2, (LEVELS + 1).to_bytes(2, "little")),
        tampered(8, (2**40).to_bytes(8, "little")),
        tampered(8, (20_000).to_bytes(8, "little")),
        tampered(16, b"x" * 32),
        tampered(HEADER.size, (9).to_bytes(4, "little")),
        encode_bits(random_bits(0.2, 10_000))[:-4],
        encode_bits(random_bits(0.2, 10_000)) + bytes(4),
    ],
    ids=["nothing", "no header", "chunk", "levels", "too many", "other count", "hash", "counts", "short", "long"],
)
def test_a_stream_that_is_not_one_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"stream|chunks|bits"):
        decode_bits(data)


def test_a_flipped_bit_never_gives_other_bits() -> None:
    bits = random_bits(0.1, 4_000)
    data = encode_bits(bits)
    refused = 0
    for at in range(HEADER.size + 4 * LEVELS, len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        try:
            assert np.array_equal(decode_bits(bytes(damaged)), bits)  # a bit that the coder does not read
        except ValueError:
            refused += 1
    assert refused > 0.9 * (len(data) - HEADER.size - 4 * LEVELS)
