"""ONNX Runtime on the CPU. Its threads sleep between runs: spinning, they would take the cores from PyTorch's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modelpatch.engine.backends.base import BACKENDS, Backend, Compiled
from modelpatch.errors import require


@BACKENDS.register("onnxruntime")
class OnnxRuntime(Backend):
    """Sessions of ONNX Runtime, for batches of any size."""

    name = "onnxruntime"
    libraries = ("onnxruntime", "onnx", "onnxscript")

    def load(self, path: Path, inputs: Sequence[Tensor], threads: int, fixed: bool) -> Compiled:
        """A session on `threads` cores."""
        runtime = require("onnxruntime", self.extra, "The backend onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def run(*tensors: Tensor) -> Tensor:
            feeds = {name: x.contiguous().numpy() for name, x in zip(names, tensors, strict=True)}
            return torch.from_numpy(session.run(None, feeds)[0])

        return run
