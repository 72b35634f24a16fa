"""Damage checkpoints at random and read them: each must be read, or refused with a `CheckpointError`, within a second.

    python benchmarks/fuzz_checkpoints.py --count 100000 --state counts.json

A third are files with flipped bits, bytes that pickles and archives use, and pieces cut, doubled, moved and joined;
a third are archives, whole again, around a damaged pickle or header; a third are made anew of odd names, values and nesting.
`fuzzing.py` says how cases are numbered, continued and repeated.
"""

import argparse
import io
import pickle
import random
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import fuzzing
from modelpatch.backbone.matching import find_head, match_states
from modelpatch.backbone.states import read_states
from modelpatch.errors import CheckpointError, ModelpatchError

SHORT_LIVED = Path("/dev/shm")  # in memory
STATE = {
    "stem.weight": torch.linspace(-1, 1, 12).reshape(4, 3),
    "stem.running_var": torch.ones(4),
    "stem.num_batches_tracked": torch.tensor(3),
    "fc.weight": torch.linspace(-1, 1, 8).reshape(2, 4),
    "fc.bias": torch.zeros(2),
}
OWN = {name: tensor.shape for name, tensor in STATE.items()}
ODD: list[Any] = [
    None,
    True,
    -1,
    2**70,
    float("nan"),
    "",
    b"x",
    (),
    [],
    {},
    1 + 2j,
    np.float32(1),
    Path("a"),
    {1, 2},
    slice(3),
]
TELLING = b'\x80\x02\x85\x86\x87\x8a\x8b\x93\x94\x95cq(.}]RbsuhtQXNMKJ\x00\xff\x7f{"[PK\x01\x02\x03\x04\x05\x06'


def pickled(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def seeds() -> list[bytes]:
    """Whole files of every form."""
    script = {
        "state_dict": {f"module.{n}": t for n, t in STATE.items()},
        "args": argparse.Namespace(lr=np.float64(1)),
        "epoch": 3,
    }
    old = {"_use_new_zipfile_serialization": False}
    index = b'{"metadata": {}, "weight_map": {"stem.weight": "fuzzed.bin", "fc.weight": "fuzzed.bin"}}'
    return [
        *(pickled(content, **options) for content in (STATE, script, {"a": np.arange(4)}) for options in ({}, old)),
        pickled({"half": {n: t.half() for n, t in STATE.items()}, "ema": STATE}),
        pickled(torch.eye(3).to_sparse(), **old),
        pickled([{"model": STATE}, {"model": STATE, "optimizer": {"state": {0: {"exp_avg": STATE["fc.bias"]}}}}]),
        pickled({f"net.{n}": torch.nn.Parameter(t) for n, t in STATE.items() if t.is_floating_point()}),
        pickled(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
        pickled(STATE, pickle_protocol=4),
        pickle.dumps(script["args"]),
        safetensors.torch.save(STATE, {"format": "pt"}),
        index,
    ]


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A damaged copy, by one to four changes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(changed) + 1), chance.choice((1, 1, 2, 8, 64, len(changed)))
        kind = chance.randrange(8)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << chance.randrange(8)
        elif kind == 1 and changed:
            changed[at % len(changed)] = chance.choice(TELLING)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length][:4096]
        elif kind == 5:
            changed[at : at + length] = chance.randbytes(min(length, 64))
        elif kind == 6:
            other = chance.choice(others)
            cut = chance.randrange(len(other))
            changed[at : at + length] = other[cut : cut + min(length, 256)]
        else:
            changed[at : at + 8] = chance.choice((b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7))
    return bytes(changed)


