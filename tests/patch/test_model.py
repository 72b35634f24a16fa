"""A patch on its backbone: two ways to run it, one answer, and a base that nothing moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import TinyNet, draft_patch, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, ModelpatchError, PatchError, UnknownGraftError, WrongBackboneError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.blueprint import Blueprint, Graft, register_graft
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.patch.model import PatchedModel
from tolerance import close

METHODS = [
    LinearProbe(),
    ScaleBias(),
    ScaleBias(statistics="learned"),
    ScaleBias(layers="channel"),
    Subset(),
    FullFinetune(),
]
Binder = Callable[[Backbone, Patch], object]
both_ways = pytest.mark.parametrize("bind", [PatchedModel, BoundPatch])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Shift(nn.Module):
    """A test's own addition: the variant, then one number per channel."""

    def __init__(self, variant: nn.Module, channels: int) -> None:
        super().__init__()
        self.variant = variant
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.variant(x) + self.shift.view(-1, 1, 1)


@pytest.fixture
def shift(registries: None) -> str:
    register_graft("test-shift")(Shift)
    return "test-shift"


def grafted(backbone: Backbone, *grafts: Graft, **tensors: Tensor) -> Patch:
    """A linear probe with grafts; `tensors` under `start_end`."""
    patch = draft_patch(backbone)
    named = {f"graft/{span.replace('_', '-')[1:]}/shift": tensor for span, tensor in tensors.items()}
    return replace(patch, grafts=grafts, tensors={**patch.tensors, **named})


# the two ways agree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_bound_patch_answers_like_the_patched_model(method: Method, tiny: Backbone, images: Tensor) -> None:
    patch = draft_patch(tiny, method)
    model = tiny.patched(patch)
    expected = model(images)
    assert expected.shape == (5, 3)
    assert not expected.requires_grad
    assert close(BoundPatch(tiny, patch)(images), expected)
    assert close(tiny.patched(decode_patch(encode_patch(patch)))(images), expected)
    tiny.verify()


def test_a_linear_probe_is_the_head_over_the_chain(tiny: Backbone, images: Tensor) -> None:
    patch = draft_patch(tiny)
    features = tiny.chain(images)
    expected = torch.nn.functional.linear(features, patch.tensors["head.weight"], patch.tensors["head.bias"])
    assert close(BoundPatch(tiny, patch)(images), expected)


def test_a_patched_model_holds_the_patchs_numbers_and_the_backbones_own_bytes(tiny: Backbone) -> None:
    patch = draft_patch(tiny, ScaleBias())
    model = tiny.patched(patch)
    assert model.tensors().keys() == patch.tensors.keys()
    assert all(torch.equal(tensor, patch.tensors[name]) for name, tensor in model.tensors().items())
    frozen = {parameter.data_ptr() for parameter in tiny.module.parameters()}
    own = [p for p in model.parameters() if p.data_ptr() not in frozen]
    assert sum(p.numel() for p in own) == sum(tensor.numel() for tensor in patch.tensors.values())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_running_from_the_first_patched_segment_equals_running_the_whole(tiny: Backbone, images: Tensor) -> None:
    patch = draft_patch(tiny, Subset())
    model = tiny.patched(patch)
    prefix = tiny.chain.run(images, 0, model.first)
    assert 0 < model.first == model.spans[0][0] < len(tiny.chain)
    assert close(model.run_from(prefix, model.first), model(images))


def test_a_patch_with_nothing_but_a_head_starts_after_the_chain(tiny: Backbone) -> None:
    model = tiny.patched(draft_patch(tiny))
    assert model.spans == ()
    assert model.variants == ()
    assert model.first == len(tiny.chain)


