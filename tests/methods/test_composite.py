"""Several methods in one patch: who trains what, what is refused, how it is spelled."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from conftest import color_task, draft_patch, make_timm
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.errors import MethodError, MethodNotApplicableError, PatchError
from modelpatch.methods.delta import DeltaNetwork, skip_weights
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Composite, confine
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.pruned import Pruned
from modelpatch.methods.registry import make_method, split_outside, sweep
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import decode_patch, encode_patch
from modelpatch.train import fit
from tolerance import close

pytestmark = pytest.mark.slow


def test_a_composite_owns_what_its_members_own(tiny: Backbone) -> None:
    both = ScaleBias() + Subset(blocks=("stage2.1",))
    owned = set(both.blueprint(tiny).owned)
    assert owned == set(ScaleBias().blueprint(tiny).owned) | set(Subset(blocks=("stage2.1",)).blueprint(tiny).owned)
    assert both.name == "scale-bias+subset"


def test_every_tensor_learns_at_its_members_rate_and_the_later_member_wins(tiny: Backbone) -> None:
    both = ScaleBias(lr=0.5, head_lr=0.1) + Subset(blocks=("stage2.1",), lr=0.25, weight_decay=0.0, head_lr=0.1)
    model = both.draft(tiny, 3)
    names = {id(parameter): name for name, parameter in model.trainable()}
    rates = {names[id(p)]: group["lr"] for group in both.parameter_groups(model, tiny) for p in group["params"]}
    assert rates["replace/stage1.0.bn1.weight"] == 0.5
    assert rates["replace/stage2.1.bn1.weight"] == rates["replace/stage2.1.conv1.weight"] == 0.25
    assert rates["head.weight"] == 0.1


def test_grafts_and_owned_tensors_of_one_span_learn_at_their_own_rates(tiny: Backbone) -> None:
    both = Subset(lr=0.25) + ScaleBias(layers="channel", lr=0.5)
    model = both.draft(tiny, 3)
    names = {id(parameter): name for name, parameter in model.trainable()}
    rates = {names[id(p)]: group["lr"] for group in both.parameter_groups(model, tiny) for p in group["params"]}
    grafts = {rate for name, rate in rates.items() if name.startswith("graft/")}
    owned = {rate for name, rate in rates.items() if name.startswith("replace/")}
    assert (grafts, owned) == ({0.5}, {0.25})


def test_masks_with_trained_norms_are_a_composite_too(tiny: Backbone) -> None:
    composed, option = Piggyback() + ScaleBias(), Piggyback(norms="trained")
    assert composed.draft(tiny, 3).tensors().keys() == option.draft(tiny, 3).tensors().keys()


def test_members_are_added_one_after_another() -> None:
    three = ScaleBias() + Depthwise() + Subset()
    assert isinstance(three, Composite)
    assert [member.name for member in three.methods] == ["scale-bias", "depthwise", "subset"]
    assert three.hyperparameters()["depthwise"] == Depthwise().hyperparameters()


def test_what_excludes_each_other_is_refused_with_the_reason(tiny: Backbone) -> None:
    with pytest.raises(MethodError, match="delta and scale-bias both add modules"):
        (DeltaNetwork() + ScaleBias(layers="channel")).draft(tiny, 3)
    with pytest.raises(MethodError, match="already trains everything"):
        ScaleBias() + FullFinetune()
    with pytest.raises(MethodError, match="holds subset twice"):
        Subset() + Subset(blocks=("stage1",))
    with pytest.raises(MethodError, match="statistics must agree"):
        (ScaleBias(statistics="recomputed") + Subset(statistics="learned")).draft(tiny, 3)
    with pytest.raises(MethodError, match="optimizers must agree"):
        ScaleBias(optimizer="sgd") + Subset()
    with pytest.raises(MethodError, match="head must agree"):
        ScaleBias(head="random") + Subset()


def test_a_weight_that_is_masked_and_trained_is_refused_before_anything_is_built(tiny: Backbone) -> None:
    refused = r"{} and {} exclude each other on stage2.*masked or trained"
    for first, second in ((Piggyback(), Subset()), (PackNet(), Subset()), (confine(Piggyback(), ["stage2"]), Subset())):
        for both in (first + second, second + first):
            with pytest.raises(MethodError, match=refused.format(first.name, second.name)):
                both.blueprint(tiny)
    assert (confine(Piggyback(), ["stage1"]) + Subset()).blueprint(tiny).owned


def test_a_model_makes_anew_the_weights_that_the_method_owns(tiny: Backbone) -> None:
    for method in (Piggyback(), PackNet(), ScaleBias(), confine(Piggyback(), ["stage1"]), Piggyback() + ScaleBias()):
        owned = set(method.blueprint(tiny).owned)
        assert method.build(tiny, 3).reweighted.keys() == method.reweightings(tiny).keys() & owned


def test_a_member_that_does_not_apply_says_so() -> None:
    with pytest.raises(MethodNotApplicableError, match="no depthwise convolution"):
        (ScaleBias() + Depthwise()).draft(make_timm("resnet18", 32), 3)


def test_a_composite_trains(tiny: Backbone) -> None:
    patch = fit(tiny, color_task(48), Piggyback(lr=3e-3) + ScaleBias() + LinearProbe(), epochs=6, batch_size=8)
    assert patch.method.name == "piggyback+scale-bias+linear-probe"
    assert patch.metrics["test_top1"] >= 0.9


# low-rank updates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        (Subset() + LoRA(), {"graft", "replace"}),
        (LoRA(blocks=("stage1",)) + Subset(blocks=("stage2",)), {"graft", "replace"}),
        (Piggyback(lr=1e-2) + LoRA(), {"graft", "mask"}),
        (LoRA() + PackNet(), {"graft", "mask", "delta"}),
        (LoRA() + ScaleBias(), {"graft", "replace"}),
        (LoRA() + Depthwise(), {"graft", "replace"}),
        (LoRA() + Head2Toe(), {"graft"}),
        (LoRA(blocks=("stage1",)) + DeltaNetwork(), {"graft"}),
        (LoRA(blocks=("stage1",)) + confine(ScaleBias(layers="channel"), ["stage2"]), {"graft"}),
    ],
    ids=lambda value: value.name if isinstance(value, Composite) else "",
)
def test_low_rank_updates_go_with_other_methods(method: Composite, kinds: set[str], tiny: Backbone) -> None:
    images = torch.randn(2, 3, 16, 16)
    before = tiny(images)
    patch = fit(tiny, color_task(), method, epochs=2, batch_size=6)
    assert {name.partition("/")[0] for name in patch.tensors if not name.startswith("head.")} == kinds
    updates = [tensor for name, tensor in patch.tensors.items() if "lora_B" in name]  # they start at zero
    assert updates
    assert all(update.any() for update in updates)
    assert torch.equal(tiny(images), before)
    again = decode_patch(encode_patch(patch))
    assert close(tiny.patched(again)(images), tiny.patched(patch)(images))


def test_an_update_is_added_to_the_masked_weight(tiny: Backbone) -> None:
    """W_eff = W ⊙ m + (scale / rank) B A."""
    patch = draft_patch(tiny, Piggyback() + LoRA(rank=2, scale=6.0))
    masks = {name: torch.rand(one.shape) < 0.7 for name, one in patch.tensors.items() if name.startswith("mask/")}
    patch = replace(patch, tensors={**patch.tensors, **masks})
    expected = copy.deepcopy(tiny.module)
    weights = dict(expected.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name.removeprefix("mask/")] *= mask
        for name, first in patch.tensors.items():
            if name.endswith(".lora_A.default.weight"):
                second = patch.tensors[name.replace("lora_A", "lora_B")]
                _, span, layer = name.removesuffix(".lora_A.default.weight").split("/")
                weight = weights[tiny.chain[int(span.partition("-")[0])].tensor_names[f"{layer}.weight"]]
                weight += 3 * (second.flatten(1) @ first.flatten(1)).view_as(weight)
    model = tiny.patched(patch)
    model.head = torch.nn.Identity()
    images = torch.randn(2, 3, 16, 16)
    features = load_backbone(expected, preprocessing=tiny.preprocessing).chain(images)
    torch.testing.assert_close(model(images), features, rtol=1e-5, atol=1e-5)


def test_low_rank_updates_exclude_other_added_modules_and_full_fine_tuning(tiny: Backbone) -> None:
    for other in (DeltaNetwork(), ScaleBias(layers="channel"), confine(ScaleBias(layers="channel"), ["stage2"])):
        with pytest.raises(
            MethodError, match=f"lora and {other.name} both add modules to segment .* Name other blocks"
        ):
            (LoRA() + other).blueprint(tiny)
    resnet = make_timm("resnet18", 32)
    with pytest.raises(MethodError, match="lora and pruned both add modules"):
        (LoRA() + Pruned()).blueprint(resnet)
    assert (LoRA(blocks=("layer1",)) + Pruned()).blueprint(resnet).grafts
    with pytest.raises(MethodError, match="already trains everything"):
        LoRA() + FullFinetune()
    with pytest.raises(MethodError, match="holds lora twice"):
        LoRA(blocks=("stage1",)) + LoRA(blocks=("stage2",))


# spelling ---------------------------------------------------------------------------------------------------


def test_methods_are_spelled_with_their_hyperparameters() -> None:
    assert make_method("subset(blocks=[layer3.0,layer4],lr=0.01)") == Subset(blocks=("layer3.0", "layer4"), lr=0.01)
    assert make_method("scale-bias + subset(blocks=stage2)") == ScaleBias() + Subset(blocks=("stage2",))
    assert make_method("piggyback(ternary=true, start=uniform)") == Piggyback(ternary=True, start="uniform")


def test_keywords_say_whose_they_are() -> None:
    made = make_method("scale-bias+subset", **{"subset.blocks": "layer4", "scale-bias.lr": 0.5})
    assert made == ScaleBias(lr=0.5) + Subset(blocks=("layer4",))
    assert make_method("subset", **{"subset.lr": 0.5}) == Subset(lr=0.5)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("lr", r"'lr' names no method of scale-bias\+subset. Say whose it is: scale-bias.lr=... or subset.lr=...$"),
        ("blocks", r"Say whose it is: scale-bias.blocks=... or subset.blocks=...$"),  # any method can be confined
        ("reinitialize", r"Say whose it is: subset.reinitialize=...$"),
        ("delta.lr", r"'delta.lr' names no method .* Say whose it is: scale-bias.lr=... or subset.lr=...$"),
    ],
)
def test_keywords_that_do_not_say_whose_they_are_are_told_how(key: str, problem: str) -> None:
    with pytest.raises(MethodError, match=problem):
        make_method("scale-bias+subset", **{key: "x"})
    with pytest.raises(MethodError, match=problem):
        sweep("scale-bias+subset", key, ["x", "y"])


@pytest.mark.parametrize(
    ("spec", "problem"),
    [("subset(blocks)", "not KEY=VALUE"), ("subset(lr=0.1", "is not a method"), ("+subset", "no method ''")],
)
def test_a_spelling_that_is_none_is_quoted(spec: str, problem: str) -> None:
    with pytest.raises(MethodError, match=problem):
        make_method(spec)


def test_lists_are_split_outside_brackets() -> None:
    assert split_outside("a(b,c), d[e,f],g", ",") == ["a(b,c)", "d[e,f]", "g"]


# strength ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ScaleBias(), Subset(), ScaleBias(layers="channel")], ids=lambda m: str(m)[:30])
def test_additive_patches_have_a_strength(method: ScaleBias | Subset, tiny: Backbone) -> None:
    patch = draft_patch(tiny, method)
    images = torch.randn(2, 3, 16, 16)
    features = torch.nn.Identity()

    def run(strength: float) -> torch.Tensor:
        model = tiny.patched(patch.at_strength(strength))
        model.head = features
        return model(images)

    full = tiny.patched(patch)
    full.head = features
    assert close(run(1.0), full(images))
    assert torch.equal(run(0.0), tiny.chain(images)) or torch.allclose(run(0.0), tiny.chain(images), atol=1e-6)
    assert not torch.allclose(run(0.5), run(1.0))
    assert not torch.allclose(run(0.5), run(0.0))


def test_the_strength_is_in_the_file_and_in_the_content(tiny: Backbone) -> None:
    patch = draft_patch(tiny, ScaleBias())
    half = patch.at_strength(0.5)
    assert decode_patch(encode_patch(half)).strength == 0.5
    assert half.content_hash != patch.content_hash


def test_masks_and_numbers_outside_zero_and_one_have_no_strength(tiny: Backbone) -> None:
    with pytest.raises(PatchError, match="masks do not interpolate"):
        draft_patch(tiny, Piggyback()).at_strength(0.5)
    assert draft_patch(tiny, Piggyback()).at_strength(1).strength == 1
    with pytest.raises(PatchError, match=r"strength is 1.5"):
        draft_patch(tiny, ScaleBias()).at_strength(1.5)


def test_members_start_as_they_are_told_to(tiny: Backbone) -> None:
    """A Δ-module that starts near the frozen network gives every sample the same weights."""
    for method in (DeltaNetwork(start="identity"), DeltaNetwork(start="identity") + ScaleBias()):
        (record,) = skip_weights(method.draft(tiny, 3), torch.randn(2, 3, 16, 16))
        near = torch.tensor([float(existing) for existing in record.existing])
        assert torch.allclose(record.weights, torch.sigmoid(8 * near - 4).expand(2, -1))


# a network that is trained as a whole -----------------------------------------------------------------------


def test_modules_can_go_into_a_network_that_is_trained_as_a_whole(tiny: Backbone) -> None:
    both = FullFinetune(lr=1e-4) + DeltaNetwork(modules=2, lr=1e-2)
    model = both.draft(tiny, 3)
    names = {name for name, _ in model.trainable()}
    whole = {name for name, _ in FullFinetune().draft(tiny, 3).trainable()}
    added = {name for name, _ in DeltaNetwork(modules=2).draft(tiny, 3).trainable()}
    assert names == whole | added
    rates = {
        name: group["lr"]
        for group in both.parameter_groups(model, tiny)
        for name, parameter in model.trainable()
        if any(parameter is one for one in group["params"])
    }
    assert {rates[name] for name in names if name.startswith("replace/")} == {1e-4}
    assert {rates[name] for name in names if name.startswith("graft/")} == {1e-2}
    with pytest.raises(MethodError, match="already trains everything"):
        FullFinetune() + DeltaNetwork() + ScaleBias()


def test_a_network_trained_as_a_whole_starts_as_the_base_if_its_skips_do(tiny: Backbone) -> None:
    """With λ near 1 and 0 the drafted body computes nearly what the base does; with random ones it does not."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    base = tiny.chain(images).flatten(1)
    near, far = (
        (FullFinetune() + DeltaNetwork(modules=2, start=start)).draft(tiny, 3).head_input(images, 0).flatten(1)  # type: ignore[arg-type]
        for start in ("identity", "random")
    )
    assert (near - base).norm() < 0.3 * (far - base).norm()


def test_a_confined_member_leaves_another_its_own_head(tiny: Backbone) -> None:
    both = confine(ScaleBias(), ["stage2"]) + Head2Toe()
    assert type(both.make_head(tiny, 3)) is type(Head2Toe().make_head(tiny, 3))
    assert type(both.make_head(tiny, 3)) is not type(ScaleBias().make_head(tiny, 3))


def test_optimizers_of_their_own_kind_go_with_themselves_only() -> None:
    assert (ScaleBias(optimizer="rmsprop") + Subset(optimizer="rmsprop")).optimizer == "rmsprop"
    with pytest.raises(MethodError, match="optimizers must agree, but are adamw and rmsprop"):
        ScaleBias(optimizer="rmsprop") + Subset()
