"""Codecs: a patch's tensors to the tensors of its file and back, value for value. docs/patch-format.md has a table of them.

The header names the codec of every tensor, with the shape where the stored tensor does not have it: `bits:64x32x3x3`.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelpatch.errors import MissingExtraError
from modelpatch.patch.entropy import MAX_BITS, decode_bits, encode_bits

NUMBERS_A_BYTE = 2048  # that masks may unfold to: coded, even one in a thousand weights takes more
LEAST_NUMBERS = 2**22  # that any file may have
STREAM, SCALE, WHERE = "masks", "scale/", "bits/"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLAIN = {**FLOATS, "int32": torch.int32}
STORAGE = (*FLOATS, "int8")  # what floating tensors can be stored as
CODEC = re.compile(r"(entropy-)?([a-z0-9]+)(?::([0-9]{1,9}(?:x[0-9]{1,9}){0,7}))?")
Entries = dict[str, Tensor]  # of the file
Bits = NDArray[np.bool_]
Planes = tuple[Bits, ...]  # flat, one bit a number; a second coded plane counts where the first is set
Take = Callable[[str, torch.dtype], Tensor]  # an entry of the file by its name


@dataclass(frozen=True)
class CodecKind:
    """A way to store the tensors that `fits` accepts, if no kind before it does.

    `pack` gives a tensor's entries by the prefixes of its name, and its bits: `planes` of every number, which lie in the entry
    `where` + NAME or, if they can be `coded`, with those of others. `unpack` raises ValueError for entries of no tensor.
    """

    fits: Callable[[str, Tensor], object]
    pack: Callable[[Tensor], tuple[Entries, Planes]]
    unpack: Callable[[str, tuple[int, ...], Planes, Take], Tensor]
    planes: int = 0
    where: str = ""
    coded: bool = False


def _pack_int8(tensor: Tensor) -> tuple[Entries, Planes]:
    scale = channel_scale(tensor)
    return {"": (tensor / _per_channel(scale, tensor)).round().to(torch.int8), SCALE: scale}, ()


def _unpack_int8(name: str, shape: tuple[int, ...], planes: Planes, take: Take) -> Tensor:
    tensor, scale = take(name, torch.int8), take(SCALE + name, torch.float32)
    if tensor.ndim < 2 or scale.shape != tensor.shape[:1]:
        raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} has scales of shape {tuple(scale.shape)}")
    values = tensor.float() * _per_channel(scale, tensor)
    if not torch.equal(channel_scale(values), scale):  # they may be infinite, or others when they are written again
        raise ValueError(f"tensor {name} has scales that are not those of its numbers")
    return values


def _pack_mask(mask: Tensor) -> tuple[Entries, Planes]:
    values = mask.reshape(-1).numpy()
    return {}, (values != 0, values > 0)[: 1 if mask.dtype == torch.bool else 2]


def _unpack_mask(name: str, shape: tuple[int, ...], planes: Planes, take: Take) -> Tensor:
    kept, *positive = planes
    mask = np.where(kept, np.where(positive[0], 1, -1), 0).astype(np.int8) if positive else kept
    return torch.from_numpy(mask).view(shape)


def _pack_sparse(tensor: Tensor) -> tuple[Entries, Planes]:
    return {"": tensor[tensor != 0]}, (tensor.reshape(-1).numpy() != 0,)


def _unpack_sparse(name: str, shape: tuple[int, ...], planes: Planes, take: Take) -> Tensor:
    places, values = torch.from_numpy(planes[0]), take(name, torch.float32)
    if values.shape != (int(places.sum()),):
        raise ValueError(f"tensor {name} has {tuple(values.shape)} values for {int(places.sum())} places")
    return torch.zeros(math.prod(shape)).masked_scatter(places, values).view(shape)


def _pack_sizes(tensor: Tensor) -> tuple[Entries, Planes]:
    sizes = sizes_of(tensor)
    assert sizes is not None
    planes = (tensor < 0, tensor.abs() == _per_channel(sizes[:, -1], tensor))[: sizes.shape[1]]
    return {SCALE: sizes.squeeze(1).contiguous()}, tuple(plane.reshape(-1).numpy() for plane in planes)


def _unpack_sizes(name: str, shape: tuple[int, ...], planes: Planes, take: Take) -> Tensor:
    if len(shape) < 2:
        raise ValueError(f"tensor {name} of shape {shape} has no channels with signs")
    scale = take(SCALE + name, torch.float32)
    fits = scale.shape == (shape[0], 2)[: len(planes)]
    sizes = scale.view(shape[0], len(planes)) if fits else scale
    if not fits or not (sizes >= 0).all() or not (sizes.diff(dim=1) >= 0).all():
        given = f"scales of shape {tuple(scale.shape)}, below 0 or not in order"
        raise ValueError(f"tensor {name} of shape {shape} has {given}")
    negative, *large = (torch.from_numpy(plane).view(shape) for plane in planes)
    chosen = _per_channel(sizes[:, 0], negative)
    if large:
        chosen = torch.where(large[0], _per_channel(sizes[:, 1], negative), chosen)
    return torch.where(negative, -chosen, chosen) + 0.0


def _has_sizes(name: str, tensor: Tensor, count: int) -> bool:
    sizes = sizes_of(tensor) if name.startswith("delta/") else None
    return sizes is not None and sizes.shape[1] == count


def is_sparse(delta: Tensor) -> bool:
    """True if a difference is mostly zero, so that its places and values are fewer than its numbers."""
    return 2 * int(delta.count_nonzero()) < delta.numel()


def _fits_sparse(name: str, tensor: Tensor) -> bool:
    return name.startswith("delta/") and tensor.dtype == torch.float32 and is_sparse(tensor)


def _plain(dtype: torch.dtype) -> CodecKind:
    return CodecKind(
        lambda _, tensor: tensor.dtype == dtype,
        lambda tensor: ({"": tensor}, ()),
        lambda name, shape, planes, take: take(name, dtype),
    )


KINDS = {
    "signs": CodecKind(partial(_has_sizes, count=1), _pack_sizes, _unpack_sizes, planes=1),
    "sparse": CodecKind(_fits_sparse, _pack_sparse, _unpack_sparse, planes=1, where=WHERE, coded=True),
    "sizes": CodecKind(partial(_has_sizes, count=2), _pack_sizes, _unpack_sizes, planes=2),
    "bits": CodecKind(lambda _, mask: mask.dtype == torch.bool, _pack_mask, _unpack_mask, planes=1, coded=True),
    "trits": CodecKind(lambda _, mask: mask.dtype == torch.int8, _pack_mask, _unpack_mask, planes=2, coded=True),
    "int8": CodecKind(lambda *_: False, _pack_int8, _unpack_int8),  # where it is asked for
    **{name: _plain(dtype) for name, dtype in PLAIN.items()},
}


@dataclass(frozen=True)
class Codec:
    """The name of a kind and, for what is packed, the shape of the tensor in memory."""

    kind: str
    shape: tuple[int, ...] = ()
    coded: bool = False

    def __str__(self) -> str:
        return f"{'entropy-' * self.coded}{self.kind}" + (f":{'x'.join(map(str, self.shape))}" if self.shape else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for a text that is no codec."""
        match = CODEC.fullmatch(text)
        kind = KINDS.get(match[2]) if match else None
        if not match or not kind or bool(match[3]) != bool(kind.planes) or (match[1] and not kind.coded):
            raise ValueError(f"{text[:80]!r} is no codec")
        return cls(match[2], tuple(map(int, match[3].split("x"))) if match[3] else (), bool(match[1]))

    @classmethod
    def of(cls, name: str, tensor: Tensor, int8: bool = False) -> Self:
        """The codec of a tensor in memory. Raises ValueError where none can hold it."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if int8 and (dtype != "float32" or tensor.ndim < 2):
            raise ValueError(f"{name} has dtype {dtype} and {tensor.ndim} axes; int8 stores float32 matrices")
        kind = "int8" if int8 else next((kind for kind, one in KINDS.items() if one.fits(name, tensor)), None)
        if kind is None:
            raise ValueError(f"{name} has dtype {dtype}; a patch holds {', '.join(PLAIN)}, bool and int8")
        return cls(kind, tuple(tensor.shape) if KINDS[kind].planes else ())

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def planes(self) -> int:
        return KINDS[self.kind].planes


def most_numbers(size: int) -> int:
    """The numbers that the masks of a file of so many bytes may unfold to."""
    return max(LEAST_NUMBERS, NUMBERS_A_BYTE * size)


def pack(
    tensors: Mapping[str, Tensor], int8: Collection[str] = (), compress: bool = True
) -> tuple[Entries, dict[str, str]]:
    """The file's tensors and the codec of every patch tensor.

    `int8` names the tensors stored as integers. Bits are entropy-coded if that is allowed, available and smaller.
    Raises ValueError for a tensor that no codec can hold.
    """
    codecs = {name: Codec.of(name, tensor, name in int8) for name, tensor in sorted(tensors.items())}
    kinds = {name: KINDS[codec.kind] for name, codec in codecs.items()}
    stored: dict[str, Tensor] = {}
    planes: dict[str, Planes] = {}
    for name, kind in kinds.items():
        entries, planes[name] = kind.pack(tensors[name])
        stored |= {prefix + name: entry for prefix, entry in entries.items()}
    packed = {name: np.concatenate([np.packbits(plane) for plane in bits]) for name, bits in planes.items() if bits}
    masks = {name: planes[name] for name in packed if kinds[name].coded}
    stream = _encode(masks) if compress and masks else None
    size = sum(entry.nbytes for entry in stored.values()) + len(stream or b"")
    small = sum(codec.numbers for codec in codecs.values() if codec.shape) > most_numbers(
        size
    )  # no reader would unfold it
    if stream is not None and not small and len(stream) < sum(len(packed[name]) for name in masks):
        stored[STREAM] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
        codecs |= {name: replace(codecs[name], coded=True) for name in masks}
    for name, data in packed.items():
        if not codecs[name].coded:
            stored[kinds[name].where + name] = torch.from_numpy(data)
    return stored, {name: str(codec) for name, codec in codecs.items()}


def unpack(stored: Mapping[str, Tensor], codecs: Mapping[str, str], most: int = MAX_BITS) -> dict[str, Tensor]:
    """The patch's tensors. Raises ValueError where the stored tensors are not those the codecs describe.

    Packed numbers unfold to many times their bytes: files that say they hold more than `most` of them are refused first.
    """
    left = dict(stored)

    def take(entry: str, dtype: torch.dtype) -> Tensor:
        if entry not in left:
            raise ValueError(f"tensor {entry} is missing")
        tensor = left.pop(entry)
        if tensor.dtype != dtype:
            raise ValueError(f"tensor {entry} is stored as {tensor.dtype}, expected {dtype}")
        return tensor

    parsed = {name: Codec.parse(text) for name, text in sorted(codecs.items())}
    numbers = sum(codec.numbers for codec in parsed.values() if codec.shape)
    if numbers > most:
        raise ValueError(f"{numbers:,} packed numbers; at most {most:,} are read here")
    coded = {name: codec for name, codec in parsed.items() if codec.coded}
    planes = _decode(take(STREAM, torch.uint8), coded) if coded else {}
    tensors = {}
    for name, codec in parsed.items():
        kind = KINDS[codec.kind]
        if kind.planes and not codec.coded:
            entry = kind.where + name
            packed = take(entry, torch.uint8)
            if packed.shape != (kind.planes * -(-codec.numbers // 8),):
                raise ValueError(f"tensor {entry} does not hold {kind.planes} bits for each of {codec.numbers} numbers")
            bits = (np.unpackbits(plane, count=codec.numbers) for plane in np.split(packed.numpy(), kind.planes))
            planes[name] = tuple(plane.view(np.bool_) for plane in bits)
        tensors[name] = kind.unpack(name, codec.shape, planes.pop(name, ()), take)
    if left:
        raise ValueError(f"no codec describes tensor {sorted(left)[0]!r}")
    return tensors


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
    """A near float32 tensor of two sizes in every channel (first axis), as `sizes` stores.

    Lloyd's algorithm (1982) on |delta|: every number takes the nearer size, each size is the mean of its numbers.
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


