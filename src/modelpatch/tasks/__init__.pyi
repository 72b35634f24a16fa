from .measures import Detection as Detection
from .measures import Evaluation as Evaluation
from .measures import Result as Result
from .measures import Segmentation as Segmentation
from .record import TaskRecord as TaskRecord
