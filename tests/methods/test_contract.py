"""The contract that every patch of every method keeps on every architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import color_task, make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.engine.plan import HeadStep
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import DamagedPatchError, MethodNotApplicableError, WrongBackboneError
from modelpatch.methods.adaptformer import AdaptFormer
from modelpatch.methods.bitfit import BitFit
from modelpatch.methods.convpass import Convpass
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.houlsby import Houlsby
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method, confine
from modelpatch.methods.mona import Mona
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.paint import Paint
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.pruned import Pruned
from modelpatch.methods.registry import METHODS as REGISTERED
from modelpatch.methods.repadapter import RepAdapter
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.ssf import SSF
from modelpatch.methods.subset import Subset
from modelpatch.methods.vpt import VPT
from modelpatch.methods.widened import Widened
from modelpatch.patch.contents import Patch
from modelpatch.train import fit
from tolerance import close

ARCHITECTURES: dict[str, Callable[[], Backbone]] = {
    "tiny": make_tiny,
    "resnet18": lambda: make_timm("resnet18", 32, channels=(16, 24, 32, 48)),
    "mobilenetv2_100": lambda: make_timm("mobilenetv2_035", 32),  # the same blocks with a third of the channels
    "convnext_tiny": lambda: make_timm("convnext_tiny", 32, dims=(24, 48, 96, 192), depths=(2, 2, 3, 2)),
    "densenet121": lambda: make_timm("densenet121", 32, block_config=(2, 4, 6, 4)),  # as many stages, fewer layers
    "vit_tiny": lambda: make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=4, embed_dim=96),
}
WITHOUT_BATCH_NORM = {"convnext_tiny", "vit_tiny"}
WITHOUT_DEPTHWISE = {"resnet18", "densenet121", "vit_tiny"}
VARIED = {"tiny", "mobilenetv2_100"}  # the networks on which every option is tried as well
QUICK = {"tiny", "vit_tiny"}  # the networks of `make quick`
TINY_STAGES = 2

METHODS: dict[str, Method] = {
    "probe": LinearProbe(),
    "scale-bias": ScaleBias(),
    "scale-bias learned": ScaleBias(statistics="learned"),
    "subset": Subset(),
    "pruned": Pruned(),
    "siamese": Subset(head="siamese"),
    "piggyback": Piggyback(lr=1e-2),
    "lora": LoRA(),
    "widened": Widened(),
    "depthwise": Depthwise(),
    "packnet": PackNet(),
    "full": FullFinetune(),
    "paint": Paint(),
    "head2toe": Head2Toe(),
    "delta": DeltaNetwork(),
    "delta 4 and norm": DeltaNetwork(modules=4, batch_norm=True),
    "bitfit": BitFit(),
    "ssf": SSF(),
    "adaptformer": AdaptFormer(width=8),
    "houlsby": Houlsby(width=8),
    "repadapter": RepAdapter(),
    "convpass": Convpass(),
    "mona": Mona(width=8),
    "vpt": VPT(length=4),
    "vpt shallow": VPT(length=4, depth="shallow"),
}
ONLY_ON = {  # the networks that show something of these methods; others are refused, or repeat what these show
    "bitfit": {"tiny", "vit_tiny"},
    "ssf": {"tiny", "mobilenetv2_100", "convnext_tiny", "vit_tiny"},
    "adaptformer": {"vit_tiny"},
    "houlsby": {"vit_tiny"},
    "repadapter": {"vit_tiny"},
    "convpass": {"vit_tiny"},
    "mona": {"vit_tiny"},
    "vpt": {"vit_tiny"},
}
MORE_METHODS: dict[str, Method] = {
    "scale-bias recomputed": ScaleBias(statistics="recomputed"),
    "statistics only": ScaleBias(affine=False, statistics="recomputed"),
    "channel": ScaleBias(layers="channel"),
    "channel recomputed": ScaleBias(layers="channel", statistics="recomputed"),
    "channel learned": ScaleBias(layers="channel", statistics="learned"),
    "dora": LoRA(rank=2, dora=True, rslora=True),
    "random head": ScaleBias(head="random"),
    "subset reinitialized": Subset(reinitialize=True),
    "pruned stage": Pruned(blocks=("stage-1",), scope="global", norm="l1", reinitialize=True),
    "pruned learned": Pruned(statistics="learned"),
    "pruned + scale-bias": Pruned() + ScaleBias(),
    "scale-bias siamese": ScaleBias(head="siamese"),
    "delta siamese": DeltaNetwork(head="siamese"),
    "piggyback siamese": Piggyback(lr=1e-2, head="siamese"),
    "scale-bias in a stage": confine(ScaleBias(), ["stage-1"]),
    "scale-bias recomputed in a stage": confine(ScaleBias(statistics="recomputed"), ["stage-1"]),
    "piggyback in a stage": confine(Piggyback(lr=1e-2), ["stage-1"]),
    "subset stage": Subset(blocks=("stage-1",)),
    "subset learned": Subset(statistics="learned"),
    "full learned": FullFinetune(statistics="learned"),
    "scale-bias + depthwise": ScaleBias() + Depthwise(),
    "piggyback ternary": Piggyback(lr=1e-2, ternary=True, start="uniform"),
    "piggyback + norms": Piggyback(lr=1e-2, norms="trained"),
    "piggyback + widened": Piggyback(lr=1e-2) + Widened(),
    "widened siamese": Widened(head="siamese"),
    "piggyback + scale-bias": Piggyback(lr=1e-2) + ScaleBias(),
    "scale-bias + subset": ScaleBias() + Subset(),
    "delta + scale-bias": DeltaNetwork() + ScaleBias(),
    "delta identity": DeltaNetwork(stages=("stage0", "stage-1"), start="identity"),
    "delta existing": DeltaNetwork(skips="existing"),
    "delta learned": DeltaNetwork(modules=2, skips="learned"),
    "delta all and norm": DeltaNetwork(skips="all", batch_norm=True),
    "delta norm alone": DeltaNetwork(skips="unchanged", batch_norm=True),
}
PAIRS = [
    pytest.param(
        (architecture, method),
        id=f"{architecture}, {name}",
        marks=() if architecture in QUICK and name in METHODS else pytest.mark.slow,
    )
    for architecture in ARCHITECTURES
    for name, method in {**METHODS, **(MORE_METHODS if architecture in VARIED else {})}.items()
    if architecture in ONLY_ON.get(method.name, ARCHITECTURES)
    if architecture not in WITHOUT_BATCH_NORM or getattr(method, "statistics", "frozen") == "frozen"
    if architecture not in WITHOUT_DEPTHWISE or "depthwise" not in method.name
    if architecture != "tiny" or getattr(method, "modules", 1) <= TINY_STAGES
    if architecture != "tiny" or "pruned" not in method.name  # its blocks have no inner channels
]


def test_every_method_is_under_the_contract() -> None:
    assert {method.name for method in METHODS.values()} == set(REGISTERED)


@dataclass
class Fitted:
    """A patch that a real fit made, its file and logits; `before` holds the base's logits from before any fit."""

    method: Method
    backbone: Backbone
    other: Backbone
    patch: Patch
    file: Path
    images: Tensor
    before: Tensor

    @cached_property
    def logits(self) -> Tensor:
        return self.backbone.patched(self.patch)(self.images)


