"""Trace a network into a flat graph whose leaves are its blocks (`torch.fx`).

Which modules are leaves decides how finely the chain can be cut. A module is *opened* (traced into) when it is a
`Sequential` or `ModuleList`, owns one whose members have children of their own (a stage), or has only children of one
composite class (RegNet's stages, which name their blocks as attributes). A class that was opened but whose children
turn out not to run strictly one after another (a residual block that wraps its branch in a `Sequential`), or that
cannot be traced, is closed and the trace repeated, so that a block is never split in half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from modelpatch.errors import UntraceableBackboneError

ROOT = "module"


class _OneInput(nn.Module):
    """Calls a module with its image alone, so that every optional argument takes its default while tracing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


@dataclass
class Scope:
    """An opened module: its nodes are those between `first` and `last`.

    `calls` counts the calls of its children, a plain container's members standing for the container.
    """

    kind: type[nn.Module]
    first: int
    last: int = -1
    calls: int = 0


@dataclass(eq=False)
class _Tracer(fx.Tracer):
    closed: set[type[nn.Module]] = field(default_factory=set)
    always_open: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.stack: list[Scope] = []
        self.scopes: list[Scope] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == ROOT or module_qualified_name in self.always_open:
            return False
        return type(m) in self.closed or not opens(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            self._count_calls(1)
            return super().call_module(m, forward, args, kwargs)
        scope = Scope(type(m), first=len(self.graph.nodes))
        self.stack.append(scope)
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        scope.last = len(self.graph.nodes)
        self.scopes.append(scope)
        self._count_calls(1 if closable(scope.kind) else scope.calls)
        return result

    def _count_calls(self, calls: int) -> None:
        if self.stack:
            self.stack[-1].calls += calls


def opens(module: nn.Module) -> bool:
    """Whether tracing looks inside a module of this structure (see the module docstring)."""
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
    while True:
        tracer = _Tracer(closed=closed, always_open={f"{ROOT}.{name}" for name in always_open})
        try:
            graph = tracer.trace(_OneInput(module))
        except Exception as error:  # whatever a network's Python does with a proxy instead of a tensor
            culprits = [scope.kind for scope in tracer.stack if closable(scope.kind)]
            if len(tracer.stack) <= 1 or not culprits or culprits[-1] in closed or culprits[-1] is type(module):
                raise UntraceableBackboneError(
                    f"{type(module).__name__} cannot be traced by torch.fx ({str(error).splitlines()[0]})"
                ) from error
            closed.add(culprits[-1])
            continue
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = node.target.removeprefix(f"{ROOT}.")
        return graph, [scope for scope in tracer.scopes if scope is not tracer.scopes[-1]]


def closable(kind: type[nn.Module]) -> bool:
    return kind not in (nn.Sequential, nn.ModuleList)
