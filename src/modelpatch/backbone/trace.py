"""Trace a network into a flat graph whose leaves are its blocks (`torch.fx`).

Which modules are leaves decides how finely the chain can be cut. A module is *opened* (traced into) when it is a
`Sequential` or `ModuleList`, owns one whose members have children of their own (a stage), or has only children of one
composite class (RegNet's stages, which name their blocks as attributes). A class that was opened but whose children
turn out not to run strictly one after another (a residual block that wraps its branch in a `Sequential`), or that
cannot be traced, is closed and the trace repeated, so that a block is never split in half.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


@dataclass
class Scope:
    """An opened module: its nodes are those between `first` and `last`."""

    kind: type[nn.Module]
    first: int
    last: int = -1
    calls: int = 0  # of its children, a plain container's members standing for the container


class _Tracer(fx.Tracer):
    """A tracer whose leaves are those of which `is_leaf` is true, and which keeps the scopes of others.

    Tracing replaces `nn.Module.__call__` for all threads; calls by others than its own are left alone.
    """

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool]) -> None:
        super().__init__()
        self.is_leaf_module = is_leaf  # type: ignore[assignment, method-assign]
        self.thread = threading.get_ident()
        self.stack: list[Scope] = []
        self.scopes: list[Scope] = []

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        calls, leaf = 1, self.is_leaf_module(m, self.path_of_module(m))
        scope = Scope(type(m), first=len(self.graph.nodes))
        if not leaf:
            self.stack.append(scope)
        result = super().call_module(m, forward, args, kwargs)
        if not leaf:
            self.stack.pop()
            scope.last = len(self.graph.nodes)
            self.scopes.append(scope)
            calls = 1 if closable(scope.kind) else scope.calls
        if self.stack:
            self.stack[-1].calls += calls
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        own = threading.get_ident() == self.thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if own else attr_val


def opens(module: nn.Module) -> bool:
    """True if tracing looks inside a module of this structure (see the module docstring)."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return True
    if type(module).__module__.startswith("torch.nn."):
        return False
    children = list(module.children())
    containers = [child for child in children if isinstance(child, nn.Sequential | nn.ModuleList)]
    if any(has_children(member) for container in containers for member in container):
        return True
    return len({type(child) for child in children}) == 1 and has_children(children[0])


def has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def trace(module: nn.Module, always_open: set[str], closed: set[type[nn.Module]]) -> tuple[fx.Graph, list[Scope]]:
    """The graph of `module` with the names of its own tensors and modules, and the scopes that were opened.

    Classes that cannot be traced are added to `closed`. Raises `UntraceableBackboneError` when what fails is the
    network's own `forward`.
    """
    opened = {ROOT, *(f"{ROOT}.{name}" for name in always_open)}
    while True:
        tracer = _Tracer(lambda m, name: name not in opened and (type(m) in closed or not opens(m)))
        try:
            return _run(tracer, module), tracer.scopes[:-1]
        except UntraceableBackboneError:
            culprits = [scope.kind for scope in tracer.stack if closable(scope.kind)]
            if len(tracer.stack) <= 1 or not culprits or culprits[-1] in closed or culprits[-1] is type(module):
                raise
            closed.add(culprits[-1])


def closable(kind: type[nn.Module]) -> bool:
    return kind not in (nn.Sequential, nn.ModuleList)


def trace_calls(module: nn.Module) -> fx.Graph:
    """The graph of `module(x)`, optional arguments at their defaults, in which every call of a child is one node.

    A segment that calls a block with more than its input is looked through. Targets are names within `module`.
    Raises `UntraceableBackboneError` where torch.fx cannot follow its Python.
    """
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    targets = [str(node.target) for node in nodes if node.op == "call_module"]
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
