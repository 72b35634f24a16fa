"""Fine-tuned subsets: what names of blocks mean, what is owned, what moves."""

from __future__ import annotations

import pytest
import torch

from conftest import make_timm
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.task import Task
from modelpatch.errors import MethodError
from modelpatch.methods.blocks import find_segments
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.lora import LoRA
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.train import fit


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return make_timm("resnet18", 32)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["last"], ["layer4.1"]),
        (["layer2.0"], ["layer2.0"]),
        (["layer2"], ["layer2.0", "layer2.1"]),
        (["stage0"], ["layer1.0", "layer1.1"]),
        (["stage-1"], ["layer4.0", "layer4.1"]),
        (["layer3.1", "stage0", "layer3", "last"], ["layer1.0", "layer1.1", "layer3.0", "layer3.1", "layer4.1"]),
    ],
)
def test_names_mean_segments_prefixes_stages_or_the_last_block(
    resnet: Backbone, names: list[str], found: list[str]
) -> None:
    assert [segment.name for segment in find_segments(resnet, names)] == found


def test_names_of_the_network_come_before_the_word_stage(tiny: Backbone) -> None:
    assert [segment.name for segment in find_segments(tiny, ["stage2"])] == ["stage2.0", "stage2.1"]
    assert [segment.name for segment in find_segments(tiny, ["stage0"])] == ["stage1.0", "stage1.1"]


def test_a_prefix_ends_at_a_dot(resnet: Backbone) -> None:
    with pytest.raises(MethodError, match=r"'layer' names no block .* Its blocks: layer1\.0, .*layer4\.1"):
        find_segments(resnet, ["layer"])


@pytest.mark.parametrize("name", ["stage4", "stage-5"])
def test_a_stage_that_does_not_exist_is_an_error_that_counts_them(resnet: Backbone, name: str) -> None:
    with pytest.raises(MethodError, match="stages 0 to 3"):
        find_segments(resnet, [name])


def test_a_subset_owns_all_parameters_of_its_blocks_and_only_learned_statistics(resnet: Backbone) -> None:
    block = resnet.chain.blocks[-1]
    frozen, learned = (Subset(statistics=kind).blueprint(resnet).owned for kind in ("frozen", "learned"))
    assert set(frozen) == {block.tensor_names[name] for name, _ in block.module.named_parameters()}
    assert {name.rpartition(".")[2] for name in set(learned) - set(frozen)} == {"running_mean", "running_var"}
    assert Subset().count_parameters(resnet) == block.parameters


def test_blocks_need_no_keyword(resnet: Backbone) -> None:
    assert Subset("layer4") == Subset(("layer4",)) == Subset(blocks=("layer4",))  # type: ignore[arg-type]
    assert Subset("layer3.1, layer4").blocks == LoRA("layer3.1, layer4").blocks == ("layer3.1", "layer4")  # type: ignore[arg-type]
    both = ScaleBias() + Subset("layer4")  # type: ignore[arg-type]
    expected = {*Subset(blocks=("layer4",)).blueprint(resnet).owned, *ScaleBias().blueprint(resnet).owned}
    assert set(both.blueprint(resnet).owned) == expected
    with pytest.raises(MethodError, match=r"subset: blocks = 0.01 is not valid"):
        Subset(0.01)  # type: ignore[arg-type]


def test_only_the_named_blocks_and_the_head_move(tiny: Backbone, colors: Task) -> None:
    patch = fit(tiny, colors, Subset(statistics="learned"), epochs=1)
    base = {**dict(tiny.module.named_parameters()), **dict(tiny.module.named_buffers())}
    last = tiny.chain.blocks[-1].name
    for name, tensor in patch.tensors.items():
        if not name.startswith("head."):
            name = name.removeprefix("replace/")
            assert name.startswith(last)
            assert not torch.equal(tensor, base[name]), name


def test_batch_norm_outside_the_blocks_keeps_the_backbones_statistics(tiny: Backbone) -> None:
    method = Subset(statistics="learned")
    model = method.draft(tiny, 3)
    model.train()
    training = {name for name, module in model.named_modules() if "bn" in name and module.training}
    assert training
    assert all(name.startswith(f"parts.{model.starts.index(model.first)}.") for name in training)


def test_full_finetuning_owns_every_parameter_before_the_classifier(tiny: Backbone) -> None:
    everything = {name for name, _ in tiny.module.named_parameters() if not name.startswith("fc.")}
    assert set(FullFinetune().blueprint(tiny).owned) == everything
    buffers = {n for n, _ in tiny.module.named_buffers() if n.endswith(("running_mean", "running_var"))}
    assert set(FullFinetune(statistics="learned").blueprint(tiny).owned) == everything | buffers


def test_reinitialized_blocks_start_at_random_values_and_keep_frozen_statistics(tiny: Backbone) -> None:
    method = Subset(blocks=("stage2.1",), reinitialize=True)
    drafts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drafts.append(method.draft(tiny, 3).tensors())
    name = "replace/stage2.1.conv2.weight"
    assert torch.equal(drafts[0][name], drafts[1][name])
    assert not torch.equal(drafts[0][name], drafts[2][name])
    assert not torch.equal(drafts[0][name], tiny.chain.tensor("stage2.1.conv2.weight"))
    assert torch.equal(drafts[0]["replace/stage2.1.bn1.weight"], torch.ones(16))
    part = method.draft(tiny, 3).variants[0]
    assert torch.equal(part.bn1.running_mean, tiny.chain.tensor("stage2.1.bn1.running_mean"))
    tiny.verify()


def test_reinitialized_learned_statistics_start_anew(tiny: Backbone) -> None:
    tensors = Subset(blocks=("stage2.1",), statistics="learned", reinitialize=True).draft(tiny, 3).tensors()
    assert torch.equal(tensors["replace/stage2.1.bn1.running_mean"], torch.zeros(16))
