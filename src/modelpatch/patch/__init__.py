"""What a patch is: tensors over a frozen backbone, a head and a task, in one file that cannot be silently damaged."""

from modelpatch.patch.bind import PatchedModel
from modelpatch.patch.blueprint import Blueprint, Graft, register_graft
from modelpatch.patch.bound import BoundPart, BoundPatch
from modelpatch.patch.cascade import Cascade, Confidence
from modelpatch.patch.decoders import DeepLabHead, FCNHead
from modelpatch.patch.detectors import Detector, FasterRCNNHead, SSDLiteHead
from modelpatch.patch.diff import diff
from modelpatch.patch.extract import DELTA_CODECS, extract
from modelpatch.patch.heads import CosineHead, Decoder, DraftHead, HeadRecord, LinearHead, SiameseHead, pooled_width
from modelpatch.patch.merge import merge
from modelpatch.patch.patch import BackboneRecord, MethodRecord, Patch
from modelpatch.patch.store import Problem, Store
from modelpatch.patch.task import Task
from modelpatch.patch.version import Version
from modelpatch.patch.weights import Reweighting

__all__ = [
    "DELTA_CODECS",
    "BackboneRecord",
    "Blueprint",
    "BoundPart",
    "BoundPatch",
    "Cascade",
    "Confidence",
    "CosineHead",
    "Decoder",
    "DeepLabHead",
    "Detector",
    "DraftHead",
    "FCNHead",
    "FasterRCNNHead",
    "Graft",
    "HeadRecord",
    "LinearHead",
    "MethodRecord",
    "Patch",
    "PatchedModel",
    "Problem",
    "Reweighting",
    "SSDLiteHead",
    "SiameseHead",
    "Store",
    "Task",
    "Version",
    "diff",
    "extract",
    "merge",
    "pooled_width",
    "register_graft",
]
