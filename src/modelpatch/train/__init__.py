"""How methods are trained: data, augmentation, the prefix cache, the training loop and metrics."""

from modelpatch.train.compare import Comparison, compare
from modelpatch.train.corruptions import corrupt, corrupted
from modelpatch.train.data import Split, TaskData, load_task
from modelpatch.train.evaluate import evaluate, harmonic_mean, store_as
from modelpatch.train.fit import FitSettings, fit
from modelpatch.train.joining import join_tasks
from modelpatch.train.measures import Detection, Evaluation, Result, Segmentation
from modelpatch.train.multires import MultiResolution, fit_multires
from modelpatch.train.multitask import Multitask, fit_multitask
from modelpatch.train.paint import Painting, PaintSettings, paint

__all__ = [
    "Comparison",
    "Detection",
    "Evaluation",
    "FitSettings",
    "MultiResolution",
    "Multitask",
    "PaintSettings",
    "Painting",
    "Result",
    "Segmentation",
    "Split",
    "TaskData",
    "compare",
    "corrupt",
    "corrupted",
    "evaluate",
    "fit",
    "fit_multires",
    "fit_multitask",
    "harmonic_mean",
    "join_tasks",
    "load_task",
    "paint",
    "store_as",
]
