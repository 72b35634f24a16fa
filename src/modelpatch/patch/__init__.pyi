from .blueprint import Blueprint as Blueprint
from .blueprint import Graft as Graft
from .blueprint import register_graft as register_graft
from .changes import Reweighting as Reweighting
from .contents import Patch as Patch
from .file import BackboneRecord as BackboneRecord
from .file import MethodRecord as MethodRecord
from .model import PatchedModel as PatchedModel
