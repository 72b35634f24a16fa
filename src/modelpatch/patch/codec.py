"""Codecs: a patch's tensors to the tensors of its file and back, value for value.

    kind                        a tensor in memory                stored as
    float32 float16 bfloat16    that dtype                        itself
    int32                       int32                             itself
    int8                        float32 on a grid per channel     NAME int8 and scale/NAME float32 (C,)
    bits                        bool, a binary mask               NAME packed, one bit a weight
    trits                       int8 in {-1, 0, 1}                NAME packed, two planes: not zero, positive
    sparse                      float32, a sparse difference      NAME its non-zero values, bits/NAME where they are
    signs                       float32, a difference of one      NAME packed, one bit a weight: negative; scale/NAME
                                size in every channel             float32 (C,)
    sizes                       float32, a difference of two      NAME packed, two planes: negative, of the larger size;
                                sizes in every channel            scale/NAME float32 (C, 2)
    entropy-bits and so on      the same                          the bits of all of them in `masks`, entropy-coded

The header names the codec of every tensor, with the shape where the stored tensor does not have it: `bits:64x32x3x3`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelpatch.errors import MissingExtraError
from modelpatch.patch.entropy import MAX_BITS, decode_bits, encode_bits

STREAM, SCALE, WHERE = "masks", "scale/", "bits/"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLAIN = {**FLOATS, "int32": torch.int32}
STORAGE = (*FLOATS, "int8")  # what floating tensors can be stored as
PACKED = ("bits", "trits", "sparse")
SIGNS, SIZES = "signs", "sizes"
CODEC = re.compile(
    rf"({'|'.join(PLAIN)}|int8)|((?:entropy-)?(?:{'|'.join(PACKED)})|{SIGNS}|{SIZES}):([0-9]{{1,9}}(?:x[0-9]{{1,9}}){{0,7}})"
)
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Codec:
    """A kind and, for what is packed, the shape of the tensor in memory."""

    kind: str
    shape: tuple[int, ...] = ()
    coded: bool = False

    def __str__(self) -> str:
        return f"{'entropy-' * self.coded}{self.kind}" + (f":{'x'.join(map(str, self.shape))}" if self.shape else "")

    @classmethod
    def parse(cls, text: str) -> Codec:
        """Raises ValueError for a text that is no codec."""
        match = CODEC.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:80]!r} is no codec")
        if match[1]:
            return cls(match[1])
        return cls(match[2].removeprefix("entropy-"), tuple(map(int, match[3].split("x"))), match[2][:8] == "entropy-")

    @classmethod
    def of(cls, name: str, tensor: Tensor, int8: bool = False) -> Codec:
        """The codec of a tensor in memory. Raises ValueError where none can hold it."""
        if int8:
            if tensor.dtype != torch.float32 or tensor.ndim < 2:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype} and {tensor.ndim} axes; int8 stores float32 matrices"
                )
            return cls("int8")
        shape = tuple(tensor.shape)
        sizes = sizes_of(tensor) if name.startswith("delta/") else None
        if sizes is not None and sizes.shape[1] == 1:
            return cls(SIGNS, shape)
        if name.startswith("delta/") and tensor.dtype == torch.float32 and 2 * tensor.count_nonzero() < tensor.numel():
            return cls("sparse", shape)
        if sizes is not None:
            return cls(SIZES, shape)
        if tensor.dtype in (torch.bool, torch.int8):
            return cls("bits" if tensor.dtype == torch.bool else "trits", shape)
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in PLAIN:
            raise ValueError(f"{name} has dtype {kind}; a patch holds {', '.join(PLAIN)}, bool and int8")
        return cls(kind)

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def planes(self) -> int:
        return 2 if self.kind in ("trits", SIZES) else 1


@dataclass
class _Packing:
    """A tensor on its way into the file: planes of bits, of which the second counts only where the first is set."""

    codec: Codec
    entry: str  # where its bits lie if they are not entropy-coded
    planes: tuple[Bits, ...]


def pack(
    tensors: Mapping[str, Tensor], int8: Collection[str] = (), compress: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and the codec of every patch tensor.

    `int8` names the tensors stored as integers. Bits are entropy-coded if that is allowed, available and smaller.
    Raises ValueError for a tensor that no codec can hold.
    """
    stored: dict[str, Tensor] = {}
    codecs: dict[str, Codec] = {}
    packings: dict[str, _Packing] = {}
    for name, tensor in sorted(tensors.items()):
        codec = codecs[name] = Codec.of(name, tensor, name in int8)
        if codec.kind == "int8":
            scale = stored[SCALE + name] = channel_scale(tensor)
            stored[name] = (tensor / _per_channel(scale, tensor)).round().to(torch.int8)
        elif codec.kind in (SIGNS, SIZES):
            sizes = sizes_of(tensor)
            assert sizes is not None
            planes = [tensor < 0, tensor.abs() == _per_channel(sizes[:, -1], tensor)][: codec.planes]
            stored[SCALE + name] = sizes if codec.kind == SIZES else sizes[:, 0].contiguous()
            bits = [np.packbits(plane.reshape(-1).numpy()) for plane in planes]
            stored[name] = torch.from_numpy(np.concatenate(bits))
        elif codec.kind == "sparse":
            packings[name] = _Packing(codec, WHERE + name, _planes(tensor)[:1])
            stored[name] = tensor[tensor != 0]
        elif codec.kind in PACKED:
            packings[name] = _Packing(codec, name, _planes(tensor))
        else:
            stored[name] = tensor
    packed = {p.entry: np.concatenate([np.packbits(plane) for plane in p.planes]) for p in packings.values()}
    stream = _encode(packings) if compress and packings else None
    if stream is not None and len(stream) < sum(len(data) for data in packed.values()):
        stored[STREAM] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
        codecs |= {name: Codec(p.codec.kind, p.codec.shape, coded=True) for name, p in packings.items()}
    else:
        stored |= {entry: torch.from_numpy(data) for entry, data in packed.items()}
    return stored, {name: str(codec) for name, codec in codecs.items()}


