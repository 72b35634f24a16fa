"""The frozen network: loading it, cutting it into a chain, cloning its structure, proving that it did not change."""

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import Chain, Segment
from modelpatch.backbone.clone import clone_module
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.load import check_writable, load_backbone, save_backbone
from modelpatch.backbone.preprocess import Preprocessing

__all__ = [
    "Backbone",
    "Chain",
    "Fingerprint",
    "Preprocessing",
    "Segment",
    "check_writable",
    "clone_module",
    "load_backbone",
    "save_backbone",
]