def test_patches_of_one_structure_and_any_head_width_share_one_template(tiny: Backbone, images: Tensor) -> None:
    patches = [draft_patch(tiny, ScaleBias(), classes=2 + seed, seed=seed) for seed in range(4)]
    expected = [tiny.patched(patch)(images) for patch in patches]
    bound = [BoundPatch(tiny, patch) for patch in patches]
    assert len({id(one.structure) for one in bound}) == 1
    for _ in range(2):  # a call must not leave its numbers behind for the next
        assert all(close(b(images), logits) for b, logits in zip(bound, expected, strict=True))
    assert BoundPatch(tiny, draft_patch(tiny)).structure is not bound[0].structure


def test_a_bound_patch_costs_its_own_numbers_in_float32_on_whole_cache_lines(tiny: Backbone) -> None:
    for patch in (draft_patch(tiny, ScaleBias()), draft_patch(tiny, ScaleBias()).astype("float16")):
        lines = sum(math.ceil(4 * tensor.numel() / 64) for tensor in patch.tensors.values())
        assert BoundPatch(tiny, patch).nbytes == 64 * lines


def test_half_precision_patches_compute_in_float32(tiny: Backbone, images: Tensor) -> None:
    half = draft_patch(tiny, ScaleBias()).astype("float16")
    wide = replace(half, tensors={name: tensor.float() for name, tensor in half.tensors.items()})
    expected = tiny.patched(wide)(images)
    assert expected.dtype == torch.float32
    assert close(tiny.patched(half)(images), expected)
    assert close(BoundPatch(tiny, half)(images), expected)


def test_threads_get_the_answers_that_one_thread_gets(tiny: Backbone, images: Tensor) -> None:
    patches = [draft_patch(tiny, ScaleBias(), classes=2 + seed, seed=seed) for seed in range(3)]
    bound = [BoundPatch(tiny, patch) for patch in patches]
    expected = [b(images) for b in bound]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: bound[i % 3](images), range(60)))
    assert all(close(answer, expected[i % 3]) for i, answer in enumerate(answers))


# the base stays what it is ----------------------------------------------------------------------------------


def to_double(model: PatchedModel, images: Tensor) -> None:
    model.double()(images.double())


def to_half_and_back(model: PatchedModel, images: Tensor) -> None:
    model.half().float()


def to_meta(model: PatchedModel, images: Tensor) -> None:
    model.to("meta")


def load_zeros(model: PatchedModel, images: Tensor) -> None:
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})


def to_half_by_parts(model: PatchedModel, images: Tensor) -> None:
    for part in model.parts:
        part.half()


def write_zeros_by_parts(model: PatchedModel, images: Tensor) -> None:
    for part in model.parts:
        for child in filter(None, (part, *part.children())):
            zeros = {name: torch.zeros_like(tensor) for name, tensor in child.state_dict().items()}
            with pytest.raises(ModelpatchError, match="assign=True"):
                child.load_state_dict(zeros)


def run_in_train_mode(model: PatchedModel, images: Tensor) -> None:
    model.train()
    model(images)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "act",
    [to_double, to_half_and_back, to_half_by_parts, to_meta, load_zeros, write_zeros_by_parts, run_in_train_mode],
    ids=lambda act: act.__name__,
)
def test_whatever_is_done_to_a_patched_model_the_backbone_is_unchanged(
    act: Callable[[PatchedModel, Tensor], None], method: Method, tiny: Backbone, images: Tensor
) -> None:
    patch = draft_patch(tiny, method)
    before, logits = copy.deepcopy(tiny.module.state_dict()), tiny(images)
    act(tiny.patched(patch), images)
    tiny.verify()
    after = tiny.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(tiny(images), logits)
    assert not any(module.training for module in tiny.module.modules())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_a_draft_moves_its_own_numbers_only(method: Method, tiny: Backbone, images: Tensor) -> None:
    model = method.draft(tiny, 3).train()
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(model.tensors()[name], before[name]) for name in ("head.weight", "head.bias"))
    assert not any(parameter.grad is not None for parameter in tiny.module.parameters())
    tiny.verify()