def damage_inside(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """An archive, or a safetensors file, that is whole around a damaged pickle or header: its checks are passed."""
    if data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        header = mutate(data[8 : 8 + length], others, chance)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if not data.startswith(b"PK"):
        return mutate(data, others, chance)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            content, struck = old.read(entry), chance.random()
            if entry.filename.endswith("data.pkl") or struck < 0.1:
                content = mutate(content, [pickle.dumps(STATE["fc.bias"].tolist()), *others], chance)
            if struck < 0.95:
                new.writestr(entry.filename, content)
    return stream.getvalue()


def invent(chance: random.Random) -> bytes:
    """A file of odd names, values and nesting, saved as it should be."""
    if chance.random() < 0.2:
        tensors = {_odd_name(chance): _odd_tensor(chance).contiguous() for _ in range(chance.randint(0, 5))}
        dense = {name: tensor for name, tensor in tensors.items() if tensor.device.type == "cpu"}
        return safetensors.torch.save({name: tensor.clone() for name, tensor in dense.items()})
    return pickled(_odd_value(chance, 0), _use_new_zipfile_serialization=chance.random() < 0.7)


def _odd_name(chance: random.Random) -> str:
    prefix = chance.choice(
        ["", "", "module.", "model.", "_orig_mod.", "ema.", "backbone.", "a.b.c.", ".", "\0", "é" * 300]
    )
    return prefix + chance.choice(
        [*STATE, "fc.1.weight", "head.weight", "n_averaged", "fc.weight_orig", "", "weight", "fc"]
    )


def _odd_tensor(chance: random.Random) -> torch.Tensor:
    shape = chance.choice([(), (0,), (2,), (4,), (4, 3), (2, 4), (3, 4), (1, 4, 1, 1), (2, 4, 0)])
    kind = chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
    tensor = torch.ones(shape, dtype=kind)
    return chance.choice([tensor, tensor, tensor, tensor.T if tensor.ndim == 2 else tensor, tensor.to("meta")])


def _odd_value(chance: random.Random, depth: int) -> Any:
    if depth == 0 or (depth < 5 and chance.random() < 0.3):
        size = chance.randint(0, 6)
        kind = chance.randrange(6) if depth else 0
        if kind == 4:
            return [_odd_value(chance, depth + 1) for _ in range(size)]
        if kind == 5:
            return argparse.Namespace(a=_odd_value(chance, depth + 1))
        keys: list[Any] = [
            chance.choice([_odd_name(chance), "state_dict", "model", chance.choice(ODD)]) for _ in range(size)
        ]
        made = {key: _odd_value(chance, depth + 1) for key in keys if key.__hash__}
        prefix = chance.choice(["", "", "module.", "model.", "ema.module."])
        whole = {prefix + name: tensor for name, tensor in STATE.items() if chance.random() < 0.95}
        return OrderedDict(made) if kind == 3 else {**made, **whole} if kind < 3 else made
    return _odd_tensor(chance) if chance.random() < 0.7 else chance.choice(ODD)


def read(file: Path) -> str:
    """Read a file as `extract` does. Raises `CheckpointError`; any other error is a fault."""
    try:
        found = match_states(read_states(file), OWN, {"stem.weight"}, "fc", network="the network")
        find_head(found, "fc", 4)
    except CheckpointError:
        return "refused"
    except ModelpatchError as error:
        raise TypeError(f"a {type(error).__name__} in place of a CheckpointError: {error}") from error
    return "read"


def make(chance: random.Random, whole: list[bytes]) -> bytes:
    """The bytes of a case."""
    way = chance.randrange(3)
    if way == 2:
        return invent(chance)
    return (mutate, damage_inside)[way](chance.choice(whole), whole, chance)


def main() -> None:
    parser = fuzzing.options(__doc__, 100_000)
    parser.add_argument("--keep", type=Path, help="a folder for the files of --only")
    given = parser.parse_args()
    whole = seeds()
    with tempfile.TemporaryDirectory(dir=SHORT_LIVED if SHORT_LIVED.is_dir() else None) as folder:
        file = Path(folder) / "fuzzed.bin"

        def prepare(number: int) -> fuzzing.Case:
            chance = random.Random(number)
            file.write_bytes(make(chance, whole) if number >= 0 else whole[0])
            if given.keep is not None and given.only:
                given.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, given.keep / f"{number}.bin")
            return partial(read, file)

        fuzzing.run(prepare, given)


if __name__ == "__main__":
    main()
