"""Masks at the entropy bound: the bits of all masks of a patch as one arithmetic-coded stream (`constriction`).

    bits -> chunks of equal length -> each chunk's density, rounded to one of 64 levels
    stream = the chunks' levels, then all bytes of level 0, of level 1, ...

A byte of a chunk of density p with k set bits is coded at probability p^k (1-p)^(8-k), so that n bits take close to n H(p).
Chunks follow densities, which differ between layers, at a cost of a few bits each. Probabilities are made of additions and
multiplications alone, which give the same bits on every machine, and a hash of the bits is checked after decoding.
"""

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpatch.errors import require

LEVELS = 64
CHUNKS = (128, 512, 2048)  # bytes
HEADER = struct.Struct("<HHIQ32s")  # bytes a chunk, levels, words of the stream, bits, SHA-256 of the packed bits
MAX_BITS = 2**31
EVEN = 0.49  # a chunk whose density is closer to one half is stored as it is
Bytes = NDArray[np.uint8]
_T = np.arange(LEVELS, dtype=np.float64) / (LEVELS - 1)
DENSITIES = _T * _T * (3 - 2 * _T)  # of the levels: denser towards 0 and 1, where a wrong density costs most
RAW = np.minimum(DENSITIES, 1 - DENSITIES) >= EVEN  # the levels that are stored as they are


def coder() -> Any:
    """The `constriction` library. Raises `MissingExtraError` without it."""
    return require("constriction", "compress", "An entropy-coded mask")


def encode_bits(bits: NDArray[np.bool_]) -> bytes:
    """The shortest stream for a flat array of bits. Raises `MissingExtraError` without constriction."""
    packed = np.packbits(bits)
    digest = hashlib.sha256(packed.tobytes()).digest()
    streams = (_encode(packed, chunk) for chunk in CHUNKS)
    chunk, counts, raw, words = min(streams, key=lambda stream: len(stream[2]) + 4 * len(stream[3]))
    header = HEADER.pack(chunk, LEVELS, len(words), len(bits), digest)
    return header + counts.astype("<u4").tobytes() + raw + words.astype("<u4").tobytes()


def decode_bits(data: bytes, most: int = MAX_BITS) -> NDArray[np.bool_]:
    """The bits that `encode_bits` was given, at most `most` of them.

    Raises ValueError for bytes it did not make, `MissingExtraError` without constriction.
    """
    if len(data) < HEADER.size + 4 * LEVELS:
        raise ValueError("the stream is too short for its header")
    chunk, levels, words, count, digest = HEADER.unpack_from(data)
    if chunk not in CHUNKS or levels != LEVELS or count > most:
        raise ValueError(f"a stream of {count} bits in chunks of {chunk} bytes at {levels} levels is not one of ours")
    counts = np.frombuffer(data, "<u4", LEVELS, HEADER.size).astype(np.int64)
    length = -(-count // 8)
    if counts.sum() != -(-length // chunk):
        raise ValueError("the number of chunks is not that of the bits")
    stored = chunk * int(counts[RAW].sum())
    at = HEADER.size + 4 * LEVELS
    if len(data) != at + stored + 4 * words:
        raise ValueError(f"the stream has {len(data)} bytes, its header says {at + stored + 4 * words}")
    raw = np.frombuffer(data, np.uint8, stored, at)
    packed = _decode(raw, np.frombuffer(data, "<u4", words, at + stored).astype(np.uint32), counts, chunk)[:length]
    if hashlib.sha256(packed.tobytes()).digest() != digest:
        raise ValueError("the decoded bits are not the ones that were encoded")
    return np.unpackbits(packed, count=count).view(np.bool_)


def entropy_bits(ones: int, count: int) -> float:
    """n H(p): the fewest bits for `count` independent bits of which `ones` are set."""
    if ones in (0, count):
        return 0.0
    p = ones / count
    return float(-count * (p * np.log2(p) + (1 - p) * np.log2(1 - p)))


def _byte_model(density: float) -> Any:
    """Bytes of independent bits. Multiplied step by step: powers may differ in the last bit between machines."""
    one, zero = np.ones(9), np.ones(9)
    for k in range(1, 9):
        one[k], zero[k] = one[k - 1] * density, zero[k - 1] * (1 - density)
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return coder().stream.model.Categorical(one[ones] * zero[8 - ones], perfect=False)


def _level_model(counts: NDArray[np.int64]) -> Any:
    return coder().stream.model.Categorical(counts.astype(np.float64) / float(counts.sum()), perfect=False)


def _encode(packed: Bytes, chunk: int) -> tuple[int, NDArray[np.int64], bytes, NDArray[np.uint32]]:
    """(bytes a chunk, chunks of every level, stored bytes, coded words)."""
    chunks = np.zeros((-(-len(packed) // chunk), chunk), np.uint8)
    chunks.reshape(-1)[: len(packed)] = packed
    share = np.bitwise_count(chunks).mean(1, dtype=np.float64) / 8
    edges = (DENSITIES[1:] + DENSITIES[:-1]) / 2
    levels = np.searchsorted(edges, share)
    levels[(levels == 0) & (share > 0)] = 1  # the outer levels hold chunks of one value only
    levels[(levels == LEVELS - 1) & (share < 1)] = LEVELS - 2
    counts = np.bincount(levels, minlength=LEVELS)
    stream = coder().stream.stack.AnsCoder()
    for level in np.flatnonzero(counts)[::-1]:  # a stack: what is read first is written last
        if 0 < level < LEVELS - 1 and not RAW[level]:
            values = chunks[levels == level].reshape(-1)
            stream.encode_reverse(values.astype(np.int32), _byte_model(DENSITIES[level]))
    if len(levels):
        stream.encode_reverse(levels.astype(np.int32), _level_model(counts))
    raw = b"".join(chunks[levels == level].tobytes() for level in np.flatnonzero(RAW))
    return chunk, counts, raw, stream.get_compressed()


def _decode(raw: Bytes, words: NDArray[np.uint32], counts: NDArray[np.int64], chunk: int) -> Bytes:
    total = int(counts.sum())
    chunks = np.zeros((total, chunk), np.uint8)
    if not total:
        return chunks.reshape(-1)
    stream = coder().stream.stack.AnsCoder(words)
    levels = stream.decode(_level_model(counts), total)
    if not np.array_equal(np.bincount(levels, minlength=LEVELS), counts):
        raise ValueError("the chunks' levels are not those the header counts")
    chunks[levels == LEVELS - 1] = 255
    at = 0
    for level in np.flatnonzero(counts):
        if RAW[level]:
            size = int(counts[level]) * chunk
            chunks[levels == level] = raw[at : at + size].reshape(-1, chunk)
            at += size
        elif 0 < level < LEVELS - 1:
            values = stream.decode(_byte_model(DENSITIES[level]), int(counts[level]) * chunk)
            chunks[levels == level] = values.reshape(-1, chunk)
    return chunks.reshape(-1)