def unpack(stored: Mapping[str, Tensor], codecs: Mapping[str, str], most: int = MAX_BITS) -> dict[str, Tensor]:
    """The patch's tensors. Raises ValueError where the stored tensors are not those the codecs describe.

    Packed numbers unfold to many times their bytes: files that say they hold more than `most` of them are refused first.
    """
    reader = _Reader(dict(stored))
    parsed = {name: Codec.parse(text) for name, text in sorted(codecs.items())}
    numbers = sum(codec.numbers for codec in parsed.values() if codec.shape)
    if numbers > most:
        raise ValueError(f"{numbers:,} packed numbers; at most {most:,} are read here")
    coded = {name: codec for name, codec in parsed.items() if codec.coded}
    planes = _decode(reader.take(STREAM, torch.uint8), coded) if coded else {}
    tensors = {}
    for name, codec in parsed.items():
        if codec.kind in PLAIN:
            tensors[name] = reader.take(name, PLAIN[codec.kind])
        elif codec.kind == "int8":
            tensors[name] = reader.take_int8(name)
        elif codec.kind in (SIGNS, SIZES):
            tensors[name] = reader.take_sizes(name, codec)
        else:
            if not codec.coded:
                planes[name] = reader.take_bits(WHERE + name if codec.kind == "sparse" else name, codec)
            values = reader.take(name, torch.float32) if codec.kind == "sparse" else None
            tensors[name] = _assemble(name, codec, planes.pop(name), values)
    if reader.left:
        raise ValueError(f"no codec describes tensor {sorted(reader.left)[0]!r}")
    return tensors


