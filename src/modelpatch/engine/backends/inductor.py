"""Inductor, the compiler of `torch.compile`: machine code for the CPU or a GPU, compiled ahead of time into one file.

A file holds code for this processor and this number of threads. It needs a C++ compiler, and Triton for a GPU.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modelpatch.backbone.graphs import trace_module
from modelpatch.engine.backends.base import BACKENDS, Backend, Compiled

COMPILERS = ("g++", "clang++", "cl")


@BACKENDS.register("inductor")
class Inductor(Backend):
    """Packages of `torch._inductor`, for batches of any size."""

    name = "inductor"
    suffix = ".pt2"
    devices = ("cpu", "cuda")

    @property
    def version(self) -> str:
        """PyTorch, the processor's instructions and the GPU."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return f"inductor {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} {gpu}"

    def obstacle(self, device: torch.device) -> str:
        """A missing compiler, beside the reasons of all backends."""
        own = "" if any(map(shutil.which, COMPILERS)) else f"it needs a C++ compiler, one of {', '.join(COMPILERS)}"
        return super().obstacle(device) or own

    def write(self, module: nn.Module, inputs: Sequence[Tensor], owner: str, threads: int) -> bytes:
        """A package of machine code."""
        named = {f"x{number}": x for number, x in enumerate(inputs)}
        traced = trace_module(module, named, owner)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "run.pt2")
            settings = {"cpp.threads": threads}
            torch._inductor.aoti_compile_and_package(traced, package_path=path, inductor_configs=settings)
            return Path(path).read_bytes()

    def load(self, path: Path, inputs: Sequence[Tensor], threads: int, fixed: bool) -> Compiled:
        """The package's code."""
        package = torch._inductor.aoti_load_package(str(path))

        def run(*tensors: Tensor) -> Tensor:
            made = package(*(x.contiguous() for x in tensors))
            return made[0] if isinstance(made, list | tuple) else made

        return run
