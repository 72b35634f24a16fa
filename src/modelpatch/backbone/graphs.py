"""Modules as graphs for other runtimes, in batches of any size.

torch-export   a program of torch.export: `torch.export.load(path).module()(images)`
onnx           an ONNX graph with named inputs and outputs
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from modelpatch.errors import PatchError, require
from modelpatch.text import first_line

GRAPHS = {"torch-export": ".pt2", "onnx": ".onnx"}
LOGGERS = ("torch", "onnxscript", "onnx_ir")
MOST_ONNX = 2**31 - 2**24  # bytes of weights: protobuf writes less than 2 GiB, the graph included


def write_graph(
    module: nn.Module,
    images: Mapping[str, Tensor],
    outputs: Sequence[str],
    facts: Mapping[str, str],
    form: str,
    owner: str,
) -> bytes:
    """The bytes of a graph of `module`, in a format of `GRAPHS`.

    `images` are example inputs (2, C, H, W) by name, in the order of the module's arguments, `outputs` the names of what it
    returns, and `facts` the metadata of an ONNX file. Raises `PatchError` that names the `owner` of a module that cannot be
    traced, `MissingExtraError` without the `export` extra for ONNX.
    """
    if form == "torch-export":
        stream = io.BytesIO()
        traced = trace_module(module, images, owner)
        with _reported("torch.export", owner):
            torch.export.save(traced, stream, extra_files=dict(facts))
        return stream.getvalue()
    onnx = require("onnx", "export", "The format onnx")
    require("onnxscript", "export", "The format onnx")  # torch.onnx needs it
    traced = trace_module(module, images, owner, "torch.onnx")
    if (size := sum(tensor.nbytes for tensor in traced.state_dict.values())) > MOST_ONNX:
        raise PatchError(
            f"the model has {size:,} bytes of weights; a file of the format onnx holds {MOST_ONNX:,}. Use torch-export."
        )
    with _reported("torch.onnx", owner):
        program = torch.onnx.export(
            traced, dynamo=True, verbose=False, input_names=list(images), output_names=list(outputs)
        )
        assert program is not None
        model = program.model_proto
    onnx.helper.set_model_props(model, dict(facts))
    return model.SerializeToString()


def trace_module(
    module: nn.Module, images: Mapping[str, Tensor], owner: str, tool: str = "torch.export"
) -> torch.export.ExportedProgram:
    """The module as a program over inputs of these sizes, in batches of any size. Raises `PatchError`."""
    batch = torch.export.Dim("batch", min=1)
    shapes: tuple[Any, ...] = tuple({0: batch} for _ in images)
    arguments = signature(module.forward).parameters.values()
    if any(argument.kind is Parameter.VAR_POSITIONAL for argument in arguments):
        shapes = (shapes,)
    with _reported(tool, owner):
        return torch.export.export(module, tuple(images.values()), dynamic_shapes=shapes)


@contextmanager
def _reported(tool: str, owner: str) -> Iterator[None]:
    """Silence the exporter's logs, and no others, and turn its errors into one `PatchError`."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, KeyError) as error:
        raise PatchError(f"{tool} cannot trace {owner}: {first_line(error)[:300]}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