def test_loading_a_state_dict_by_copying_is_refused(tiny: Backbone) -> None:
    model = tiny.patched(draft_patch(tiny))
    with pytest.raises(ModelpatchError, match="assign=True"):
        model.load_state_dict(model.state_dict(), assign=False)


def test_a_state_dict_moves_from_one_patched_model_to_another(tiny: Backbone, images: Tensor) -> None:
    first, second = (tiny.patched(draft_patch(tiny, ScaleBias(), seed=seed)) for seed in (1, 2))
    assert not torch.equal(first(images), second(images))
    second.load_state_dict(first.state_dict())
    assert close(first(images), second(images))


# refusals ---------------------------------------------------------------------------------------------------


@both_ways
def test_a_patch_of_other_weights_is_refused_with_the_number_of_segments_that_differ(
    bind: Binder, tiny: Backbone
) -> None:
    patch = draft_patch(tiny, ScaleBias())
    module = copy.deepcopy(tiny.module)
    module.stage2[0].conv1.weight.data[0, 0, 0, 0] += 1
    other = load_backbone(module, preprocessing=tiny.preprocessing)
    with pytest.raises(WrongBackboneError, match=rf"1 of {len(tiny.chain)} segments, 1 of them patched.*'stage2\.0'"):
        bind(other, patch)
    with pytest.raises(WrongBackboneError, match=rf"1 of {len(tiny.chain)} segments, 0 of them patched"):
        bind(other, draft_patch(tiny))


@both_ways
def test_a_patch_of_another_network_is_refused_with_its_length(bind: Binder, tiny: Backbone) -> None:
    shorter = TinyNet()
    shorter.stage2 = nn.Sequential(shorter.stage2[0])
    other = load_backbone(shorter, preprocessing=small_preprocessing())
    with pytest.raises(WrongBackboneError, match=f"{len(tiny.chain)} segments; module:TinyNet has {len(other.chain)}"):
        bind(other, draft_patch(tiny))


@both_ways
def test_a_base_with_another_classifier_is_the_same_base(bind: Binder, tiny: Backbone, images: Tensor) -> None:
    module = copy.deepcopy(tiny.module)
    module.fc = nn.Linear(16, 9)
    patch = draft_patch(tiny, ScaleBias())
    other = load_backbone(module, preprocessing=tiny.preprocessing)
    assert close(bind(other, patch)(images), bind(tiny, patch)(images))


def without_one(tensors: dict[str, Tensor]) -> None:
    tensors.pop("head.bias")


def with_one_more_in_the_head(tensors: dict[str, Tensor]) -> None:
    tensors["head.scale"] = torch.zeros(3)


def with_one_of_no_module(tensors: dict[str, Tensor]) -> None:
    tensors["replace/stage9.0.bn1.weight"] = torch.zeros(8)


def with_one_of_the_classifier(tensors: dict[str, Tensor]) -> None:
    tensors["replace/fc.weight"] = torch.zeros(5, 16)


def with_a_mask(tensors: dict[str, Tensor]) -> None:
    tensors["mask/stage1.0.conv1.weight"] = torch.zeros(8, 1, 3, 3)


def with_a_graft_of_nothing(tensors: dict[str, Tensor]) -> None:
    tensors["graft/0-1/scale"] = torch.zeros(8)


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["replace/stage1.0.bn1.weight"] = torch.zeros(7)


def with_a_shape_that_would_broadcast(tensors: dict[str, Tensor]) -> None:
    tensors["replace/stage1.0.bn1.weight"] = torch.zeros(1)


def with_a_head_of_other_width(tensors: dict[str, Tensor]) -> None:
    tensors["head.bias"] = torch.zeros(4)