@cache
def architecture(name: str) -> tuple[Backbone, Backbone, Tensor, Tensor]:
    """The backbone, one that differs from it in one number, images, and the backbone's logits for them."""
    backbone = ARCHITECTURES[name]()
    module = copy.deepcopy(backbone.module)
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 0.5
    other = load_backbone(module, preprocessing=backbone.preprocessing)
    images = torch.randn(3, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    return backbone, other, images, backbone(images)


@pytest.fixture(scope="module", params=PAIRS)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fitted]:
    name, method = request.param
    backbone, other, images, before = architecture(name)
    data = color_task(12, backbone.preprocessing.image_size)
    patch = fit(backbone, data, method, epochs=1, batch_size=6)
    file = tmp_path_factory.mktemp("patch") / "colors.safetensors"
    yield Fitted(method, backbone, other, patch, patch.save(file), images, before)
    file.unlink()


def test_the_base_is_bit_for_bit_what_it_was_buffers_included(fitted: Fitted) -> None:
    assert Fingerprint.of(fitted.backbone.chain) == fitted.backbone.fingerprints
    assert torch.equal(fitted.backbone(fitted.images), fitted.before)


def test_a_saved_patch_answers_as_before(fitted: Fitted) -> None:
    loaded = Patch.load(fitted.file)
    logits = fitted.logits
    assert close(fitted.backbone.patched(loaded)(fitted.images), logits)
    assert close(BoundPatch(fitted.backbone, loaded)(fitted.images), logits)
    assert logits.shape == (3, 3)
    assert logits.isfinite().all()


