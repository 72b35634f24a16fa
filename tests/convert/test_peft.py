"""PEFT's folder format: both ways, against PEFT's own models, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import modelpatch as mp
from conftest import CLIP_MODELS, Library, TinyNet, draft_patch, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.convert.peft import PICKLE, WEIGHTS, export_peft, import_peft
from modelpatch.convert.peft_config import CONFIG, match_within
from modelpatch.errors import (
    ForeignTensorError,
    InvalidPatchError,
    MissingExtraError,
    ModelpatchError,
    NonFiniteTensorError,
    NotAPatchError,
    PatchError,
    WrongBackboneError,
)
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.tasks.record import TaskRecord

pytestmark = pytest.mark.slow
peft = Library("peft")

TASK = TaskRecord(name="draft", classes=("class 0", "class 1", "class 2"))
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "tiny": make_tiny,
    "resnet18": lambda: make_timm("resnet18", 32),
    "vit_tiny": lambda: make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=3),
}


def make_attention() -> Backbone:
    """Torchvision's vision transformer, whose attention is `nn.MultiheadAttention`."""
    torch.manual_seed(0)
    module = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=3)
    return load_backbone(module, preprocessing=small_preprocessing(32))


MORE_BACKBONES = BACKBONES | {"attention": make_attention}


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return BACKBONES[request.param]()


def base_model(backbone: Backbone, classes: int = 3) -> nn.Module:
    """A copy of the base with a fresh classifier of the task's size, as a user of PEFT would make it."""
    module = copy.deepcopy(backbone.module)
    assert backbone.classifier
    owner, _, leaf = backbone.classifier.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Linear(backbone.chain.feature_dim, classes))
    return module.eval()


