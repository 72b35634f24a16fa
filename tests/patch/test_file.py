"""A patch file is read back exactly as it was written, or refused by an error that names it and what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import HOSTILE_ARGUMENTS, draft_patch
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.errors import (
    DamagedPatchError,
    HostileNameError,
    InvalidPatchError,
    NonFiniteTensorError,
    NotAPatchError,
    PatchError,
    PatchFileError,
    PatchLengthError,
    UnknownPatchVersionError,
)
from modelpatch.patch.codec import PLAIN
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.patch.file import KEY, VERSION, ZEROS, canonical
from modelpatch.tasks.record import TaskRecord


def make_smallest() -> Patch:
    """A two-class head over a convolution with two channels: a file of some 1.5 kB."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    backbone = load_backbone(module, preprocessing=Preprocessing(input_size=(3, 4, 4)))
    return draft_patch(backbone, classes=2)


PATCH = make_smallest()
DATA = encode_patch(PATCH)
TABLE_END = 8 + struct.unpack("<Q", DATA[:8])[0]


def seal(table: bytes, payload: bytes) -> bytes:
    """A file whose hash is right, whatever stands in it: what a hostile writer would make."""
    blank = struct.pack("<Q", len(table)) + table + payload
    return blank.replace(ZEROS.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """The smallest patch's tensor table without metadata, and its header with a blank hash."""
    table = json.loads(DATA[8:TABLE_END])
    return table, json.loads(table.pop("__metadata__")[KEY]) | {"sha256": ZEROS}


def forge(
    header: Callable[[dict[str, Any]], Any] = lambda header: None,
    table: Callable[[dict[str, Any]], Any] = lambda table: None,
    payload: bytes = DATA[TABLE_END:],
    text: Callable[[str], str] = lambda text: text,
    outer: Callable[[str], str] = lambda outer: outer,
) -> bytes:
    """The smallest patch edited and sealed: its header, its table, its payload, or the JSON text of either."""
    entries, described = parts()
    header(described)
    table(entries)
    written = outer(json.dumps({"__metadata__": {KEY: text(canonical(described))}, **entries}))
    return seal(written.encode(), payload)


def rename(old: str, new: str) -> bytes:
    """A sealed file with a tensor under another name."""
    return forge(
        header=lambda header: header["codecs"].update({new: header["codecs"].pop(old)}),
        table=lambda table: table.update({new: table.pop(old)}),
    )


def assert_equal(first: Patch, second: Patch) -> None:
    for name in ("backbone", "task", "preprocessing", "head", "method", "grafts", "metrics", "created"):
        assert getattr(first, name) == getattr(second, name)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[name].dtype
        assert torch.equal(tensor, second.tensors[name])
    assert first.content_hash == second.content_hash


def test_a_patch_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    patch = replace(PATCH, metrics={"top1": 0.5, "note": "ä ß"}, created={"seed": 0, "nested": {"a": [1, None]}})
    path = patch.save(tmp_path / "patch.safetensors")
    assert path.read_bytes() == encode_patch(patch)
    assert_equal(patch, Patch.load(path))
    assert_equal(patch, Patch.load(str(path)))


def test_the_same_patch_gives_the_same_bytes_and_any_reader_of_safetensors_reads_them() -> None:
    assert encode_patch(decode_patch(DATA)) == DATA
    assert decode_patch(forge()).content_hash == PATCH.content_hash
    plain = safetensors.torch.load(DATA)
    assert all(torch.equal(plain[name], tensor) for name, tensor in PATCH.tensors.items())


# damage -----------------------------------------------------------------------------------------------------


def refused(data: bytes) -> bool:
    try:
        decode_patch(data)
    except PatchFileError:
        return True
    return False


def test_every_single_flipped_bit_is_refused() -> None:
    assert len(DATA) < 4096
    damaged = bytearray(DATA)
    for at in range(len(DATA)):
        for bit in range(8):
            damaged[at] ^= 1 << bit
            assert refused(bytes(damaged)), f"bit {bit} of byte {at}"
            damaged[at] ^= 1 << bit
    assert not refused(bytes(damaged))


def test_every_shorter_length_is_refused() -> None:
    for length in range(len(DATA)):
        assert refused(DATA[:length]), f"the first {length} bytes"
    for length in (0, 7, 8, 9, TABLE_END - 1, TABLE_END, len(DATA) - 1):
        with pytest.raises(PatchLengthError if length != 8 else NotAPatchError):
            decode_patch(DATA[:length])


def test_every_zeroed_tail_is_refused() -> None:
    tails = (DATA[:length] + bytes(len(DATA) - length) for length in range(len(DATA)))
    assert all(refused(data) for data in tails if data != DATA)


@pytest.mark.parametrize("padding", [b"\0", b"\0" * 4096, b"{}", DATA])
def test_padding_is_refused(padding: bytes) -> None:
    with pytest.raises(PatchLengthError, match="padded"):
        decode_patch(DATA + padding)


def test_two_exchanged_bytes_are_refused_wherever_they_stand() -> None:
    for at in range(len(DATA) - 1):
        swapped = DATA[:at] + DATA[at + 1 : at + 2] + DATA[at : at + 1] + DATA[at + 2 :]
        assert swapped == DATA or refused(swapped)


# hostile writers --------------------------------------------------------------------------------------------

NAN = struct.pack("<f", float("nan"))
INFINITY = struct.pack("<f", float("inf"))
REST = DATA[TABLE_END + 4 :]
FIRST = '"head.bias"'
DEEP = "[" * 200_000


def set_in(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(target: dict[str, Any]) -> None:
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


HOSTILE: dict[str, tuple[bytes, type[PatchFileError]]] = {
    "an empty file": (b"", PatchLengthError),
    "text": (b"once upon a time there was a file", NotAPatchError),
    "a pickle": (b"\x80\x04\x95" + bytes(60), NotAPatchError),
    "a safetensors file without metadata": (safetensors.torch.save({"a": torch.zeros(1)}), NotAPatchError),
    "a safetensors file of somebody else": (
        safetensors.torch.save({"a": torch.zeros(1)}, {"format": "pt"}),
        NotAPatchError,
    ),
    "another metadata key beside ours": (
        seal(json.dumps({"__metadata__": {KEY: canonical(parts()[1]), "b": ""}, **parts()[0]}).encode(), REST),
        NotAPatchError,
    ),
    "a header length beyond the file": (struct.pack("<Q", 2**40) + DATA[8:], NotAPatchError),
    "a header length of 2^64 - 1": (b"\xff" * 8 + DATA[8:], NotAPatchError),
    "a table nested beyond any stack": (seal(b'{"a":' + DEEP.encode(), b""), NotAPatchError),
    "a header nested beyond any stack": (forge(text=lambda text: DEEP), NotAPatchError),
    "a header that is a list": (forge(text=lambda text: "[]"), NotAPatchError),
    "a duplicate key in the table": (
        forge(outer=lambda outer: outer.replace(FIRST, f'{FIRST}: {{"dtype": 1}}, {FIRST}')),
        NotAPatchError,
    ),
    "a duplicate key in the header": (
        forge(text=lambda text: text.replace('"version":', f'"version":{VERSION},"version":')),
        NotAPatchError,
    ),
    "a duplicate key deep in the header": (
        forge(text=lambda text: text.replace('"features":2', '"features":2,"features":2')),
        NotAPatchError,
    ),
    "a header that is not canonical": (forge(text=lambda text: text.replace(":", ": ", 1)), DamagedPatchError),
    "NaN in the header": (
        forge(text=lambda text: text.replace('"metrics":{}', '"metrics":{"top1":NaN}')),
        DamagedPatchError,
    ),
    "a number beyond floating point": (
        forge(text=lambda text: text.replace('"metrics":{}', '"metrics":{"top1":1e999}')),
        DamagedPatchError,
    ),
    "a number with a million digits": (
        forge(text=lambda text: text.replace('"metrics":{}', '"metrics":{"top1":%s}' % ("9" * 10**6))),
        NotAPatchError,
    ),
    "no hash": (forge(header=lambda header: header.pop("sha256")), DamagedPatchError),
    "a hash that is a number": (forge(header=set_in("sha256", value=7)), DamagedPatchError),
    "a hash in other words": (
        forge(outer=lambda outer: outer.replace('\\"sha256', "\\u0022sha256")),
        DamagedPatchError,
    ),
    "a hash of nothing": (forge().replace(b'sha256\\":\\"', b'sha256\\":\\"f', 1), PatchFileError),
    "no version": (forge(header=lambda header: header.pop("version")), UnknownPatchVersionError),
    "the next version": (forge(header=set_in("version", value=VERSION + 1)), UnknownPatchVersionError),
    "a version that is a truth": (forge(header=set_in("version", value=True)), UnknownPatchVersionError),
    "a version with a fraction": (forge(header=set_in("version", value=float(VERSION))), UnknownPatchVersionError),
    "a version in words": (forge(header=set_in("version", value="one")), UnknownPatchVersionError),
    "NaN in a tensor": (forge(payload=NAN + REST), NonFiniteTensorError),
    "infinity in a tensor": (forge(payload=INFINITY + REST), NonFiniteTensorError),
    "a tensor name that climbs": (rename("head.bias", "head.../../etc/passwd"), HostileNameError),
    "a tensor name of a path": (rename("head.bias", "/etc/passwd"), HostileNameError),
    "a tensor name with a control character": (rename("head.bias", "head.\x1b[31m"), HostileNameError),
    "a tensor name with a newline at its end": (rename("head.bias", "head.bias\n"), HostileNameError),
    "a tensor name that is too long": (rename("head.bias", "head." + "a" * 1000), HostileNameError),
    "a tensor name in other letters": (rename("head.bias", "head.bіas"), HostileNameError),
    "a tensor name in other digits": (rename("head.bias", "graft/٣-٤/scale"), HostileNameError),
    "a tensor name in half a character": (rename("head.bias", "head.\ud800"), HostileNameError),
    "a tensor name of nothing": (rename("head.bias", ""), HostileNameError),
    "a tensor name of no group": (rename("head.bias", "bias"), HostileNameError),
    "a class name with a control character": (
        forge(header=set_in("task", "classes", value=["ok", "\x1b]0;title\x07"])),
        HostileNameError,
    ),
    "a class name that runs right to left": (
        forge(header=set_in("task", "classes", value=["ok", "\u202egpj.exe"])),
        HostileNameError,
    ),
    "a class name in half a character": (
        forge(header=set_in("task", "classes", value=["a", "\udfff"])),
        InvalidPatchError,
    ),
    "a class name that is too long": (
        forge(header=set_in("task", "classes", value=["a", "b" * 1000])),
        InvalidPatchError,
    ),
    "a task name with a newline": (forge(header=set_in("task", "name", value="a\nb")), HostileNameError),
    "an unknown key with a control character": (forge(header=set_in("\x1b[31m", value=1)), InvalidPatchError),
    "a hash that is none": (
        forge(header=set_in("backbone", "fingerprint", "whole", value="\x1b[31mred")),
        InvalidPatchError,
    ),
    **{
        f"a constructor that is given {name} = {value}"[:80]: (
            forge(header=set_in("backbone", "arguments", value={name: value})),
            InvalidPatchError if str(value).isprintable() and name.isprintable() else HostileNameError,
        )
        for name, value in HOSTILE_ARGUMENTS
    },
    **{
        f"a backbone in {spec}": (forge(header=set_in("backbone", "spec", value=spec)), InvalidPatchError)
        for spec in (
            "file:../../x.safetensors",
            "file:/x.safetensors",
            "bundled:../x",
            "timm:local-dir:x",
            "timm:/x",
            "x",
        )
    },
    "images without pixels": (
        forge(header=set_in("preprocessing", "input_size", value=[3, 0, 0])),
        InvalidPatchError,
    ),
    "a deviation of zero": (forge(header=set_in("preprocessing", "std", value=[0, 1, 1])), InvalidPatchError),
    "a head of impossible width": (forge(header=set_in("head", "features", value=10**19)), InvalidPatchError),
    "a strength that is a truth": (forge(header=set_in("strength", value=True)), InvalidPatchError),
    "a head whose width is text": (forge(header=set_in("head", "features", value="2")), InvalidPatchError),
    "two classes of one name": (forge(header=set_in("task", "classes", value=["a", "a"])), InvalidPatchError),
    "no classes": (forge(header=set_in("task", "classes", value=[])), InvalidPatchError),
    "more classes than outputs": (forge(header=set_in("task", "classes", value=["a", "b", "c"])), InvalidPatchError),
    "an unknown head": (forge(header=set_in("head", "kind", value="nonsense")), InvalidPatchError),
    "codecs of other tensors": (forge(header=set_in("codecs", value={})), InvalidPatchError),
    "codecs of another type": (forge(header=set_in("codecs", "head.bias", value="float16")), InvalidPatchError),
    "an empty span": (
        forge(header=set_in("grafts", value=[{"kind": "x", "start": 2, "end": 2, "arguments": {}}])),
        InvalidPatchError,
    ),
    "tensors that overlap": (
        forge(table=set_in("head.weight", "data_offsets", value=[4, 20])),
        InvalidPatchError,
    ),
    "tensors that leave a gap": (
        forge(table=set_in("head.weight", "data_offsets", value=[12, 28]), payload=DATA[TABLE_END:] + bytes(4)),
        InvalidPatchError,
    ),
    "a tensor beyond the payload": (
        forge(table=set_in("head.weight", value={"dtype": "F32", "shape": [2**40], "data_offsets": [8, 8 + 2**42]})),
        PatchLengthError,
    ),
    "a shape that is not its length": (forge(table=set_in("head.weight", "shape", value=[3, 2])), InvalidPatchError),
    "a negative side": (forge(table=set_in("head.weight", "shape", value=[-2, -2])), InvalidPatchError),
    "a side with a fraction": (forge(table=set_in("head.weight", "shape", value=[2.0, 2.0])), InvalidPatchError),
    **{
        f"an empty tensor with the sides {sides}": (
            forge(table=set_in("head.zero", value={"dtype": "F32", "shape": [0, *sides], "data_offsets": [0, 0]})),
            InvalidPatchError,
        )
        for sides in ((2**70,), (2**63,), (2**31, 2**32), (-1,), (True,))
    },
    "a side of half of all numbers": (forge(table=set_in("head.weight", "shape", value=[2**63])), InvalidPatchError),
    "offsets with a fraction": (
        forge(table=set_in("head.weight", "data_offsets", value=[8.0, 24.0])),
        InvalidPatchError,
    ),
    "offsets that are truths": (
        forge(table=set_in("head.zero", value={"dtype": "F32", "shape": [0], "data_offsets": [False, False]})),
        InvalidPatchError,
    ),
    "an unknown dtype": (forge(table=set_in("head.weight", "dtype", value="F64")), InvalidPatchError),
    "a dtype that is a list": (forge(table=set_in("head.weight", "dtype", value=["F32"])), InvalidPatchError),
    "an entry that is a number": (forge(table=set_in("head.weight", value=7)), InvalidPatchError),
    "an entry with one key more": (forge(table=set_in("head.weight", "extra", value=1)), InvalidPatchError),
    "a shape that is an object": (
        forge(
            table=set_in("head.scalar", value={"dtype": "F32", "shape": {}, "data_offsets": [24, 28]}),
            payload=DATA[TABLE_END:] + bytes(4),
        ),
        InvalidPatchError,
    ),
}


@pytest.mark.parametrize(("data", "error"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_with_a_right_hash_and_wrong_contents_is_refused_by_name(
    data: bytes, error: type[PatchFileError], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        Patch.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1000


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(NotAPatchError, match=path.name):
            Patch.load(path)


@pytest.mark.parametrize("path", ["", "a\0b", "a" * 5000, 3, None])
def test_what_can_be_no_path_is_refused(path: Any) -> None:
    with pytest.raises(NotAPatchError):
        Patch.load(path)


@pytest.mark.parametrize("shape", [[-1, 0], [0, -1], [2**63, 0], [2**32, 2**31, 0], [2**63], [-2, -1], [True, 2]])
def test_a_shape_that_no_tensor_has_is_refused_before_anything_is_read(
    shape: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("nothing may be read"))
    size = 4 * math.prod(shape) % 2**10  # the length that the shape has, where a file can have it
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [24, 24 + size]}
    data = forge(table=set_in("head.other", value=entry), payload=DATA[TABLE_END:] + bytes(size))
    with pytest.raises(InvalidPatchError, match="malformed"):
        decode_patch(data)


def test_a_malformed_table_is_damage_unless_it_was_written_so() -> None:
    forged = forge(table=set_in("head.weight", "dtype", value="F64"))
    with pytest.raises(InvalidPatchError, match=r"head\.weight.*malformed"):
        decode_patch(forged)
    with pytest.raises(DamagedPatchError, match="SHA-256"):
        decode_patch(DATA.replace(b'"F32"', b'"F64"', 1))


# writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"head.bias": torch.tensor([float("nan")])}, NonFiniteTensorError),
        ({"head.bias": torch.tensor([float("-inf")])}, NonFiniteTensorError),
        ({"../bias": torch.zeros(1)}, HostileNameError),
    ],
)
def test_what_no_reader_would_accept_is_not_written(
    tensors: dict[str, Tensor], error: type[PatchFileError], tmp_path: Path
) -> None:
    with pytest.raises(error):
        replace(PATCH, tensors=tensors).save(tmp_path / "patch.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(PatchError, match="JSON"):
        encode_patch(PATCH.with_metrics(top1=object()))


def test_a_header_nested_to_any_depth_is_read_or_refused() -> None:
    for depth in (10, 300, 700, *range(800, 1100, 7), 10_000):
        nested = '"metrics":{"a":' + "[" * depth + "]" * depth + "}"
        data = forge(text=lambda text, nested=nested: text.replace('"metrics":{}', nested))
        assert (depth > 700 and refused(data)) or decode_patch(data).metrics["a"]  # earlier versions wrote such
        assert refused(forge(text=lambda text, depth=depth: text.replace("[]", "[" * depth + "]" * depth)))


def test_a_table_that_only_safetensors_refuses_is_named_as_such() -> None:
    data = forge(outer=lambda outer: outer.replace('"data_offsets": [0,', '"data_offsets": [-0,'))
    with pytest.raises(InvalidPatchError, match="safetensors does not read its table of tensors"):
        decode_patch(data)


def test_what_is_no_path_is_refused_as_that() -> None:
    with pytest.raises(NotAPatchError, match="3 is no path"):
        Patch.load(3)  # type: ignore[arg-type]


def test_metrics_that_imitate_the_hash_do_not_confuse_the_reader() -> None:
    patch = PATCH.with_metrics(sha256=ZEROS, text='"sha256":"' + ZEROS, escaped='\\"sha256\\":\\"' + ZEROS)
    assert decode_patch(encode_patch(patch)).metrics == patch.metrics


# properties -------------------------------------------------------------------------------------------------

PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)
PREFIXES = ("head.", "replace/", "mask/", "delta/", "left/", "right/", "graft/0-1/", "graft/12345-99999/")
PATHS = st.from_regex(r"[A-Za-z0-9_]{1,8}(\.[A-Za-z0-9_]{1,8}){0,3}", fullmatch=True)
NAMES = st.builds(str.__add__, st.sampled_from(PREFIXES), PATHS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return torch.randn(shape, generator=generator).to(PLAIN[draw(st.sampled_from(sorted(PLAIN)))])


@settings(deadline=None, max_examples=60)
@given(
    tensors=st.dictionaries(NAMES, tensors(), max_size=4),
    names=st.tuples(PRINTABLE, PRINTABLE, PRINTABLE).filter(lambda names: names[1] != names[2]),
    facts=st.dictionaries(
        PRINTABLE,
        st.integers() | PRINTABLE | st.floats(allow_nan=False, allow_infinity=False),
        max_size=3,
    ),
)
def test_any_patch_is_read_back_equal(
    tensors: dict[str, Tensor], names: tuple[str, str, str], facts: dict[str, object]
) -> None:
    head = {name: tensor for name, tensor in PATCH.tensors.items() if name.startswith("head.")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")} | head
    patch = replace(
        PATCH, tensors=tensors, task=TaskRecord(name=names[0], classes=names[1:]), metrics=facts, created=facts
    )
    assert_equal(patch, decode_patch(encode_patch(patch)))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: struct.pack("<Q", len(tail)) + b"{" + tail))
def test_arbitrary_bytes_raise_nothing_but_a_patch_file_error(data: bytes) -> None:
    assert refused(data)


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from(sorted(parts()[1])), value=JSON)
def test_arbitrary_values_in_a_sealed_header_raise_nothing_but_a_patch_file_error(key: str, value: object) -> None:
    try:
        data = forge(
            text=lambda text: json.dumps(json.loads(text) | {key: value}, sort_keys=True, separators=(",", ":"))
        )
        decode_patch(data)
    except PatchFileError:
        pass


@settings(deadline=None, max_examples=200)
@given(
    name=st.sampled_from(["head.bias", "head.weight", "head.other"]) | NAMES,
    entry=JSON
    | st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F16", "BF16", "U8"]) | JSON, "shape": JSON, "data_offsets": JSON}
    ),
)
def test_arbitrary_entries_in_a_sealed_table_raise_nothing_but_a_patch_file_error(name: str, entry: object) -> None:
    with contextlib.suppress(PatchFileError):
        decode_patch(forge(table=set_in(name, value=entry)))


@pytest.mark.parametrize("facts", [{"top1": float("nan")}, {"note": "\x1b[2J"}, {"path": {1, 2}}])
def test_facts_that_no_reader_would_accept_are_not_written(facts: dict[str, object]) -> None:
    with pytest.raises(PatchError, match="cannot be written"):
        encode_patch(replace(PATCH, metrics=facts))


def test_a_head_whose_tensors_have_other_shapes_than_it_says_is_refused() -> None:
    wide = {**PATCH.tensors, "head.bias": torch.zeros(7)}
    with pytest.raises(InvalidPatchError, match="head"):
        decode_patch(encode_patch(replace(PATCH, tensors=wide)))
