"""Names, references and records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import draft_patch, make_tiny
from modelpatch.errors import DamagedPatchError, InvalidReferenceError
from modelpatch.patch.contents import encode_patch
from modelpatch.store.version import NAME, Version, check_name, check_tag, parse_reference

PATCH = replace(
    draft_patch(make_tiny()),
    metrics={
        "top1": 0.5,
        "images": 12,
        "seen": True,
        "per_class": {"a": 1.0},
        "note": "x",
        "huge": 10**400,
        "k" * 300: 1,
    },
)
DATA = encode_patch(PATCH)
VERSION = Version.of("flowers", DATA, PATCH)
NO_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "-x",
    "a/b",
    "../a",
    "a\\b",
    "a b",
    "a\n",
    "a\x00",
    "A",
    "ä",
    "ﬂowers",
    "а",  # the Cyrillic letter
    "a" * 65,
    "a@b",
    "\u202ea",
    "٣",
    "a%2fb",
    "c:",
]


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "flowers-2", "a..b", "z" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == check_tag(name) == name


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidReferenceError, match=r"no name of a patch. Expected 1 to 64"):
        check_name(name)
    with pytest.raises(InvalidReferenceError, match="no name of a tag"):
        check_tag(name)
    with pytest.raises(InvalidReferenceError):
        parse_reference(f"{name}@latest")


@given(st.text())
def test_no_text_but_a_name_is_taken_for_one(text: str) -> None:
    plain = all(character in "abcdefghijklmnopqrstuvwxyz0123456789._-" for character in text)
    fitting = plain and 1 <= len(text) <= 64 and text[0] not in "._-"
    assert bool(NAME.fullmatch(text)) == fitting


def test_a_tag_does_not_read_as_a_whole_hash() -> None:
    with pytest.raises(InvalidReferenceError, match="read as a hash"):
        check_tag("0" * 64)
    assert check_tag("20260101") == "20260101"  # a date is no hash


def test_references() -> None:
    assert parse_reference("flowers") == ("flowers", "latest")
    assert parse_reference("flowers@prod") == ("flowers", "prod")
    assert parse_reference(VERSION.reference) == ("flowers", VERSION.hash)
    for wrong in ("flowers@", "@prod", "a@b@c", "flowers@../x"):
        with pytest.raises(InvalidReferenceError):
            parse_reference(wrong)


def test_a_version_says_what_the_patch_says() -> None:
    assert VERSION.nbytes == len(DATA)
    assert (VERSION.method, VERSION.task) == (PATCH.method.name, PATCH.task.name)
    assert (VERSION.backbone, VERSION.chain) == (PATCH.backbone.spec, PATCH.backbone.fingerprint.chain)
    assert VERSION.metrics == {"top1": 0.5, "images": 12.0}  # finite figures only, and no longer names than files allow
    assert VERSION.created.endswith("+00:00")
    assert {VERSION: 1}[replace(VERSION)] == 1
    assert str(VERSION) == f"flowers@{VERSION.hash[:12]}"


def test_a_record_is_read_back() -> None:
    assert Version.read(VERSION.record(), "flowers", VERSION.hash) == VERSION


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": "many"},
        {"hash": "x"},
        {"task": "a\x1b[31m"},
        {"task": "a\u202eb"},
        {"metrics": {"top1": "high"}},
        {"metrics": {"a\nb": 1}},
        {"name": "../x"},
        {"created": None},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(change: dict[str, object]) -> None:
    record = json.dumps(json.loads(VERSION.record()) | change).encode()
    with pytest.raises(DamagedPatchError, match=f"record of flowers@{VERSION.hash[:12]} is damaged"):
        Version.read(record, "flowers", VERSION.hash)


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(DamagedPatchError, match="is that of flowers@"):
        Version.read(VERSION.record(), "birds", VERSION.hash)
    with pytest.raises(DamagedPatchError):
        Version.read(VERSION.record()[:-1], "flowers", VERSION.hash)
