"""Tenants: files that are read or refused by name, keys and addresses that are recognised, limits on a running server."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from modelpatch.errors import ServeError
from modelpatch.serve.tenants import Tenant, Tenants, address_of

KEY = "alice-has-this-key"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


def write(folder: Path, text: str) -> Path:
    file = folder / "tenants.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_names_tenants_by_the_hashes_of_their_keys(tmp_path: Path) -> None:
    text = f'[alice]\nsha256 = "{DIGEST.upper()}"\nweight = 2\nrequests = 3\ngmacs = 0.5\n[strangers]\nweight = 0.5\n'
    tenants = Tenants.read(write(tmp_path, text))
    assert tenants.find(KEY) == Tenant(name="alice", weight=2, requests=3, gmacs=0.5)
    assert tenants.find(KEY + "x") is None
    assert tenants.find("\udc80") is None
    assert tenants.strangers == Tenant(name="strangers", weight=0.5)
    assert Tenants.read(write(tmp_path, "[strangers]\nadmitted = false\n")).strangers is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[alice", "is no TOML"),
        ("weight = 2\n", "outside of a table"),
        ("[alice]\n", "sha256 = None"),
        (f'[alice]\nsha256 = "{KEY}"\n', "sha256sum"),
        (f'[a]\nsha256 = "{DIGEST}"\n[b]\nsha256 = "{DIGEST}"\n', r"\[b\] has the key of \[a\]"),
        (f'["10.0.0.1"]\nsha256 = "{DIGEST}"\n', "is no name"),
        (f'[admin]\nsha256 = "{DIGEST}"\n', "server's token"),
        (f'[a]\nsha256 = "{DIGEST}"\nwieght = 1\n', "'wieght'"),
        (f'[a]\nsha256 = "{DIGEST}"\nname = "b"\n', "'name'"),
        (f'[a]\nsha256 = "{DIGEST}"\nweight = 0\n', "weight = 0; expected"),
        (f'[a]\nsha256 = "{DIGEST}"\nweight = nan\n', "weight = nan; expected"),
        (f'[a]\nsha256 = "{DIGEST}"\nweight = true\n', "weight = True; expected"),
        (f'[a]\nsha256 = "{DIGEST}"\nrequests = 1.5\n', "requests = 1.5; expected a whole number"),
        (f'[a]\nsha256 = "{DIGEST}"\ngmacs = "9"\n', "gmacs = '9'; expected a number"),
        ('[strangers]\nadmitted = "no"\n', "expected true or false"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ServeError, match=said) as caught:
        Tenants.read(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="cannot be read"):
        Tenants.read(tmp_path / "none.toml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ServeError, match="no TOML"):
        Tenants.read(tmp_path / "bytes")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::2", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_an_address_counts_as_one_caller(host: str, address: str) -> None:
    assert address_of(host) == address
