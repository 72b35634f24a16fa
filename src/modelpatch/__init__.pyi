from . import errors as errors
from . import methods as methods
from .backbone.backbone import Backbone as Backbone
from .backbone.load import load_backbone as load_backbone
from .backbone.preprocessing import Preprocessing as Preprocessing
from .convert.extraction import extract as extract
from .convert.merging import merge as merge
from .data.task import Task as Task
from .data.task import load_task as load_task
from .engine.engine import Engine as Engine
from .patch.contents import Patch as Patch
from .patch.model import PatchedModel as PatchedModel
from .recipes.cascading import cascade as cascade
from .recipes.comparison import compare as compare
from .recipes.painting import paint as paint
from .select.automatic import fit as fit
from .serve.client import Client as Client
from .store.store import Store as Store
from .train.evaluation import evaluate as evaluate

__version__: str
