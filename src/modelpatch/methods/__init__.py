"""How patches are made: one file per method, each with its paper and formula at the top."""

from modelpatch.methods.added import WithLoss, with_loss
from modelpatch.methods.composite import Composite
from modelpatch.methods.confined import Confined, confine
from modelpatch.methods.delta import DeltaNetwork, SkipWeights, skip_variances, skip_weights
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.paint import Paint
from modelpatch.methods.peft_folder import export_peft, import_peft
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.pruned import Pruned
from modelpatch.methods.registry import COMPARED, METHODS, make_method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.methods.widened import Widened

__all__ = [
    "COMPARED",
    "METHODS",
    "Composite",
    "Confined",
    "DeltaNetwork",
    "Depthwise",
    "FullFinetune",
    "Head2Toe",
    "LinearProbe",
    "LoRA",
    "Method",
    "PackNet",
    "Paint",
    "Piggyback",
    "Pruned",
    "ScaleBias",
    "SkipWeights",
    "Subset",
    "Widened",
    "WithLoss",
    "confine",
    "export_peft",
    "import_peft",
    "make_method",
    "skip_variances",
    "skip_weights",
    "with_loss",
]
