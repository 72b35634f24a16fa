"""Checkpoints of every form are read, others refused by name, and none ends in a raw error."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import pathlib
import pickle
import random
import struct
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelpatch.backbone.states import find_states, read_states
from modelpatch.errors import CheckpointError

STATE = {"stem.weight": torch.arange(6.0).view(2, 3), "stem.bias": torch.ones(2)}


def pickled(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# forms that are read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.safetensors", "x"])
def test_the_content_tells_what_a_file_is_not_its_name(name: str, tmp_path: Path) -> None:
    for data in (pickled(STATE), safetensors.torch.save(STATE), pickled(STATE, _use_new_zipfile_serialization=False)):
        (tmp_path / name).write_bytes(data)
        assert equal(read_states(tmp_path / name)[""], STATE)


def test_every_holder_is_found(tmp_path: Path) -> None:
    content = {
        "model": STATE,
        "ema": {"shadow": dict(STATE)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "x.pth")
    states = read_states(tmp_path / "x.pth")
    assert {"model", "ema.shadow"} <= states.keys()
    assert equal(states["ema.shadow"], STATE)


class Buffer:
    """As mmengine's history buffers are pickled."""

    def mean(self) -> None: ...


Buffer.__module__, Buffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"


@pytest.mark.parametrize(
    "harmless",
    [
        argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data"), sizes=[1, 2]),
        types.SimpleNamespace(lr=0.1),
        np.float64(0.75),
        np.int64(3),
        np.float32(0.5),
        np.bool_(True),
        np.arange(3),
        np.array(["a", "b"]),
        np.array([{"a": 1}], dtype=object),
        np.dtype("float32"),
        np.random.RandomState(0).get_state(),
        pathlib.Path("runs/best.pth"),
        pathlib.PureWindowsPath("C:/runs"),
        datetime.datetime(2024, 1, 2),
        datetime.timedelta(seconds=1),
        OrderedDict(a=1),
        Counter("aab"),
        defaultdict(list, {"a": [1]}),
        deque([1, 2], maxlen=3),
        random.Random(0).getstate(),
        {1, 2},
        frozenset({1}),
        slice(1, 2),
        range(3),
        1j,
        b"bytes",
        bytearray(b"bytes"),
        torch.float16,
        torch.device("cpu"),
        torch.Size([2, 3]),
        torch.__version__,
    ],
    ids=lambda value: f"{type(value).__module__}.{type(value).__name__}",
)
def test_harmless_objects_beside_the_tensors_are_passed_over(harmless: object, tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "extra": harmless, "nested": {"args": [harmless]}}, tmp_path / "x.pth")
    assert equal(read_states(tmp_path / "x.pth")["state_dict"], STATE)


