"""Graphs of a block's own calls (`torch.fx`), by which methods find its sums and its layers."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelpatch.backbone.cuts import has_children
from modelpatch.backbone.steps import Steps
from modelpatch.errors import UntraceableBackboneError
from modelpatch.text import first_line

ROOT = "module"
LOCK = threading.Lock()  # torch.fx replaces `nn.Module.__call__` while it traces: one trace at a time


class _OneInput(nn.Module):
    """Calls a module with its image alone, so that every optional argument takes its default while tracing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class _Tracer(fx.Tracer):
    """A tracer whose leaves are those of which `is_leaf` is true.

    Tracing replaces `nn.Module.__call__` for all threads; calls by others than its own are left alone.
    """

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool]) -> None:
        super().__init__()
        self.is_leaf_module = is_leaf  # type: ignore[assignment, method-assign]
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        own = threading.get_ident() == self.thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if own else attr_val


def trace_calls(module: nn.Module) -> fx.Graph:
    """The graph of `module(x)`, optional arguments at their defaults, in which every call of a child is one node.

    A segment that calls a block with more than its input is looked through. Targets are names within `module`.
    Raises `UntraceableBackboneError` where torch.fx cannot follow its Python.
    """
    programs = module.programs.values() if isinstance(module, Steps) else ()
    targets = [call.name for program in programs for call in program.calls if isinstance(call.target, str)]
    opened = {ROOT, *(f"{ROOT}.{name}" for name in targets if has_children(module.get_submodule(name)))}
    return _run(_Tracer(lambda m, name: name not in opened), module)


def trace_layers(module: nn.Module) -> fx.Graph:
    """The graph of `module(x)` as `trace_calls` has it, down to norms and modules without children."""
    return _run(_Tracer(lambda m, name: isinstance(m, _BatchNorm) or not has_children(m)), module)


def _run(tracer: fx.Tracer, module: nn.Module) -> fx.Graph:
    """The graph, with the names of the module's own tensors and modules. Raises `UntraceableBackboneError`."""
    try:
        with LOCK:
            graph = tracer.trace(_OneInput(module))
    except Exception as error:  # whatever a network's Python does with a proxy instead of a tensor
        reason = f"cannot be traced by torch.fx ({first_line(error)})"
        raise UntraceableBackboneError(f"{type(module).__name__} {reason}") from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(f"{ROOT}.")
    return graph
