"""The limits of a server in one place, checked when it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from modelpatch.errors import ServeError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a server. Sizes are in bytes, times in seconds; waiting images, resident patches and running requests count
    in each worker.

    | setting | what it limits |
    |---|---|
    | token | admin verbs need it; None turns them off |
    | cache_bytes | tensors of the patches that are resident; those being loaded, at most `loaders`, come on top |
    | deadline | a request, from its first byte to its answer |
    | requests | predictions and plans at once; more get 429 |
    | queue | images that wait for the engine; more get 429 |
    | batch | images that go through the engine together |
    | images, tasks | of one request |
    | body_bytes, patch_bytes | of a request's body, and of an uploaded patch; counted as they arrive |
    | pixels | of an image, read from its header before it is decoded, and of what it is resized to |
    | refresh | how old an answer of the store may be |
    | remember | how long a patch that failed to load is refused without another try |
    | loaders, decoders | threads that load patches, and that decode images |
    """

    token: str | None = None
    cache_bytes: int = 1024 * MIB
    deadline: float = 30.0
    requests: int = 128
    queue: int = 512
    batch: int = 32
    images: int = 64
    tasks: int = 64
    body_bytes: int = 32 * MIB
    patch_bytes: int = 512 * MIB
    pixels: int = 20_000_000  # with which an image of any kind takes less than 200 MB
    refresh: float = 1.0
    remember: float = 30.0
    loaders: int = 8
    decoders: int = min(4, os.cpu_count() or 1)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("token", "refresh", "remember") and not value > 0:
                raise ServeError(f"the limit {name} is {value!r}; expected more than 0.")
        if self.refresh < 0 or self.remember < 0:
            raise ServeError(f"refresh={self.refresh}, remember={self.remember}; expected 0 seconds or more.")
        if self.queue < self.images:
            raise ServeError(f"a queue of {self.queue} never takes a request of {self.images} images; raise queue=...")
        if self.token is not None and len(self.token) < 8:
            raise ServeError("the token is shorter than 8 characters. Make one: openssl rand -hex 16")
