"""The plan of several tasks as one module, to be exported: what they share is computed once in the graph, too."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from modelpatch.atomic import write_bytes
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.graphs import GRAPHS, write_graph
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.plan import make_plan
from modelpatch.engine.program import JoinedHeads, Program
from modelpatch.engine.task import EngineTask
from modelpatch.errors import EngineError
from modelpatch.heads.reading import pooled_axes

ROWS = (0, 1)  # of the example that a graph is traced with


class PlanGraph(nn.Module):
    """Images (B, 3, H, W) of every preprocessing among `tasks` in, the answer of every task out, in their order.

    The modules are clones in eval mode, on the CPU, that share the frozen tensors. Raises `EngineError` for tasks that a graph
    cannot hold: cascades, whose rows leave early, and several patches of one task, of which a call chooses.
    """

    def __init__(self, backbone: Backbone, tasks: Sequence[EngineTask]) -> None:
        super().__init__()
        for task in tasks:
            if task.stages or task.options:
                what = "is a cascade" if task.stages else "has several patches"
                raise EngineError(
                    f"{task.name} {what}, and a graph answers every row alike. Export its patches as tasks."
                )
        own = backbone.preprocessing.image_size
        plan = make_plan([task.planned(None, own) for task in tasks], [ROWS] * len(tasks), lambda *_: False)
        self.tasks = tuple(replace(task, head=clone_module(task.head).cpu()) for task in tasks)
        self.heads = nn.ModuleList(task.head for task in self.tasks)
        self.preprocessings = tuple(dict.fromkeys(task.preprocessing for task in tasks))
        links = {link.key: link for step in plan.runs for link in step.links}
        self.links = nn.ModuleList(link.copy().cpu() for link in links.values())
        modules = dict(zip(links, self.links, strict=True))
        self._program = Program(
            plan,
            self.tasks,
            lambda link, waits: modules[link.key],
            JoinedHeads,
            lambda index: pooled_axes(backbone.chain, index),
            Tuning(),
            lambda images: None,
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Example images (2, 3, H, W) by the name of the input: `images`, or `images_0`, `images_1`, ... for several."""
        count = len(self.preprocessings)
        names = ["images"] if count == 1 else [f"images_{number}" for number in range(count)]
        shapes = [one.input_size for one in self.preprocessings]
        return {name: torch.zeros(len(ROWS), *shape) for name, shape in zip(names, shapes, strict=True)}

    @property
    def facts(self) -> dict[str, str]:
        """Metadata as JSON: `inputs` with the preprocessing of each, `tasks` with kind, classes, options and input."""
        names = dict(zip(self.preprocessings, self.inputs, strict=True))
        inputs = {name: one.model_dump(mode="json") for one, name in names.items()}
        tasks = {
            task.name: {
                "kind": task.kind,
                "classes": list(task.classes),
                "options": dict(task.facts),
                "input": names[task.preprocessing],
            }
            for task in self.tasks
        }
        return {"inputs": json.dumps(inputs), "tasks": json.dumps(tasks)}

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """The answers of all tasks, in their order, for images that each preprocessing has normalised."""
        given = dict(zip(self.preprocessings, images, strict=True))
        streams = {stream: given[root] for root, stream, _ in self._program.plan.roots}  # type: ignore[index]
        answers = self._program.follow(streams)
        return tuple(answers[task.name] for task in self.tasks)


def export_graph(backbone: Backbone, tasks: Sequence[EngineTask], path: Path) -> Path:
    """Write tasks as one graph, in the format of the path's suffix. Raises `EngineError`, and what `write_graph` raises."""
    forms = {suffix: form for form, suffix in GRAPHS.items()}
    if path.suffix not in forms:
        raise EngineError(f"{path} ends in {path.suffix!r}; expected one of: {', '.join(forms)}.")
    if not tasks:
        raise EngineError("there are no tasks to export. Name some: tasks=['flowers'].")
    graph = PlanGraph(backbone, tasks).eval()
    for images in graph.inputs.values():
        backbone.chain.prepare(images.to(backbone.device))
    names = [task.name for task in tasks]
    data = write_graph(graph, graph.inputs, names, graph.facts, forms[path.suffix], f"the graph of {', '.join(names)}")
    write_bytes(path, data)
    return path
