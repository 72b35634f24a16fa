"""One frozen vision backbone, many tasks: each task is a small patch file instead of a copy of the model.

import modelpatch as mp

backbone = mp.load_backbone("bundled:tiny")
task = mp.load_task("flowers/")
patch = mp.fit(backbone, task, mp.methods.ScaleBias(), epochs=10)
patch.save("flowers.safetensors")
model = backbone.patched(mp.Patch.load("flowers.safetensors"))     # images -> logits
"""

__version__ = "0.1.0"

from modelpatch import errors, methods
from modelpatch.backbone import Backbone, Preprocessing, load_backbone, save_backbone
from modelpatch.engine import Engine, Tuning
from modelpatch.patch import BoundPatch, Cascade, Patch, PatchedModel, Store, Task, Version, diff, extract, merge
from modelpatch.select.cascading import cascade
from modelpatch.serve import Client
from modelpatch.train import (
    PaintSettings,
    compare,
    evaluate,
    fit,
    fit_multires,
    fit_multitask,
    harmonic_mean,
    join_tasks,
    load_task,
    paint,
)

__all__ = [
    "Backbone",
    "BoundPatch",
    "Cascade",
    "Client",
    "Engine",
    "PaintSettings",
    "Patch",
    "PatchedModel",
    "Preprocessing",
    "Store",
    "Task",
    "Tuning",
    "Version",
    "__version__",
    "cascade",
    "compare",
    "diff",
    "errors",
    "evaluate",
    "extract",
    "fit",
    "fit_multires",
    "fit_multitask",
    "harmonic_mean",
    "join_tasks",
    "load_backbone",
    "load_task",
    "merge",
    "methods",
    "paint",
    "save_backbone",
]