def channel_scale(tensor: Tensor) -> Tensor:
    """max |w| / 127 of every channel (C,), rounded up to 16 bits of mantissa: an integer times it is exact in float32,
    so that a tensor read from a file gives the same file again."""
    scale = tensor.reshape(tensor.shape[0], -1).abs().amax(1) / 127
    return ((scale.view(torch.int32) + 255) & ~255).view(torch.float32).masked_fill(scale == 0, 1.0)


def _per_channel(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (tensor.ndim - 1))


def _encode(planes: Mapping[str, Planes]) -> bytes | None:
    """One stream: all first planes, then the second ones where the first are set. None without `constriction`."""
    bits = [first for first, *_ in planes.values()]
    bits += [second[first] for first, *rest in planes.values() for second in rest]
    try:
        return encode_bits(np.concatenate(bits))
    except MissingExtraError:
        return None


def _decode(stream: Tensor, codecs: Mapping[str, Codec]) -> dict[str, Planes]:
    bits = decode_bits(stream.numpy().tobytes(), sum(codec.planes * codec.numbers for codec in codecs.values()))
    at = 0

    def take(count: int) -> Bits:
        nonlocal at
        at += count
        if at > len(bits):
            raise ValueError(f"the stream {STREAM!r} ends before the last mask")
        return bits[at - count : at]

    planes: dict[str, Planes] = {name: (take(codec.numbers),) for name, codec in codecs.items()}
    for name, codec in codecs.items():
        if codec.planes == 2:
            where = planes[name][0]
            positive = np.zeros(codec.numbers, np.bool_)
            positive[where] = take(int(where.sum()))
            planes[name] = where, positive
    if at != len(bits):
        raise ValueError(f"the stream {STREAM!r} holds {len(bits)} bits for masks of {at}")
    return planes
