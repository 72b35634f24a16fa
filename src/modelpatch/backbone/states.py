"""Every state dict of a checkpoint, whatever its file is: safetensors, pickled, in shards, a folder, nested holders.

read_states("run/last.ckpt")  ->  {"state_dict": {...}, "callbacks.EMA.ema_state_dict": {...}}
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modelpatch.backbone.pickled import load_pickled
from modelpatch.errors import CheckpointError
from modelpatch.plain_files import read_plain
from modelpatch.text import first_line

State = dict[str, Tensor]
MAX_INDEX = 64 * 2**20  # bytes
MAX_DEPTH = 8  # of holders
MAX_STATES = 10_000
SMALL = 2**24  # numbers that a view may show more of than its storage holds
CANDIDATES = (  # of a folder, in the order in which they are preferred
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FOREIGN: dict[bytes, str] = {  # how files of others begin
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: git lfs pull",
    b"<": "a web page; the download failed",
    b"\x93NUMPY": "a NumPy array",
    b"\x08": "an ONNX graph or another protocol buffer",
}
PICKLED = (b"PK", b"\x80")  # how files of torch.save begin
EXPECTED = "Expected a safetensors file or a file of torch.save, best of the network's state_dict()."


def read_states(path: str | Path) -> dict[str, State]:
    """Every mapping of names to tensors in a checkpoint, by its place: the keys that lead to it, joined by dots, or "".

    `path` is a safetensors file, a file of torch.save, the index of a sharded one, or a folder that holds one of them. Raises
    `CheckpointError` for what cannot be read, holds no tensors by name, or objects of unknown classes.
    """
    path = Path(path)
    try:
        content = _read(path)
    except OSError as error:
        raise CheckpointError(f"{str(path)[:300]} cannot be read: {error.strerror or error}.") from error
    return find_states(content, str(path))


def find_states(content: Any, source: str = "the checkpoint") -> dict[str, State]:
    """The state dicts inside what was loaded. Raises `CheckpointError` if there is none, or tensors that hold no numbers."""
    found: dict[str, State] = {}
    for place, mapping in _walk(content):
        state = {str(name): value.detach() for name, value in mapping.items() if isinstance(value, Tensor)}
        for name, tensor in state.items():
            _check_tensor(tensor, f"{place}.{name}" if place else name, source)
        if state:
            found[place] = state
    if not found:
        raise CheckpointError(
            f"{source} holds no tensors by name. Expected a state_dict(). {_describe(content)}".strip()
        )
    return found


def _walk(content: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Mappings with their places, each once, the outer before the inner."""
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    seen: set[int] = set()
    while waiting and len(seen) < MAX_STATES:
        place, value, depth = waiting.pop(0)
        if id(value) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            yield place, value
            items: Any = value.items()
        elif isinstance(value, list | tuple) and depth:
            items = enumerate(value)
        else:
            continue
        waiting += [
            (f"{place}.{key}" if place else str(key), item, depth + 1)
            for key, item in items
            if isinstance(item, Mapping | list | tuple)
        ]


def _describe(content: Any) -> str:
    """The type or the first keys of a content, in a sentence."""
    if not isinstance(content, Mapping):
        return f"It holds a {type(content).__name__}."
    keys = ", ".join(str(key)[:40] for key in list(content)[:5])
    return f"It holds {keys}." if keys else "It is empty."


def _check_tensor(tensor: Tensor, name: str, source: str) -> None:
    problem = ""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        problem = f"is {'quantized' if tensor.is_quantized else 'not dense'}"
    elif tensor.device.type != "cpu":
        problem = f"has no numbers (it lies on {tensor.device})"
    elif tensor.numel() > SMALL and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = f"shows {tensor.numel():,} numbers of a storage of {tensor.untyped_storage().nbytes():,} bytes"
    if problem:
        raise CheckpointError(f"the tensor {name[:200]} of {source} {problem}. Save the network's plain state_dict().")


# files ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    if path.is_dir():
        return _read(_file_in(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Expected a safetensors file or a .pth of tensors.")
    try:
        start = read_plain(path, 512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not start:
        raise CheckpointError(f"{path} cannot be read as plain tensors: it is empty. Fetch or save it again.")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length < path.stat().st_size:
        return read_safetensors(path)
    if start.lstrip()[:1] == b"{":
        return _read_shards(path)
    if start[257:262] == b"ustar":
        problem = "a tar archive, as torch wrote it before 2017, or of other files"
    else:
        problem = next((what for magic, what in FOREIGN.items() if start.startswith(magic)), "")
    if problem:
        raise CheckpointError(f"{path} cannot be read as plain tensors: it is {problem}. {EXPECTED}")
    if path.suffix == ".safetensors" and not start.startswith(PICKLED):
        return read_safetensors(path)
    return load_pickled(path)


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file. Raises `CheckpointError`."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # its reader raises its own errors, Python's and torch's
        reason = f"{first_line(error)[:200]}"
        raise CheckpointError(f"{path} cannot be read as plain tensors: {reason}. Fetch or save it again.") from error


def _file_in(folder: Path) -> Path:
    """The checkpoint of a folder. Raises `CheckpointError` for none, several, and those of sharded training."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for name in CANDIDATES:
        if name in names:
            return folder / name
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{folder} is a checkpoint of distributed training in pieces. Join them first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE."
        )
    if "zero_to_fp32.py" in names or any("zero_pp_rank" in name for name in names):
        raise CheckpointError(
            f"{folder} is a checkpoint of DeepSpeed in pieces. Join them first: python {folder}/zero_to_fp32.py {folder} FILE."
        )
    found = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt"))]
    if len(found) != 1:
        listed = ", ".join(found[:5]) or "none"
        raise CheckpointError(f"{folder} is a folder with {len(found)} checkpoints ({listed}). Name the file.")
    return folder / found[0]


def _read_shards(path: Path) -> State:
    """The tensors of all files that an index names, which lie beside it."""
    problem, index = "", None
    try:
        if path.stat().st_size <= MAX_INDEX:
            index = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f" ({first_line(error)[:100]})"
    if not isinstance(index, dict) or not all(isinstance(name, str) for pair in index.items() for name in pair):
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: it is JSON, but no index of a sharded checkpoint{problem}. Expected a "
            "`weight_map` from names of tensors to files."
        )
    files = sorted(set(index.values()))
    if outside := [name for name in files if Path(name).name != name or "\0" in name or name in ("", ".", "..")]:
        raise CheckpointError(
            f"{path} names a shard outside its folder: {outside[0][:80]!r}. Expected plain names of files."
        )
    state: State = {}
    for name in files:
        shard = path.with_name(name)
        if not shard.is_file():
            raise CheckpointError(f"{path} names the shard {name[:80]}, which is not beside it. Fetch it too.")
        part = read_safetensors(shard) if shard.suffix == ".safetensors" else load_pickled(shard)
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{shard} holds no tensors by name. Expected a shard of {path.name}.")
        state |= {str(key): value for key, value in part.items()}
    if missing := sorted(index.keys() - state.keys()):
        raise CheckpointError(
            f"the shards of {path} lack {len(missing)} of its {len(index)} tensors: {missing[0][:100]}."
        )
    return state