@both_ways
@pytest.mark.parametrize(
    "edit",
    [
        without_one,
        with_one_more_in_the_head,
        with_one_of_no_module,
        with_one_of_the_classifier,
        with_a_mask,
        with_a_graft_of_nothing,
        with_another_shape,
        with_a_shape_that_would_broadcast,
        with_a_head_of_other_width,
    ],
    ids=lambda edit: edit.__name__,
)
def test_tensors_that_do_not_fit_the_backbone_are_refused(
    edit: Callable[[dict[str, Tensor]], None], bind: Binder, tiny: Backbone, images: Tensor
) -> None:
    patch = draft_patch(tiny, ScaleBias())
    good = bind(tiny, patch)
    expected = good(images)
    tensors = dict(patch.tensors)
    edit(tensors)
    with pytest.raises(ForeignTensorError):
        bind(tiny, replace(patch, tensors=tensors))
    assert torch.equal(good(images), expected)
    tiny.verify()


@both_ways
def test_a_kind_of_graft_that_is_not_installed_is_refused_with_those_that_are(bind: Binder, tiny: Backbone) -> None:
    patch = grafted(tiny, Graft(kind="from-the-future", start=0, end=1))
    with pytest.raises(UnknownGraftError, match=r"from-the-future.*channel-affine"):
        bind(tiny, patch)


@both_ways
def test_a_graft_spans_several_segments(bind: Binder, shift: str, tiny: Backbone, images: Tensor) -> None:
    moved = torch.randn(tiny.chain[2].output_shape[0])
    graft = Graft(kind=shift, start=1, end=3, arguments={"channels": len(moved)})
    patch = grafted(tiny, graft, _1_3=moved)
    x = tiny.chain.run(images, 0, 3) + moved.view(-1, 1, 1)
    features = tiny.chain.run(x, 3, len(tiny.chain))
    expected = torch.nn.functional.linear(features, patch.tensors["head.weight"], patch.tensors["head.bias"])
    assert close(bind(tiny, patch)(images), expected)
    assert PatchedModel(tiny, patch).spans == ((1, 3),)


@both_ways
def test_spans_that_overlap_are_refused(bind: Binder, shift: str, tiny: Backbone) -> None:
    grafts = (Graft(kind=shift, start=0, end=3), Graft(kind=shift, start=2, end=4))
    with pytest.raises(ForeignTensorError, match=r"\[0, 3\) and \[2, 4\) overlap"):
        bind(tiny, grafted(tiny, *grafts))


@both_ways
def test_a_span_beyond_the_chain_is_refused(bind: Binder, shift: str, tiny: Backbone) -> None:
    end = len(tiny.chain) + 1
    with pytest.raises(ForeignTensorError, match=f"up to {end}; the backbone has {len(tiny.chain)}"):
        bind(tiny, grafted(tiny, Graft(kind=shift, start=0, end=end)))


@both_ways
@pytest.mark.parametrize(
    "arguments", [{"layers": ["no.such.layer"]}, {"layers": 7}, {"nonsense": 1}, {"layers": ["bn1"]}]
)
def test_a_graft_whose_arguments_do_not_fit_the_backbone_is_refused(
    arguments: dict[str, object], bind: Binder, tiny: Backbone
) -> None:
    patch = grafted(tiny, Graft(kind="channel-affine", start=2, end=3, arguments=arguments))
    with pytest.raises(ForeignTensorError):
        bind(tiny, patch)


def test_two_backbones_do_not_share_a_template() -> None:
    first, second = make_tiny(0), make_tiny(0)
    patch = draft_patch(first)
    assert BoundPatch(first, patch).structure is not BoundPatch(second, patch).structure


# a loop of the user's own ---------------------------------------------------------------------------------------


