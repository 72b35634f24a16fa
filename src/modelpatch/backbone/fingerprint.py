"""Content hashes of frozen tensors: SHA-256 over names, dtypes, shapes and bytes, buffers included."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from modelpatch.backbone.chain import Chain

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Fingerprint(BaseModel, frozen=True, extra="forbid"):
    """Content hashes of a backbone. Two backbones with the same `chain` give every patch the same features.

    `segments` holds one hash per segment of the chain, `head` that of the base's own classifier; `chain` hashes the
    segments in order, and the tables that several read, and `whole` the chain and the head.
    """

    whole: Hash
    chain: Hash
    head: Hash
    segments: tuple[Hash, ...]

    def __str__(self) -> str:
        return self.whole

    @classmethod
    def of(cls, chain: Chain) -> Self:
        """Hash every parameter and buffer of the chain and of its head."""
        segments = tuple(hash_tensors(segment.named_tensors()) for segment in chain)
        head = hash_tensors((*chain.head.named_parameters(), *chain.head.named_buffers()))
        tables = (hash_tensors(chain.tables.items()),) if chain.tables else ()
        whole_chain = hash_texts((*segments, *tables))
        return cls(whole=hash_texts((whole_chain, head)), chain=whole_chain, head=head, segments=segments)


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, as 64 hexadecimal digits, of tensors in the order of their names: little-endian, row-major bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