@cache
def empty_engine(backbone: Backbone, tuning: Tuning) -> Engine:
    """An engine of the base alone; freezing its segments takes longer than all else."""
    return Engine(backbone, {}, tuning=tuning)


def join(fitted: Fitted, tuning: Tuning) -> Engine:
    """The engine of the fitted patch and the base; the patch before it is taken out."""
    engine = empty_engine(fitted.backbone, tuning)
    if "patch" in engine:
        engine.remove("patch")
    engine.add("patch", fitted.patch)
    return engine


def test_an_engine_answers_as_the_patch_alone_and_the_base_alone(fitted: Fitted) -> None:
    engine = join(fitted, Tuning())
    logits = fitted.logits
    answers = engine(fitted.images)
    joined = any(isinstance(step, HeadStep) and len(step.members) > 1 for step in engine.plan.steps)
    for answer, alone in ((answers["patch"], logits), (answers["base"], fitted.before)):
        assert torch.allclose(answer, alone, rtol=0, atol=1e-6 * float(alone.abs().max()) if joined else 0)
    rows = ["patch", "base", "patch"]
    for row, (name, answer) in enumerate(zip(rows, engine(fitted.images, tasks=rows), strict=True)):
        alone = logits[row] if name == "patch" else fitted.before[row]
        assert (answer - alone).abs().max() <= 1e-5 * alone.abs().max()
        assert answer.argmax() == alone.argmax()


def test_a_tuned_engine_answers_within_rounding(fitted: Fitted) -> None:
    engine = join(fitted, tuned(fitted.backbone))
    logits = fitted.logits
    answers = engine(fitted.images)
    for answer, alone in ((answers["patch"], logits), (answers["base"], fitted.before)):
        assert (answer - alone).abs().max() <= 1e-5 * alone.abs().max()
        assert torch.equal(answer.argmax(1), alone.argmax(1))


def tuned(backbone: Backbone) -> Tuning:
    """Everything that may move the last digits; folding, which takes seconds for a large network, for the small ones."""
    return Tuning(channels_last=True, fold=len(backbone.chain) < 20, piece_bytes=2**16, merge_rows=16)


def test_the_file_is_as_large_as_inspect_says(fitted: Fitted) -> None:
    assert fitted.patch.inspect().file_bytes == fitted.file.stat().st_size


def test_a_base_with_one_other_number_is_refused(fitted: Fitted) -> None:
    with pytest.raises(WrongBackboneError, match="differs in 1 of"):
        fitted.other.patched(fitted.patch)


def test_a_file_with_one_other_byte_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    data = bytearray(fitted.file.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    with pytest.raises(DamagedPatchError):
        Patch.load(damaged)


def test_everything_training_changes_is_in_the_patch(fitted: Fitted) -> None:
    backbone, method, images = fitted.backbone, fitted.method, fitted.images
    trained = method.draft(backbone, 3)
    for hook in method.all_hooks():
        hook.begin(trained, lambda: [images])
    trained.train()
    optimizer = method.make_optimizer(trained, backbone)
    F.cross_entropy(trained(images), torch.arange(3)).backward()
    optimizer.step()
    trained.eval()
    resumed = method.draft(backbone, 3)
    resumed.load_state(trained.state())
    rebuilt = backbone.patched(replace(fitted.patch, tensors=trained.tensors(), head=trained.head.record))
    with torch.no_grad():
        assert close(resumed(images), trained(images))
        assert close(rebuilt(images), trained(images))


@pytest.mark.parametrize("name", sorted(WITHOUT_BATCH_NORM))
@pytest.mark.parametrize("statistics", ["recomputed", "learned"])
def test_statistics_of_a_network_that_has_none_are_refused(name: str, statistics: str) -> None:
    method = ScaleBias(affine=False, statistics=statistics)  # type: ignore[arg-type]
    with pytest.raises(MethodNotApplicableError, match="running statistics"):
        fit(architecture(name)[0], color_task(12, 32), method, epochs=1)


@pytest.mark.parametrize("name", sorted(WITHOUT_DEPTHWISE))
def test_depthwise_filters_of_a_network_that_has_none_are_refused(name: str) -> None:
    with pytest.raises(MethodNotApplicableError, match=r"no depthwise convolution.*`scale-bias`"):
        fit(architecture(name)[0], color_task(12, 32), Depthwise(), epochs=1)