def train_by_hand(model: PatchedModel, steps: int = 3) -> None:
    """A plain loop, as a user would write it, over random images and classes."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        images = torch.randn(6, *model.backbone.input_size, generator=generator)
        loss = nn.functional.cross_entropy(model(images), torch.arange(6) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_loop_of_ones_own_moves_no_statistic_that_the_patch_does_not_store(method: Method) -> None:
    backbone = make_tiny()
    model = method.draft(backbone, 3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train_by_hand(model)
    own = set(model.names.values())
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    learned = {name for name in own if name.endswith(("running_mean", "running_var"))}
    assert {name for name in moved if not name.endswith("num_batches_tracked")} == learned
    assert bool(learned) == model.learned_statistics
    backbone.verify()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_model_that_was_trained_by_hand_becomes_a_patch_with_the_same_answers(method: Method) -> None:
    backbone = make_tiny()
    model = method.draft(backbone, 3)
    train_by_hand(model)
    patch = model.to_patch(("by hand", ["a", "b", "c"]), method=method, metrics={"top1": 0.5}, created={"seconds": 3})
    loaded = decode_patch(encode_patch(patch))
    images = torch.randn(4, *backbone.input_size)
    with torch.no_grad():
        assert torch.equal(backbone.patched(loaded)(images), model(images))
    assert (loaded.task.classes, loaded.method.name) == (("a", "b", "c"), method.name)
    assert (dict(loaded.metrics), dict(loaded.created)) == ({"top1": 0.5}, {"seconds": 3})
    assert loaded.preprocessing == backbone.preprocessing


def test_a_patch_can_be_bound_trained_on_and_stored_again(tiny: Backbone) -> None:
    model = tiny.patched(draft_patch(tiny, ScaleBias()))
    model.requires_grad_(True)
    train_by_hand(model)
    patch = model.to_patch(draft_patch(tiny).task)
    images = torch.randn(4, *tiny.input_size)
    with torch.no_grad():
        assert torch.equal(tiny.patched(patch)(images), model(images))
    assert patch.method.name == "custom"


def test_a_model_that_no_file_could_hold_is_refused(tiny: Backbone) -> None:
    model = PatchedModel.draft(tiny, Blueprint(), nn.Linear(tiny.chain.feature_dim, 3))
    with pytest.raises(PatchError, match=r"a Linear, has no record"):
        model.to_patch(("a", ["x", "y", "z"]))
    weak = tiny.patched(draft_patch(tiny, ScaleBias(layers="channel")).at_strength(0.5))
    with pytest.raises(PatchError, match=r"strength 0\.5"):
        weak.to_patch(("a", ["x", "y", "z"]))
    with pytest.raises(PatchError, match="not a task"):
        ScaleBias().draft(tiny, 3).to_patch(3)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="two classes are named 'x'"):
        ScaleBias().draft(tiny, 3).to_patch(("a", ["x", "x", "z"]))
    with pytest.raises(PatchError, match="method is 7"):
        ScaleBias().draft(tiny, 3).to_patch(("a", ["x", "y", "z"]), method=7)


def test_a_model_whose_frozen_parameters_were_unfrozen_makes_no_patch() -> None:
    backbone = make_tiny()
    model = ScaleBias().build(backbone, 3)
    for parameter in model.parameters():
        parameter.requires_grad = True
    train_by_hand(model)
    with pytest.raises(PatchError, match=r"of the backbone's tensors require gradients in this model, first parts\."):
        model.to_patch(("a", ["x", "y", "z"]))


def test_a_copy_of_a_model_has_tensors_of_its_own_and_the_same_backbone(tiny: Backbone) -> None:
    model = ScaleBias().draft(tiny, 3)
    twin = copy.deepcopy(model)
    assert twin.backbone is tiny
    train_by_hand(twin)
    assert not any(
        torch.equal(twin.tensors()[name], tensor) for name, tensor in model.tensors().items() if "weight" in name
    )


def test_a_patch_has_an_output_for_each_class(tiny: Backbone) -> None:
    with pytest.raises(PatchError, match="the head has 3 outputs for 2 classes of 'pets'"):
        ScaleBias().build(tiny, 3).to_patch(("pets", ["cat", "dog"]))
