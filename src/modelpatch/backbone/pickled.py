"""Pickled checkpoints, read by torch's `weights_only` reader: tensors and plain values, never code.

Checkpoints of training scripts hold more than tensors: options, the best accuracy as a NumPy scalar, paths, histories. Objects
of the harmless classes listed here are read as placeholders that hold nothing; any other class is refused by its name.
"""

import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch

from modelpatch.errors import CheckpointError

GLOBAL = re.compile(r"GLOBAL (\S+)")
INFLATED = 2**20  # bytes that a file's entries may have beyond the file itself
LOCK = threading.Lock()  # torch keeps what is allowed for the whole process


class Placeholder:
    """An object of a harmless class, of which nothing is kept."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class Items(list[Any]):
    """A list of a harmless class, whose items may hold tensors."""

    def __init__(self, items: Any = (), *_: Any) -> None:
        super().__init__(items if isinstance(items, list | tuple) else ())

    def __setstate__(self, state: Any) -> None: ...


class Keys:
    """A dictionary of a harmless class, whose values may hold tensors: read as an `OrderedDict`."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def _spelled(text: str) -> list[str]:
    """Full names from lines of `module: names`, where `(a|b)` stands for either."""
    found = []
    for line in text.split("\n"):
        module, _, names = line.strip().partition(": ")
        choices = [part.strip("()").split("|") for part in re.split(r"(\([^)]*\))", module)]
        found += [f"{''.join(parts)}.{name}" for parts in product(*choices) for name in names.split()]
    return found


PLAIN = _spelled(
    """builtins: bool bytes dict float frozenset getattr int list object range slice str tuple type
    argparse: Namespace
    types: SimpleNamespace
    copyreg: _reconstructor
    datetime: date datetime time timedelta timezone
    decimal: Decimal
    fractions: Fraction
    uuid: UUID SafeUUID
    typing: Any
    pathlib(|._local): Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath
    numpy(|.core.multiarray|._core.multiarray): _reconstruct scalar ndarray dtype
    numpy: bool bool_ bytes_ float16 float32 float64 int8 int16 int32 int64 longlong str_ uint8 uint16 uint32 uint64
    numpy.dtypes: BoolDType BytesDType Float16DType Float32DType Float64DType ObjectDType StrDType LongDType LongLongDType
    numpy.dtypes: Int8DType Int16DType Int32DType Int64DType UInt8DType UInt16DType UInt32DType UInt64DType
    numpy.random._pickle: __bit_generator_ctor __generator_ctor __randomstate_ctor
    numpy.random._mt19937: MT19937
    torch.torch_version: TorchVersion
    mmengine.logging.history_buffer: HistoryBuffer
    omegaconf.base: ContainerMetadata Metadata
    omegaconf.nodes: AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode
    (pytorch_lightning|lightning.pytorch).callbacks.early_stopping: EarlyStopping
    (pytorch_lightning|lightning.pytorch).callbacks.model_checkpoint: ModelCheckpoint
    (pytorch_lightning|lightning.pytorch).callbacks.lr_monitor: LearningRateMonitor"""
)
MAPPINGS = _spelled(
    """collections: defaultdict ChainMap
    addict.addict: Dict
    easydict: EasyDict
    (yacs|fvcore.common|detectron2.config).config: CfgNode
    ml_collections.config_dict.config_dict: ConfigDict FrozenConfigDict
    (mmengine.config|mmcv.utils).config: ConfigDict Config
    omegaconf.dictconfig: DictConfig
    (pytorch_lightning|lightning.pytorch).utilities.parsing: AttributeDict
    (lightning_fabric|lightning.fabric).utilities.data: AttributeDict"""
)
LISTS = _spelled(
    """collections: deque
    omegaconf.listconfig: ListConfig"""
)


def _named(kind: type, names: list[str]) -> list[Any]:
    """Pairs of a placeholder of its own and the class's name, as `torch.serialization.safe_globals` takes them."""
    return [(type(name.rpartition(".")[2], (kind,), {}), name) for name in names]


HARMLESS = [*_named(Placeholder, PLAIN), *_named(Keys, MAPPINGS), *_named(Items, LISTS)]


def load_pickled(path: Path) -> Any:
    """The content of a file of `torch.save`: tensors, plain values, and placeholders for harmless objects.

    Raises `CheckpointError` for a file that cannot be read, and for an object of any other class, which it names.
    """
    try:
        _check_entries(path)
        with path.open("rb") as file, LOCK, torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)  # a stream: names of files say nothing
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may raise anything: torch's reader trusts what it reads
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: {_reason(error)}. Save the network's state_dict() alone, best as "
            "safetensors."
        ) from error


def _check_entries(path: Path) -> None:
    """Refuse archives that hold code, or that unfold to more than they are: torch writes them uncompressed."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names, total = archive.namelist(), sum(entry.file_size for entry in archive.infolist())
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: it is a TorchScript program. Save its state_dict(): "
            "torch.save(torch.jit.load(PATH).state_dict(), NEW_PATH)."
        )
    if not any(name.endswith("data.pkl") for name in names):
        listed = ", ".join(repr(name[:60]) for name in names[:3]) or "nothing"
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: it is a zip archive of {listed}, not a file of torch.save."
        )
    if total > path.stat().st_size + INFLATED:
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: its entries unfold to {total:,} bytes, more than the file has. "
            "torch.save does not compress; write it again."
        )


def _reason(error: Exception) -> str:
    """The cause in a line; an object that is in the way by the name of its class."""
    text = str(error)
    if found := GLOBAL.search(text):
        return f"it holds an object of the class {found[1][:100]}, and only tensors and plain values are read"
    if "Unsupported operand" in text:
        return "it was pickled with another protocol than torch.save's own (pickle_protocol=2), or is damaged"
    if "Weights only load failed" in text:
        text = text.split("Error:")[-1]
    if isinstance(error, MemoryError):
        return "it says that it is larger than the memory; it is damaged"
    if isinstance(error, LookupError | OSError) or "legacy .tar" in text:
        return f"it is no file of torch.save, or is damaged ({type(error).__name__}: {' '.join(text.split())[:80]})"
    return " ".join(text.split())[:200].rstrip(".") or type(error).__name__