def adapted_by_peft(backbone: Backbone, folder: Path, classes: int = 3, **config: Any) -> nn.Module:
    """A model that PEFT adapted and filled with random numbers; saved in `folder`."""
    model = peft.get_peft_model(base_model(backbone, classes), peft.LoraConfig(**config)).eval()
    torch.manual_seed(1)
    move_what_is_trained(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def move_what_is_trained(model: nn.Module) -> None:
    """Add random numbers to updates, trained biases and modules to save."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def images_for(backbone: Backbone) -> Tensor:
    return torch.randn(3, *backbone.input_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(backbone: Backbone, patch: Patch, model: nn.Module) -> None:
    images = images_for(backbone)
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model  # one of a task type asks for words
    torch.testing.assert_close(backbone.patched(patch)(images), inner(images), rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tiny: Backbone, tmp_path: Path) -> Path:
    return export_peft(draft_patch(tiny, LoRA(rank=2)), tiny, tmp_path / "adapter")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


# both ways ------------------------------------------------------------------------------------------------------


def test_peft_computes_the_logits_of_an_exported_patch(backbone: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(backbone, LoRA(rank=4))
    assert export_peft(patch, backbone, tmp_path / "new" / "adapter") == tmp_path / "new" / "adapter"
    model = peft.PeftModel.from_pretrained(base_model(backbone), tmp_path / "new" / "adapter")
    assert_same_logits(backbone, patch, model)


@pytest.mark.parametrize("name", ["tiny", "vit_tiny"])
@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}], ids=str)
def test_variants_go_both_ways(name: str, options: dict[str, bool], tmp_path: Path) -> None:
    backbone = BACKBONES[name]()
    drawn = draft_patch(backbone, LoRA(rank=4, **options))
    patch = replace(
        drawn, tensors={name: 0.2 * tensor for name, tensor in drawn.tensors.items()}
    )  # as small as trained ones
    model = peft.PeftModel.from_pretrained(base_model(backbone), export_peft(patch, backbone, tmp_path))
    assert_same_logits(backbone, patch, model)
    back = import_peft(tmp_path, backbone, TASK)
    assert back.content_hash == patch.content_hash
    assert back.method.hyperparameters == {"rank": 4, "scale": 16, **options}
    model.merge_adapter()
    assert_same_logits(backbone, patch, model)


def test_dora_has_no_strength_in_peft(tiny: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(tiny, LoRA(rank=4, dora=True))
    with pytest.raises(PatchError, match=r"no strength for DoRA: the patch's is 0\.5"):
        export_peft(patch.at_strength(0.5), tiny, tmp_path)


def test_the_strength_goes_into_the_folder(backbone: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(backbone, LoRA(rank=4)).at_strength(0.5)
    model = peft.PeftModel.from_pretrained(base_model(backbone), export_peft(patch, backbone, tmp_path / "half"))
    assert_same_logits(backbone, patch, model)
    with pytest.raises(PatchError, match="strength 0"):
        export_peft(patch.at_strength(0), backbone, tmp_path / "nothing")


def test_the_files_are_those_that_peft_itself_would_write(backbone: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(backbone, LoRA(rank=4, blocks=("last",)))
    export_peft(patch, backbone, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(base_model(backbone), tmp_path / "ours")
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / writer / WEIGHTS) for writer in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]


def test_an_exported_patch_comes_back_as_it_was(backbone: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(backbone, LoRA(rank=4, scale=5.5))
    back = import_peft(export_peft(patch, backbone, tmp_path), backbone, TASK)
    assert back.grafts == patch.grafts
    assert back.tensors.keys() == patch.tensors.keys()
    assert all(torch.equal(tensor, patch.tensors[name]) for name, tensor in back.tensors.items())
    assert back.content_hash == patch.content_hash
    assert back.method.hyperparameters == {"rank": 4, "scale": 5.5}
    assert back.preprocessing == backbone.preprocessing


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tiny", {"r": 4, "lora_alpha": 12, "target_modules": ["conv2", "stem.0"], "lora_dropout": 0.3}),
        ("tiny", {"r": 16, "target_modules": ["conv1"]}),  # depthwise: the rank is a multiple of the groups
        ("tiny", {"r": 4, "target_modules": r"stage\d\.1\.conv2", "init_lora_weights": "gaussian"}),
        ("resnet18", {"r": 2, "target_modules": ["conv1", "downsample.0"]}),
        ("tiny", {"r": 4, "target_modules": ["conv2", "stem.0"], "use_rslora": True}),
        ("tiny", {"r": 4, "target_modules": ["conv2", "stem.0"], "use_dora": True}),
        ("vit_tiny", {"r": 4, "lora_alpha": 6, "target_modules": ["qkv", "fc1"], "use_dora": True, "use_rslora": True}),
        ("vit_tiny", {"r": 4, "target_modules": ["qkv"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"}),
        ("vit_tiny", {"r": 4, "target_modules": ["qkv", "fc1", "fc2"], "exclude_modules": ["blocks.1.mlp.fc1"]}),
        ("vit_tiny", {"r": 4, "target_modules": ["qkv", "fc1"], "rank_pattern": {"fc1": 2, r"0\.attn\.qkv": 3}}),
        ("vit_tiny", {"target_modules": ["qkv", "fc1"], "alpha_pattern": {"^blocks.1.*": 3}, "use_rslora": True}),
        ("vit_tiny", {"target_modules": ["qkv"], "bias": "all", "task_type": "FEATURE_EXTRACTION"}),
        ("vit_tiny", {"target_modules": ["qkv", "proj"], "bias": "lora_only", "use_dora": True}),
        ("vit_tiny", {"target_modules": r"blocks\.\d\.mlp\.fc[12]", "lora_bias": True}),
        ("vit_tiny", {"target_modules": ["qkv"], "save": ["norm", "patch_embed", "norm2"], "bias": "all"}),
        ("tiny", {"r": 4, "target_modules": ["conv2"], "save": ["bn1", "stem"]}),
        ("tiny", {"r": 4, "target_modules": ["conv2"], "bias": "all"}),
        ("vit_tiny", {"r": 4, "target_modules": ["fc2"], "init_lora_weights": "orthogonal"}),
        ("attention", {"r": 3, "target_modules": ["self_attention"], "use_rslora": True}),
        ("attention", {"r": 2, "target_modules": ["self_attention", "mlp.0"], "bias": "all", "save": ["ln_2"]}),
        ("attention", {"r": 2, "target_modules": ["self_attention"], "bias": "lora_only", "alpha_pattern": {".*": 3}}),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_folder_that_peft_wrote_is_imported(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    backbone = MORE_BACKBONES[name]()
    assert backbone.classifier
    saved = [backbone.classifier, *config.pop("save", [])]
    model = adapted_by_peft(backbone, tmp_path, modules_to_save=saved, **config)
    patch = import_peft(tmp_path, backbone, TASK)
    assert_same_logits(backbone, patch, model)
    path = patch.save(tmp_path / "patch.safetensors")
    assert_same_logits(backbone, Patch.load(path), model)
    again = peft.PeftModel.from_pretrained(base_model(backbone), export_peft(patch, backbone, tmp_path / "again"))
    assert_same_logits(backbone, patch, again)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "bias": "all"}], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny", "attention"])
def test_an_updated_classifier_becomes_the_head(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    backbone = MORE_BACKBONES[name]()
    own = len(backbone.module.get_submodule(str(backbone.classifier)).weight)  # type: ignore[arg-type]
    config = {"r": 2, "target_modules": ["fc1", "mlp.0", "head"], "lora_alpha": 4, **options}
    model = peft.get_peft_model(copy.deepcopy(backbone.module), peft.LoraConfig(**config)).eval()
    move_what_is_trained(model)
    model.save_pretrained(tmp_path)
    patch = import_peft(tmp_path, backbone, TaskRecord(name="own", classes=tuple(map(str, range(own)))))
    assert_same_logits(backbone, patch, model)


def test_updates_without_effect_are_told_and_left_out(tmp_path: Path) -> None:
    backbone = make_attention()
    model = peft.get_peft_model(
        copy.deepcopy(backbone.module), peft.LoraConfig(r=2, target_modules="all-linear")
    ).eval()
    move_what_is_trained(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 updates are left out.*self_attention\.out_proj\.weight"):
        patch = import_peft(tmp_path, backbone, TASK)
    assert not any("self_attention" in name for name in patch.tensors)
    assert_same_logits(backbone, patch, model)


def test_a_tensor_that_no_patch_can_own_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 1)
    layers = [nn.Conv2d(3, 8, 3, 4), shared, nn.ReLU(), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    backbone = load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())
    adapted_by_peft(backbone, tmp_path, r=2, target_modules=["0"], bias="all", modules_to_save=["6"])
    with pytest.raises(ForeignTensorError, match=r"trains '1\.bias', which no single segment"):
        import_peft(tmp_path, backbone, TASK)


@pytest.mark.parametrize("name", ["vit_tiny", "attention"])
def test_every_option_of_the_method_goes_both_ways(name: str, tmp_path: Path) -> None:
    backbone = MORE_BACKBONES[name]()
    end = "norm1" if name == "vit_tiny" else "ln_1"
    options: dict[str, Any] = {
        "rank_pattern": {"fc1|mlp.0": 2},
        "alpha_pattern": {r".*1\..*": 3.0},
        "bias": "lora_only",
    }
    for method in (LoRA(rank=4, **options, modules_to_save=(end,)), LoRA(rank=4, rslora=True, **options)):
        drawn = draft_patch(backbone, method)
        patch = replace(drawn, tensors={key: 0.2 * tensor for key, tensor in drawn.tensors.items()}).at_strength(0.5)
        folder = export_peft(patch, backbone, tmp_path / str(method.rslora))
        model = peft.PeftModel.from_pretrained(base_model(backbone), folder)
        assert_same_logits(backbone, patch, model)
        assert_same_logits(backbone, import_peft(folder, backbone, TASK), model)


def test_without_a_trained_classifier_the_base_own_is_the_head(tiny: Backbone, tmp_path: Path) -> None:
    model = peft.get_peft_model(copy.deepcopy(tiny.module), peft.LoraConfig(r=2, target_modules=["conv2"])).eval()
    model.save_pretrained(tmp_path)
    patch = import_peft(tmp_path, tiny, TaskRecord(name="five", classes=tuple("abcde")))
    assert torch.equal(patch.tensors["head.weight"], tiny.module.get_submodule("fc").weight)
    assert_same_logits(tiny, patch, model)


def test_half_precision_survives_both_ways(tiny: Backbone, tmp_path: Path) -> None:
    patch = draft_patch(tiny, LoRA()).astype("float16")
    back = import_peft(export_peft(patch, tiny, tmp_path), tiny, TASK)
    assert back.content_hash == patch.content_hash


def test_the_task_may_see_images_at_another_size(tiny: Backbone, folder: Path) -> None:
    other = tiny.preprocessing.with_image_size(24)
    assert import_peft(folder, tiny, TASK, preprocessing=other).preprocessing == other


def test_both_are_public() -> None:
    assert mp.methods.export_peft is export_peft
    assert mp.methods.import_peft is import_peft


# folders that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("target_parameters", ["conv2.weight"]),
        ("an_option_of_a_later_version", 3),
    ],
)
def test_an_option_that_a_patch_does_not_compute_is_refused_by_name(
    tiny: Backbone, folder: Path, option: str, value: Any
) -> None:
    edit_config(folder, **{option: value})
    with pytest.raises(InvalidPatchError, match=f"does not support {option}="):
        import_peft(folder, tiny, TASK)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not valid"),
        ({"r": 0}, "r = 0 is not valid"),
        ({"r": 2**30}, "r = 1073741824 is not valid"),
        ({"lora_alpha": "loud"}, "lora_alpha = 'loud' is not valid"),
        ({"target_modules": None}, "target_modules = None is not valid"),
        ({"target_modules": "nothing"}, "PEFT cannot adapt"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": ["bn1"]}, "PEFT cannot adapt"),
        ({"bias": "some"}, "bias = 'some' is not valid"),
        ({"rank_pattern": {"conv2": 2**30}}, "rank_pattern = 1073741824 is not valid"),
        ({"alpha_pattern": {"(": 2}}, "is no regular expression"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    tiny: Backbone, folder: Path, changes: dict[str, Any], problem: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InvalidPatchError, match=problem):
        import_peft(folder, tiny, TASK)


def test_files_that_cannot_be_read_are_named(tiny: Backbone, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAPatchError, match=rf"is not a PEFT folder: {CONFIG} cannot be read"):
        import_peft(tmp_path / "nowhere", tiny, TASK)
    weights = folder / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-4])
    with pytest.raises(NotAPatchError, match="not a readable safetensors file"):
        import_peft(folder, tiny, TASK)
    weights.unlink()
    with pytest.raises(NotAPatchError, match="not a readable safetensors file"):
        import_peft(folder, tiny, TASK)
    (folder / PICKLE).write_bytes(data)
    with pytest.raises(NotAPatchError, match="is a pickle"):
        import_peft(folder, tiny, TASK)
    (folder / CONFIG).write_text("{")
    with pytest.raises(NotAPatchError, match="not valid JSON"):
        import_peft(folder, tiny, TASK)


KEY = "base_model.model.stage2.1.conv2.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({KEY: None}, ForeignTensorError, f"lacks 1 tensors.*{KEY}"),
        ({"base_model.model.fc.bias": None}, ForeignTensorError, "lacks 1 tensors.*fc.bias"),
        ({"base_model.model.stem.0.weight": torch.ones(1)}, ForeignTensorError, "holds 1 tensors.*stem.0.weight"),
        ({KEY: torch.ones(16, 3, 1, 1)}, ForeignTensorError, r"shape \(16, 3, 1, 1\).*expects \(16, 2, 1, 1\)"),
        ({KEY: torch.full((16, 2, 1, 1), torch.nan)}, NonFiniteTensorError, KEY),
        ({KEY: torch.ones(16, 2, 1, 1, dtype=torch.int32)}, InvalidPatchError, "stored as torch.int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tiny: Backbone, folder: Path, changes: dict[str, Tensor], error: type[Exception], problem: str
) -> None:
    edit_tensors(folder, **changes)
    with pytest.raises(error, match=problem):
        import_peft(folder, tiny, TASK)


def test_a_classifier_for_another_number_of_classes_is_refused(tiny: Backbone, folder: Path) -> None:
    with pytest.raises(ForeignTensorError, match="has 3 outputs; the task 'two' has 2 classes"):
        import_peft(folder, tiny, TaskRecord(name="two", classes=("a", "b")))


def test_a_folder_of_another_base_is_refused_where_it_says_so(tiny: Backbone, folder: Path) -> None:
    with pytest.raises(WrongBackboneError, match="was written for a backbone whose chain"):
        import_peft(folder, make_tiny(seed=1), TASK)
    edit_tensors(folder)  # without our mark, as PEFT writes it
    import_peft(folder, make_tiny(seed=1), TASK)


def test_updates_of_what_a_patch_cannot_hold_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 4), nn.Flatten(2), nn.Conv1d(8, 8, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    backbone = load_backbone(nn.Sequential(*layers, nn.Linear(8, 5)), preprocessing=small_preprocessing())
    adapted_by_peft(backbone, tmp_path, r=2, target_modules=["2"], modules_to_save=["5"])
    with pytest.raises(ForeignTensorError, match=r"first '2' \(Conv1d\)"):
        import_peft(tmp_path, backbone, TASK)


# patches that PEFT's format cannot hold -------------------------------------------------------------------------


def test_only_plain_low_rank_patches_are_exported(tiny: Backbone, tmp_path: Path) -> None:
    updates = draft_patch(tiny, LoRA())
    norms = draft_patch(tiny, ScaleBias())
    weight = {"replace/stage2.1.conv2.weight": tiny.chain.tensor("stage2.1.conv2.weight") + 1}
    both = replace(updates, tensors={**updates.tensors, **weight})
    for patch, problem in [
        (draft_patch(tiny, LinearProbe()), "made by linear-probe, has a head alone"),
        (norms, "made by scale-bias, has replace"),
        (draft_patch(tiny, ScaleBias(layers="channel")), "has channel-affine"),
        (both, r"replaces tensors of 'stage2\.1\.conv2' and adds updates there"),
    ]:
        with pytest.raises(PatchError, match=problem):
            export_peft(patch, tiny, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_updates_of_two_sizes_and_other_tensors_are_exported(tiny: Backbone, tmp_path: Path) -> None:
    first, last = (draft_patch(tiny, LoRA(rank=rank, blocks=(block,))) for rank, block in [(2, "stage1"), (4, "last")])
    norms = draft_patch(tiny, ScaleBias())
    tensors = {**norms.tensors, **first.tensors, **last.tensors}
    patch = replace(first, grafts=first.grafts + last.grafts, tensors=tensors)
    model = peft.PeftModel.from_pretrained(base_model(tiny), export_peft(patch, tiny, tmp_path))
    assert_same_logits(tiny, patch, model)
    assert_same_logits(tiny, import_peft(tmp_path, tiny, TASK), model)


def test_updates_of_two_kinds_are_not_exported(tiny: Backbone, tmp_path: Path) -> None:
    first, last = (draft_patch(tiny, LoRA(dora=dora, blocks=(at,))) for dora, at in [(True, "stage1"), (False, "last")])
    patch = replace(first, grafts=first.grafts + last.grafts, tensors={**first.tensors, **last.tensors})
    with pytest.raises(PatchError, match="some of the patch's updates have dora"):
        export_peft(patch, tiny, tmp_path)


def test_a_patch_of_another_base_is_not_exported(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(WrongBackboneError):
        export_peft(draft_patch(tiny, LoRA()), make_tiny(seed=1), tmp_path)


def test_a_base_whose_classifier_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    backbone = load_backbone(nn.Sequential(*layers, nn.Linear(12, 5, bias=False)), preprocessing=small_preprocessing())
    with pytest.raises(PatchError, match="Expected a linear layer with a bias"):
        export_peft(draft_patch(backbone, LoRA()), backbone, tmp_path)
    features = load_backbone(nn.Sequential(*layers), preprocessing=small_preprocessing())
    with pytest.raises(PatchError, match="is None"):
        export_peft(draft_patch(features, LoRA()), features, tmp_path)


def test_a_module_named_like_the_classifier_is_not_mistaken_for_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TinyNet()
    module.stage2[1].afc = nn.Identity()
    backbone = load_backbone(module, preprocessing=small_preprocessing())
    with pytest.raises(PatchError, match=r"besides the classifier 'fc' it would store stage2\.1\.afc"):
        export_peft(draft_patch(backbone, LoRA()), backbone, tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tiny: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelpatchError, match="cannot make the folder"):
        export_peft(draft_patch(tiny, LoRA()), tiny, tmp_path / "file")


def test_without_peft_the_error_names_the_extra(tiny: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = draft_patch(tiny, LoRA())
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lambda: export_peft(patch, tiny, folder), lambda: import_peft(folder, tiny, TASK)):
        with pytest.raises(MissingExtraError, match=r"PEFT's folder format needs `peft`.*modelpatch\[lora\]"):
            call()


@pytest.mark.parametrize("pattern", ["(a" * 3000, "a{1,99999999999}", "(", "x" * 2**20])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(InvalidPatchError, match="target_modules"):
        match_within(pattern, ["conv1"], "target_modules")


@pytest.mark.parametrize("pattern", ["(((((a|b)*)*)*)*)*!", "(.*)*(.*)*(.*)*x!", r"(a|aa|ab|b)+\1c", "(?:a?b?){60}c"])
def test_an_expression_comes_to_an_end(pattern: str) -> None:
    pytest.importorskip("peft")
    names = [f"stage{n}." + "ab" * 40 for n in range(200)]
    begin = time.process_time()
    with suppress(InvalidPatchError):
        assert match_within(pattern, names, "target_modules") == []
    assert time.process_time() - begin < 10  # seconds, of expressions that would take years
    assert match_within(r"stage[12]\..*", names, "target_modules") == names[1:3]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True, "bias": "lora_only"},
        {"target_modules": "all-linear", "rank_pattern": {"fc1": 3}, "modules_to_save": ["classifier", "layernorm"]},
    ],
    ids=str,
)
def test_a_folder_that_peft_trained_on_a_model_of_transformers_is_imported(
    options: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    base = transformers.ViTForImageClassification(config).eval()
    lora = peft.LoraConfig(**{"r": 2, "modules_to_save": ["classifier"], **options})
    model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    move_what_is_trained(model)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(base)
    patch, images = import_peft(tmp_path, backbone, TASK), images_for(backbone)
    with torch.no_grad():
        torch.testing.assert_close(backbone.patched(patch)(images), model(pixel_values=images).logits)


class Probed(nn.Module):
    """The picture encoder of open_clip under a classifier."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.probe = visual, nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.probe(self.visual(images))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["attn", "c_fc", "c_proj"], "bias": "all"},
        {"target_modules": r".*resblocks\.1\.(attn|mlp\.c_fc)", "use_rslora": True, "rank_pattern": {"c_fc": 3}},
        {"target_modules": ["c_fc"], "use_dora": True, "modules_to_save": ["probe", "ln_post", "conv1"]},
    ],
    ids=str,
)
def test_a_folder_that_peft_trained_on_open_clip_is_imported(
    options: dict[str, Any], clip_models: None, tmp_path: Path
) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    base = Probed(open_clip.create_model(CLIP_MODELS[0]).visual).eval()
    backbone = load_backbone(base, preprocessing=small_preprocessing(32))
    lora = peft.LoraConfig(**{"r": 2, "modules_to_save": ["probe"], **options})
    model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    move_what_is_trained(model)
    model.save_pretrained(tmp_path)
    patch = import_peft(tmp_path, backbone, TASK)
    assert_same_logits(backbone, patch, model)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), export_peft(patch, backbone, tmp_path / "again"))
    assert_same_logits(backbone, patch, again)