def test_shards_and_folders_are_read(tmp_path: Path) -> None:
    names = list(STATE)
    for number, name in enumerate(names):
        safetensors.torch.save_file({name: STATE[name]}, tmp_path / f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(read_states(tmp_path / "model.safetensors.index.json")[""], STATE)
    assert equal(read_states(tmp_path)[""], STATE)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors, which is not beside it"):
        read_states(tmp_path)


def test_pickled_shards_are_read(tmp_path: Path) -> None:
    names = list(STATE)
    for number, name in enumerate(names):
        torch.save({name: STATE[name]}, tmp_path / f"{number}.bin")
    index = {"weight_map": {name: f"{number}.bin" for number, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert equal(read_states(tmp_path)[""], STATE)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": {"a": "a\0b"}}, "outside its folder"),
        ({"weight_map": {"a": 3}}, "no index of a sharded"),
        ({"weight_map": []}, "no index of a sharded"),
        ({"a": 1}, "no index of a sharded"),
        ({"weight_map": {"a": "none.safetensors"}}, "not beside it"),
        ({"weight_map": {"a": "x.safetensors"}}, "lack 1 of its 1"),
    ],
)
def test_an_index_of_anything_else_is_refused(index: Any, problem: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors")
    (tmp_path / "model.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=problem):
        read_states(tmp_path / "model.index.json")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([".metadata", "__0_0.distcp"], "distributed training in pieces.*dcp_to_torch"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"], r"DeepSpeed in pieces.*zero_to_fp32\.py"),
        ([], r"0 checkpoints \(none\)"),
        (["a.pth", "b.pth"], r"2 checkpoints \(a\.pth, b\.pth\)"),
    ],
)
def test_folders_that_hold_no_one_checkpoint_are_refused(files: list[str], problem: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=problem):
        read_states(tmp_path)


# forms that are refused ---------------------------------------------------------------------------------------------


def test_whole_modules_are_refused_by_the_name_of_their_class(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "model": nn.Sequential(nn.Linear(2, 2))}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"object of the class torch\.nn\.modules\.container\.Sequential.*state_dict"
    ):
        read_states(tmp_path / "x.pt")


class Run:
    """Runs code when it is unpickled by Python."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((print, "executed"), "print"),
        ((eval, "print('executed')"), "eval"),
        ((exec, "print('executed')"), "exec"),
        ((__import__, "os"), "__import__"),
    ],
)
def test_code_is_refused_by_name_and_never_run(
    call: tuple[Any, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        (tmp_path / "x.pth").write_bytes(pickled({"state_dict": STATE, "x": Run(*call)}, **options))
        with pytest.raises(CheckpointError, match=f"object of the class .*{named}"):
            read_states(tmp_path / "x.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_placeholder_for_getattr_reaches_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "x": Run(getattr, "", "join")}, tmp_path / "x.pth")
    assert equal(read_states(tmp_path / "x.pth")["state_dict"], STATE)


class Script(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "one byte": (lambda: b"\x80", "cannot be read"),
    "zeros": (lambda: bytes(100), "cannot be read"),
    "text": (lambda: b"garbage", "cannot be read"),
    "a web page": (lambda: b"<!DOCTYPE html><html>", "a web page; the download failed"),
    "a pointer of Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), "gzip"),
    "JSON": (lambda: b'{"a": 1}', "no index of a sharded"),
    "JSON of depth": (lambda: b'{"a":' + b"[" * 100_000, "no index of a sharded"),
    "a NumPy array": (lambda: b"\x93NUMPY" + bytes(99), "NumPy array"),
    "an archive of others": (lambda: zipped({"weights.npy": b"x"}), r"zip archive of 'weights\.npy'"),
    "TorchScript": (lambda: zipped({"x/data.pkl": b".", "x/constants.pkl": b"."}), "TorchScript program"),
    "a bomb": (lambda: zipped({"x/data.pkl": bytes(2**23)}, zipfile.ZIP_DEFLATED), "unfold to 8,388,608 bytes"),
    "another protocol": (lambda: pickled(STATE, pickle_protocol=4), "another protocol"),
    "a pickle of Python": (lambda: pickle.dumps({"a": 1}), "cannot be read"),
    "a list": (lambda: pickled([torch.zeros(2)]), "no tensors by name.*holds a list"),
    "nothing but numbers": (lambda: pickled({"epoch": 1, "args": {}}), "no tensors by name.*It holds epoch, args"),
    "an empty dictionary": (lambda: pickled({}), "no tensors by name.*It is empty"),
    "sparse tensors": (lambda: pickled({"a": torch.eye(3).to_sparse()}), "tensor a of .* is not dense"),
    "tensors without numbers": (lambda: pickled({"a": torch.zeros(2, device="meta")}), "has no numbers"),
    "a view of anything": (lambda: pickled({"a": torch.zeros(1).expand(2**40)}), "shows 1,099,511,627,776 numbers"),
    "a huge header": (lambda: struct.pack("<Q", 2**62) + b"{" + bytes(99), "cannot be read"),
    "safetensors with a hole": (lambda: safetensors.torch.save(STATE)[:-4], "cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_checkpoint_is_refused_by_what_it_is(kind: str, name: str, tmp_path: Path) -> None:
    data, problem = FILES[kind]
    (tmp_path / name).write_bytes(data())
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_states(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_paths_that_no_file_has_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(CheckpointError):
            read_states(path)


def test_a_content_that_holds_itself_is_walked_once() -> None:
    content: dict[str, Any] = {"state": STATE}
    content["self"] = content
    assert list(find_states(content)) == ["state"]
    deep: Any = STATE
    for _ in range(5000):
        deep = {"inner": deep}
    with pytest.raises(CheckpointError, match="no tensors by name"):
        find_states(deep)


# damage -------------------------------------------------------------------------------------------------------------

WHOLE = {
    "zip": pickled({"state_dict": STATE, "args": argparse.Namespace(lr=np.float64(1))}),
    "legacy": pickled({"state_dict": STATE, "epoch": 1}, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(STATE, {"format": "pt"}),
}


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(sorted(WHOLE)),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    end=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_a_damaged_file_is_read_or_refused(
    form: str, places: list[tuple[float, int]], end: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(WHOLE[form])
    for place, value in places:
        data[int(place * len(data))] = value
    file = tmp_path_factory.getbasetemp() / "damaged.pth"
    file.write_bytes(data[: round(end * len(data))])
    problem = ""
    try:
        read_states(file)
    except CheckpointError as error:
        problem = str(error)
    assert not problem or str(file) in problem
