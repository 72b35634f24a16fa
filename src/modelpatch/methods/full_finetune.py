"""Full fine-tuning: every tensor of the chain is the patch's own. The upper baseline in accuracy and in bytes."""

from pydantic import NonNegativeFloat, PositiveFloat

from modelpatch.backbone.backbone import Backbone
from modelpatch.methods.blocks import Statistics, own_segments
from modelpatch.methods.method import Method, register_method
from modelpatch.patch.blueprint import Blueprint


@register_method
class FullFinetune(Method):
    """Trains all parameters, at a lower rate than patches bear (K for the Price of 1, section 5). `statistics` says what
    BatchNorm layers do, as in `Subset`."""

    name = "full-finetune"
    paper = "Kornblith, Shlens and Le, Do Better ImageNet Models Transfer Better?, 2019"
    order = 12
    compared = ("full-finetune",)
    trains_everything = True
    shares_across_tasks = True

    statistics: Statistics = "frozen"
    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 1e-2

    def changes(self, backbone: Backbone) -> Blueprint:
        return own_segments([segment for segment in backbone.chain if segment.parameters], self.statistics)