@dataclass
class _Reader:
    """The file's tensors; each is taken once."""

    left: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self.left:
            raise ValueError(f"tensor {name} is missing")
        tensor = self.left.pop(name)
        if tensor.dtype != dtype:
            raise ValueError(f"tensor {name} is stored as {tensor.dtype}, expected {dtype}")
        return tensor

    def take_int8(self, name: str) -> Tensor:
        tensor, scale = self.take(name, torch.int8), self.take(SCALE + name, torch.float32)
        if tensor.ndim < 2 or scale.shape != tensor.shape[:1]:
            raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} has scales of shape {tuple(scale.shape)}")
        values = tensor.float() * _per_channel(scale, tensor)
        if not torch.equal(channel_scale(values), scale):  # they may be infinite, or others when they are written again
            raise ValueError(f"tensor {name} has scales that are not those of its numbers")
        return values

    def take_sizes(self, name: str, codec: Codec) -> Tensor:
        if len(codec.shape) < 2:
            raise ValueError(f"tensor {name} of shape {codec.shape} has no channels with signs")
        negative, *large = self.take_bits(name, codec)
        scale = self.take(SCALE + name, torch.float32)
        if scale.shape != (codec.shape[:1] if codec.kind == SIGNS else (codec.shape[0], 2)) or not _rising(scale):
            raise ValueError(
                f"tensor {name} of shape {codec.shape} has scales of shape {tuple(scale.shape)}, below 0 or not in order"
            )
        signs = torch.from_numpy(np.where(negative, np.float32(-1), np.float32(1))).view(codec.shape)
        sizes = _per_channel(scale.view(codec.shape[0], -1)[:, 0], signs)
        if large:
            sizes = torch.where(torch.from_numpy(large[0]).view(codec.shape), _per_channel(scale[:, 1], signs), sizes)
        return signs * sizes + 0.0

    def take_bits(self, entry: str, codec: Codec) -> tuple[Bits, ...]:
        tensor = self.take(entry, torch.uint8)
        if tensor.shape != (codec.planes * -(-codec.numbers // 8),):
            raise ValueError(f"tensor {entry} does not hold {codec.planes} bits for each of {codec.numbers} numbers")
        planes = np.split(tensor.numpy(), codec.planes)
        return tuple(np.unpackbits(plane, count=codec.numbers).view(np.bool_) for plane in planes)


def snap_int8(tensor: Tensor) -> Tensor:
    """The nearest float32 tensor whose channels (first axis) are 8-bit integers times a scale: what `int8` stores."""
    grid = _per_channel(channel_scale(tensor.float()), tensor)
    return (tensor.float() / grid).round() * grid + 0.0  # integers have one zero, floats two


def snap_signs(delta: Tensor) -> Tensor:
    """The nearest float32 tensor of one size in every channel (first axis), s sign(delta): what `signs` stores.

    s = mean |delta| has the least squared error (Liu et al., *BitDelta: Your Fine-Tune May Only Be Worth One Bit*, 2024,
    equation 2, which has one s a matrix).
    """
    scale = delta.float().reshape(len(delta), -1).abs().mean(1)
    return torch.where(delta < 0, -1.0, 1.0) * _per_channel(scale, delta) + 0.0


def snap_sizes(delta: Tensor, rounds: int = 20) -> Tensor:
    """A near float32 tensor of two sizes in every channel (first axis): what `sizes` stores.

    The sizes are those of Lloyd's algorithm (1982) on |delta|: every number takes the nearer one, each is the mean of its
    numbers, `rounds` times over.
    """
    sizes = delta.float().reshape(len(delta), -1).abs()
    high = 2 * sizes.mean(1, keepdim=True)
    low = torch.zeros_like(high)  # the mean parts them at first
    for _ in range(rounds):
        large = sizes > (low + high) / 2
        low = torch.where(large, 0, sizes).sum(1, keepdim=True) / (~large).sum(1, keepdim=True).clamp(min=1)
        count = large.sum(1, keepdim=True)
        high = torch.where(count > 0, torch.where(large, sizes, 0).sum(1, keepdim=True) / count.clamp(min=1), high)
    nearest = torch.where(sizes > (low + high) / 2, high, low).view(delta.shape)
    return torch.where(delta < 0, -1.0, 1.0) * nearest + 0.0


def sizes_of(tensor: Tensor) -> Tensor | None:
    """The sizes (C, 1) or (C, 2), rising, of a float32 tensor whose numbers have no others in their channel (first axis).

    None where they have more, where all numbers are zero, and where there are too few numbers for it to mean anything.
    """
    if tensor.dtype != torch.float32 or tensor.ndim < 2 or tensor.numel() <= len(tensor):
        return None
    sizes = tensor.flatten(1).abs()
    ends = torch.stack([sizes.amin(1), sizes.amax(1)], 1)
    if not sizes.any():
        return None
    if torch.equal(ends[:, 0], ends[:, 1]):
        return ends[:, :1]
    few = bool(((sizes == ends[:, :1]) | (sizes == ends[:, 1:])).all())
    return ends if few and tensor.numel() > 2 * len(tensor) else None


def _rising(scale: Tensor) -> bool:
    return bool((scale >= 0).all() and (scale.view(len(scale), -1).diff(dim=1) >= 0).all())


def channel_scale(tensor: Tensor) -> Tensor:
    """max |w| / 127 of every channel (C,), rounded up to 16 bits of mantissa: an integer times it is exact in float32,
    so that a tensor read from a file gives the same file again."""
    scale = tensor.reshape(tensor.shape[0], -1).abs().amax(1) / 127
    return ((scale.view(torch.int32) + 255) & ~255).view(torch.float32).masked_fill(scale == 0, 1.0)


def _per_channel(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (tensor.ndim - 1))


def _planes(tensor: Tensor) -> tuple[Bits, ...]:
    """Flat planes of bits: not zero and, for ternary masks, positive."""
    values = tensor.reshape(-1).numpy()
    return (values != 0, values > 0) if tensor.dtype == torch.int8 else (values != 0,)


def _assemble(name: str, codec: Codec, planes: tuple[Bits, ...], values: Tensor | None) -> Tensor:
    where = planes[0]
    if codec.kind == "bits":
        return torch.from_numpy(where).view(codec.shape)
    if codec.kind == "trits":
        return torch.from_numpy(np.where(where, np.where(planes[1], 1, -1), 0).astype(np.int8)).view(codec.shape)
    assert values is not None
    if values.shape != (int(where.sum()),):
        raise ValueError(f"tensor {name} has {tuple(values.shape)} values for {int(where.sum())} places")
    dense = torch.zeros(codec.numbers)
    dense[torch.from_numpy(where)] = values
    return dense.view(codec.shape)


def _encode(packings: Mapping[str, _Packing]) -> bytes | None:
    """One stream: all first planes, then the second ones where the first are set. None without `constriction`."""
    bits = [packing.planes[0] for packing in packings.values()]
    bits += [packing.planes[1][packing.planes[0]] for packing in packings.values() if packing.codec.planes == 2]
    try:
        return encode_bits(np.concatenate(bits))
    except MissingExtraError:
        return None


def _decode(stream: Tensor, codecs: Mapping[str, Codec]) -> dict[str, tuple[Bits, ...]]:
    """The planes of every entropy-coded tensor."""
    bits = decode_bits(stream.numpy().tobytes(), sum(codec.planes * codec.numbers for codec in codecs.values()))
    at = 0

    def take(count: int) -> Bits:
        nonlocal at
        at += count
        if at > len(bits):
            raise ValueError(f"the stream {STREAM!r} ends before the last mask")
        return bits[at - count : at]

    planes: dict[str, tuple[Bits, ...]] = {name: (take(codec.numbers),) for name, codec in codecs.items()}
    for name, codec in codecs.items():
        if codec.planes == 2:
            where = planes[name][0]
            positive = np.zeros(codec.numbers, np.bool_)
            positive[where] = take(int(where.sum()))
            planes[name] = where, positive
    if at != len(bits):
        raise ValueError(f"the stream {STREAM!r} holds {len(bits)} bits for masks of {at}")
    return planes
