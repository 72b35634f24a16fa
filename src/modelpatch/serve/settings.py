"""The limits of a server in one place, checked when it starts."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelpatch.errors import ServeError

if TYPE_CHECKING:  # it imports torch, which `serve -h` does without
    from modelpatch.patch.signing import Signers
from modelpatch.serve.tenants import Tenants

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a server; waiting images, resident patches and running requests count in each worker."""

    backend: str = "auto"  # of the engine
    token: str | None = None  # for admin verbs; None turns them off
    signers: "Signers | None" = (
        None  # of whom one must have signed every patch and cascade; None takes unsigned ones too
    )
    tenants: Tenants | None = None  # with keys, weights and budgets; None: every address is a tenant of its own
    cache_bytes: int = 1024 * MIB  # of resident patches; those being loaded, at most `loaders`, come on top
    deadline: float = 30.0  # seconds from a request's first byte to its answer
    requests: int = 128  # predictions and plans at once; more get 429
    per_client: int = 64  # of these, and of requests that arrive, of one address; more get 429
    arriving_bytes: int = 1024 * MIB  # of the bodies of all requests; what comes beyond gets 429; of one caller half
    queue: int = 512  # images of requests that are being answered; more get 429
    batch: int = 32  # images that go through the engine together
    images: int = 64  # of one request
    tasks: int = 64  # of one request
    body_bytes: int = 32 * MIB  # of a request, counted as they arrive
    patch_bytes: int = 512 * MIB  # of an uploaded patch
    pixels: int = 20_000_000  # of an image and of what it is resized to; one of any kind then takes less than 200 MB
    refresh: float = 1.0  # seconds that an answer of the store is remembered
    remember: float = 30.0  # seconds for which a patch that failed to load is refused without another try
    loaders: int = 8  # threads that load patches
    decoders: int = min(4, os.cpu_count() or 1)  # threads that decode images
    hosts: tuple[str, ...] = ()  # names under which browsers may ask; any without

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("backend", "token", "signers", "tenants", "refresh", "remember", "hosts") and not value > 0:
                raise ServeError(f"the limit {name} is {value!r}; expected more than 0.")
        if self.refresh < 0 or self.remember < 0:
            raise ServeError(f"refresh={self.refresh}, remember={self.remember}; expected 0 seconds or more.")
        if self.arriving_bytes < 2 * self.patch_bytes:  # of which one caller has as many as it leaves free
            raise ServeError(
                f"arriving_bytes={self.arriving_bytes:,} has no room for others beside one patch of {self.patch_bytes:,}. "
                f"Expected {2 * self.patch_bytes:,} or more."
            )
        if self.queue < self.images:
            raise ServeError(f"a queue of {self.queue} never takes a request of {self.images} images; raise queue=...")
        if self.token is not None and len(self.token) < 8:
            raise ServeError("the token is shorter than 8 characters. Make one: openssl rand -hex 16")
