"""The interface of backends, their registry, and the rule that chooses one.

A backend compiles a module in two steps: `write` makes a file that depends on the module alone and is kept in the cache, and
`load` makes what runs from the file, for one number of threads and, where the backend wants it, one number of rows.

    @BACKENDS.register("mine")
    class Mine(Backend):
        name = "mine"
        ...

Other distributions list theirs as entry points of the group `modelpatch.backends`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelpatch.backbone.graphs import write_graph
from modelpatch.errors import EngineError
from modelpatch.registry import Registry

Compiled = Callable[..., Tensor]  # tensors (B, ...) in, one (B, ...) out, as the module that was compiled
AUTO = ("openvino", "onnxruntime")  # the order of the rule


class Backend(ABC):
    """A way to compile modules. Files end in `suffix`; `version` is of all that a file's content depends on beside the module.

    `libraries` have to be importable, which `extra` installs, and `devices` are those that it runs on. `fixed_rows` is True
    for a backend that compiles for one number of rows; `copies` is how often weights lie in memory.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ".onnx"
    extra: ClassVar[str] = "compiled"
    libraries: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    compiles: ClassVar[bool] = True
    fixed_rows: ClassVar[bool] = False
    copies: ClassVar[int] = 1

    @property
    def version(self) -> str:
        """Text that changes when files have to be made anew; backends of one version read each other's files."""
        return f"onnx of torch {torch.__version__}"

    def obstacle(self, device: torch.device) -> str:
        """The reason in words for which this backend cannot run here; empty where it can."""
        if device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, and the backbone is on {device.type}"
        missing = [library for library in self.libraries if find_spec(library) is None]
        command = f"pip install 'modelpatch[{self.extra}]'"
        return f"{' and '.join(missing)} cannot be imported. Install: {command}" if missing else ""

    def write(self, module: nn.Module, inputs: Sequence[Tensor], owner: str, threads: int) -> bytes:
        """The file of a module in eval mode, for inputs like these of two rows and for any number of rows.

        Raises `PatchError` that names the `owner` of a module that cannot be traced.
        """
        named = {f"x{number}": x for number, x in enumerate(inputs)}
        return write_graph(module, named, ["y"], {}, "onnx", owner)

    @abstractmethod
    def load(self, path: Path, inputs: Sequence[Tensor], threads: int, fixed: bool) -> Compiled:
        """The compiled module of a file; with `fixed` for the number of rows of the `inputs` alone.

        Raises whatever the library does for a file that it cannot read.
        """


BACKENDS: Registry[type[Backend]] = Registry("backend", "modelpatch.backends", folder=__package__, error=EngineError)


def choose_backend(name: str, device: torch.device, settled: bool = False) -> Backend:
    """The backend of that name; for "auto" by a rule of device and installed libraries, never by a timing.

    On a CPU it is OpenVINO, else ONNX Runtime. It is eager PyTorch without both, on other devices, and where the settings of
    eager modules are `settled`. Raises `EngineError` for an unknown name, and for a backend that cannot run here.
    """
    if name == "auto":
        found = (BACKENDS.find(one)() for one in AUTO if not settled)
        return next((one for one in found if not one.obstacle(device)), BACKENDS.find("eager")())
    backend = BACKENDS.find(name)()
    if obstacle := backend.obstacle(device):
        raise EngineError(f"the backend {name!r} cannot run here: {obstacle}.")
    return backend
