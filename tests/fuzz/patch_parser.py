"""The reader of patch files under inputs that nobody meant: coverage-guided with atheris, or by mutations alone.

    python tests/fuzz/patch_parser.py FOUND tests/fuzz/corpus -runs=1000000 -timeout=1 -rss_limit_mb=2048

An input is tried as it is, and as the parts of a file: table, header and payload, between lines of dashes. A file is made of
the parts with the right length, the canonical header and the right hash, as a hostile writer would make it: otherwise nearly
every input would end at the hash. `FOUND` is a folder for the inputs that reach new code.

Whatever the bytes are, the reader gives a patch or raises a `PatchFileError`; a patch that it gives can be written, and is
then read as the same patch. Any other error is a crash; more than a second for one input, or more memory than the limit, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["modelpatch.patch", "modelpatch.text"]):
        import modelpatch.patch.file  # noqa: F401

from modelpatch.errors import PatchFileError
from modelpatch.patch.contents import decode_patch, encode_patch
from modelpatch.patch.file import KEY, ZEROS, canonical

CORPUS = Path(__file__).with_name("corpus")
LINE = b"\n-----\n"
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    -0.0,
    "",
    "float32",
    "int8",
    "bits:3x3",
    "trits:999999999x2",
    "entropy-bits:8",
    "sparse:4",
    "signs:2x2",
    "head.weight",
    "masks",
    "\u202e",
    "\x00",
    "a" * 300,
    [],
    {},
    [0, 0],
    [[]],
]


def try_input(data: bytes) -> int:
    """Read an input in both ways. Returns how many of them gave a patch."""
    return sum(read_twice(candidate) for candidate in (data, assemble(data)) if candidate is not None)


def read_twice(data: bytes) -> bool:
    """Whether the bytes are a patch; then it is the same patch when it is written and read again."""
    try:
        patch = decode_patch(data, "the input")
    except PatchFileError:
        return False
    again = decode_patch(encode_patch(patch), "the input written again")
    assert again.content_hash == patch.content_hash, "written again, the patch is another"
    assert again.task == patch.task
    return True


def split(data: bytes) -> bytes:
    """The parts of a patch file, as one input."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8:end])
    header = table.pop("__metadata__")[KEY]
    return LINE.join([canonical(table).encode(), header.encode(), data[end:]])


def assemble(data: bytes) -> bytes | None:
    """The file that the parts of an input make, with the right length and hash; None for an input without parts."""
    parts = data.split(LINE, 2)
    if len(parts) < 3:
        return None
    table, header, payload = parts
    text = header.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        described = json.loads(text)
        if isinstance(described, dict):
            text = canonical(described | {"sha256": ZEROS})
    metadata = f'"__metadata__":{{"{KEY}":{json.dumps(text)}}}'.encode()
    inner = table.strip()[1:]
    outer = b"{" + metadata + (b"," if inner.strip() != b"}" else b"") + inner
    blank = bytearray(struct.pack("<Q", len(outer)) + outer + payload)
    at = blank.rfind(b'\\"sha256\\":\\"' + ZEROS.encode(), 0, 8 + len(outer))
    if at >= 0:
        start = at + len(b'\\"sha256\\":\\"')
        blank[start : start + 64] = hashlib.sha256(blank).hexdigest().encode()
    return bytes(blank)


# mutations --------------------------------------------------------------------------------------------------


def mutate(data: bytes, chance: random.Random) -> bytes:
    """An input that differs from `data` in a value of its JSON, or in some bytes."""
    parts = data.split(LINE, 2)
    for _ in range(chance.randint(1, 3)):
        which = chance.randrange(len(parts))
        if which < 2 and len(parts) == 3 and chance.random() < 0.8:
            parts[which] = _mutate_json(parts[which], chance)
        else:
            parts[which] = _mutate_bytes(parts[which], chance)
    return LINE.join(parts)


def _mutate_json(text: bytes, chance: random.Random) -> bytes:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _mutate_bytes(text, chance)
    places = list(_places(value))
    if not places:
        return _mutate_bytes(text, chance)
    holder, key = chance.choice(places)
    other_holder, other_key = chance.choice(places)
    action = chance.randrange(5)
    if action == 0:
        holder[key] = chance.choice(VALUES)
    elif action == 1 and isinstance(holder[key], int | float):
        holder[key] += chance.choice([-1, 1, 8, -8, 2**20])
    elif action == 2 and isinstance(holder, dict):
        holder[f"{key}{chance.choice(['', 'x', '/', '.a', '0'])}"] = holder.pop(key)
    elif action == 3:
        del holder[key]
    else:
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    at = chance.randint(0, len(changed))
    action = chance.randrange(4)
    if action == 0 and changed:
        changed[at % len(changed)] ^= 1 << chance.randrange(8)
    elif action == 1:
        del changed[at : at + chance.choice([1, 2, 4, 64])]
    elif action == 2:
        changed[at:at] = chance.randbytes(chance.choice([1, 2, 4, 64]))
    else:
        changed[at : at + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f"])
    return bytes(changed)


if __name__ == "__main__":

    def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        changed = mutate(data, chance) if chance.random() < 0.5 else atheris.Mutate(data, max_size)
        return changed[:max_size]

    atheris.Setup(sys.argv, lambda data: try_input(data) and None, custom_mutator=custom_mutator)
    atheris.Fuzz()
