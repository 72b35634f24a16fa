"""The tenants of a server: who may ask for how much, by keys whose hashes a file holds.

    [alice]
    sha256 = "2bd806c9..."    # printf %s "$KEY" | sha256sum
    weight = 2                # of the work, where others wait too; 1 by default
    requests = 32             # at once; by default `--per-client`
    gmacs = 50                # billions of multiply-adds a second in the mean; by default no limit

    [strangers]               # all without a key together, and among them all addresses alike
    weight = 0.5
    admitted = true           # false: a key is needed

Without a file every address is a tenant of its own.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Self

from modelpatch.errors import ServeError
from modelpatch.plain_files import read_plain

STRANGERS, ADMIN = "strangers", "admin"
LEAST, MOST = 0.01, 100.0  # weights: fairness between these costs little
DIGEST = re.compile("[0-9a-f]{64}")
NAME = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}")  # no address looks so


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A share of a server, and limits on what it takes of it."""

    name: str
    weight: float = 1.0
    requests: int | None = None
    gmacs: float | None = None


@dataclass(frozen=True)
class Caller:
    """The sender of a request: the name of a key, or an address, and the tenant on whose account it asks."""

    name: str
    tenant: Tenant

    @classmethod
    def alone(cls, name: str) -> Self:
        """A caller who is a tenant of its own."""
        return cls(name, Tenant(name=name))


def address_of(host: str) -> str:
    """The address that counts as one caller: of IPv6 the network of 64 bits, which one machine may have whole."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ip_network((int(address), 64), strict=False))


@dataclass(frozen=True)
class Tenants:
    """The tenants of a file, by the hashes of their keys. `strangers` is None where a key is needed."""

    keys: Mapping[str, Tenant]
    strangers: Tenant | None

    @classmethod
    def read(cls, file: Path) -> Self:
        """The tenants of a TOML file. Raises `ServeError`."""
        try:
            rows = tomllib.loads(read_plain(file).decode())
        except OSError as error:
            raise ServeError(f"{file} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ServeError(f"{file} is no TOML: {error}.") from error
        keys: dict[str, Tenant] = {}
        strangers: Tenant | None = Tenant(name=STRANGERS)
        for name, row in rows.items():
            said = f"{file}: [{name}]"
            if not isinstance(row, dict):
                raise ServeError(f"{file}: {name} = {row!r} stands outside of a table; expected [{name}].")
            if not NAME.fullmatch(name):
                raise ServeError(f"{said} is no name; expected letters, digits, - and _, at most 64, a letter first.")
            if name == ADMIN:
                raise ServeError(f"{said} is who has the server's token. Choose another name.")
            row = dict(row)
            if name == STRANGERS:
                admitted = row.pop("admitted", True)
                if not isinstance(admitted, bool):
                    raise ServeError(f"{said} admitted = {admitted!r}; expected true or false.")
                tenant = _tenant(said, name, row)
                strangers = tenant if admitted else None
                continue
            digest = row.pop("sha256", None)
            if not isinstance(digest, str) or not DIGEST.fullmatch(digest := digest.lower()):
                said = f"{said} sha256 = {digest!r}; expected the 64 hexadecimal digits of the key's hash."
                raise ServeError(said, 'Make them: printf %s "$KEY" | sha256sum')
            if digest in keys:
                raise ServeError(f"{said} has the key of [{keys[digest].name}]; expected one key a tenant.")
            keys[digest] = _tenant(said, name, row)
        return cls(keys, strangers)

    def find(self, key: str) -> Tenant | None:
        """The tenant with a key, None where nobody has it."""
        return self.keys.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest())


def _tenant(said: str, name: str, row: Mapping[str, Any]) -> Tenant:
    known = [field.name for field in fields(Tenant)][1:]
    if other := set(row) - set(known):
        raise ServeError(f"{said} has {sorted(other)[0]!r}; expected {', '.join(known)}.")
    for key, value in row.items():
        least, most = {"weight": (LEAST, MOST), "requests": (1, 10**6)}.get(key, (1e-6, 1e12))
        whole = key == "requests"
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not least <= value <= most:
            kind = "whole number" if whole else "number"
            raise ServeError(f"{said} {key} = {value!r}; expected a {kind} from {least:g} to {most:g}.")
    return Tenant(name=name, **row)
