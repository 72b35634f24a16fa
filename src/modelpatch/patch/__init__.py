"""What a patch is: tensors over a frozen backbone, a head and a task, in one file that cannot be silently damaged."""

from modelpatch.patch.bind import BoundPatch, PatchedModel
from modelpatch.patch.blueprint import Blueprint, Graft, register_graft
from modelpatch.patch.heads import DraftHead, HeadRecord, LinearHead, SiameseHead, pooled_width
from modelpatch.patch.patch import BackboneRecord, MethodRecord, Patch
from modelpatch.patch.task import Task
from modelpatch.patch.weights import Reweighting

__all__ = [
    "BackboneRecord",
    "Blueprint",
    "BoundPatch",
    "DraftHead",
    "Graft",
    "HeadRecord",
    "LinearHead",
    "MethodRecord",
    "Patch",
    "PatchedModel",
    "Reweighting",
    "SiameseHead",
    "Task",
    "pooled_width",
    "register_graft",
]
