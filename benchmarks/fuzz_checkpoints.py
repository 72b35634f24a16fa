"""Damage checkpoints at random and read them: each must be read, or refused with a `CheckpointError`, within a second.

    python benchmarks/fuzz_checkpoints.py --count 100000

Bits are flipped, bytes replaced by ones that pickles and archives use, pieces cut, doubled, moved and joined across files.
"""

import argparse
import io
import pickle
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from modelpatch.backbone.matching import find_head, match_states
from modelpatch.backbone.states import read_states
from modelpatch.errors import CheckpointError

MOST = 4 * 2**30  # bytes of memory: a size that a damaged file states is not to be believed
STATE = {
    "stem.weight": torch.randn(4, 3),
    "stem.running_var": torch.ones(4),
    "stem.num_batches_tracked": torch.tensor(3),
    "fc.weight": torch.randn(2, 4),
    "fc.bias": torch.zeros(2),
}
OWN = {name: tensor.shape for name, tensor in STATE.items()}
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


def read(file: Path) -> str:
    """What became of a file: `read`, `refused`, or the name of another error."""
    try:
        found = match_states(read_states(file), OWN, {"stem.weight"}, "fc", network="the network")
        find_head(found, "fc", 4)
    except CheckpointError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for files that ended in another error")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    torch.manual_seed(given.seed)
    chance, whole, results, slowest = random.Random(given.seed), seeds(), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fuzzed.bin"
        for number in range(given.count):
            data = mutate(chance.choice(whole), whole, chance)
            file.write_bytes(data)
            began = time.perf_counter()
            result = read(file)
            slowest = max(slowest, time.perf_counter() - began)
            results[result] += 1
            if result not in ("read", "refused") and given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{number}.bin").write_bytes(data)
    for result, count in results.most_common():
        print(f"{count:>8,}  {result}")
    print(f"the slowest took {slowest:.2f} s")
    if results.keys() - {"read", "refused"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
