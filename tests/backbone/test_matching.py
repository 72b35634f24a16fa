"""A network is found in a checkpoint under whatever wrapped it, and nothing of it is lost in silence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from conftest import TinyNet, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.matching import find_head, match_states
from modelpatch.backbone.states import find_states
from modelpatch.convert.extraction import extract, read_finetuned
from modelpatch.errors import CheckpointError, CheckpointWarning

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base() -> Backbone:
    return make_tiny()


def tuned(classes: int = 4, seed: int = 1) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(classes)


MODEL = tuned()
STATE: State = MODEL.state_dict()
BODY: State = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Lit(nn.Module):
    """A module of a training framework around the network, with a loss that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.criterion = MODEL, nn.CrossEntropyLoss(weight=torch.ones(4))


class Sequenced(TinyNet):
    def __init__(self) -> None:
        super().__init__(4)
        self.load_state_dict(STATE)
        self.fc = nn.Sequential(nn.Dropout(0.5), self.fc)  # type: ignore[assignment]


HOLDERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: STATE,
    "state_dict": lambda: {"state_dict": STATE, "epoch": 3},
    "timm's train.py": lambda: {
        "epoch": 3,
        "arch": "tiny",
        "state_dict": STATE,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        "version": 2,
        "args": argparse.Namespace(lr=0.1),
        "metric": np.float64(0.5),
    },
    "DDP": lambda: {"state_dict": under("module.")},
    "compiled": lambda: under("_orig_mod."),
    "compiled DDP": lambda: under("module._orig_mod."),
    "compiled within": lambda: {name.replace("stage1.0.", "stage1.0._orig_mod."): t for name, t in STATE.items()},
    "DDP within": lambda: {name.replace("stage1.", "stage1.module."): t for name, t in STATE.items()},
    "checkpointed blocks": lambda: {
        name.replace("stage1.0.", "stage1.0._checkpoint_wrapped_module."): t for name, t in STATE.items()
    },
    "Lightning": lambda: {
        "state_dict": Lit().state_dict(),
        "pytorch-lightning_version": "2.1",
        "hyper_parameters": {"lr": 1},
    },
    "deep": lambda: {"checkpoint": {"weights": {"net": under("net.encoder.backbone.")}}},
    "DeepSpeed": lambda: {"module": STATE, "ds_version": "0.1", "dp_world_size": 1},
    "SWA": lambda: AveragedModel(MODEL).state_dict(),
    "EMA": lambda: AveragedModel(MODEL, multi_avg_fn=get_ema_multi_avg_fn(0.9)).state_dict(),
    "a head in a Sequential": lambda: Sequenced().state_dict(),
    "MMPretrain": lambda: {
        "meta": {"epoch": 1},
        "state_dict": {
            **under("backbone.", BODY),
            "head.fc.weight": STATE["fc.weight"],
            "head.fc.bias": STATE["fc.bias"],
            "data_preprocessor.mean": torch.ones(3),
        },
    },
    "a head beside the encoder": lambda: {
        **under("encoder.", BODY),
        "classifier.weight": STATE["fc.weight"],
        "classifier.bias": STATE["fc.bias"],
    },
    "a head as a convolution": lambda: STATE | {"fc.weight": STATE["fc.weight"][:, :, None, None]},
    "half": lambda: {name: t.half() if t.is_floating_point() else t for name, t in STATE.items()},
    "profiled": lambda: STATE | {"stage1.0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
    "a loss beside it": lambda: STATE | {"criterion.weight": torch.ones(4), "n_averaged": torch.tensor(3)},
}


@pytest.mark.filterwarnings("ignore::modelpatch.errors.CheckpointWarning")
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_network_is_read_from_what_training_scripts_write(holder: str, base: Backbone, tmp_path: Path) -> None:
    torch.save(HOLDERS[holder](), tmp_path / "x.pth")
    state = read_finetuned(base, tmp_path / "x.pth")
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        torch.testing.assert_close(
            state[name], tensor.half() if state[name].dtype == torch.half else tensor, rtol=0, atol=0
        )
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        answers = base.patched(extract(base, tmp_path / "x.pth"))(images)
        torch.testing.assert_close(answers, MODEL.eval()(images), rtol=1e-2, atol=1e-2)


words = st.sampled_from(["module", "model", "net", "encoder", "backbone", "_orig_mod", "wrapped", "a_1", "0"])


@given(prefix=st.lists(words, max_size=4), place=st.lists(words, max_size=3))
def test_any_prefix_in_any_holder_is_found(prefix: list[str], place: list[str]) -> None:
    content: Any = under("".join(f"{word}." for word in prefix)) | {
        "other.weight": torch.ones(1),
        "epoch": torch.tensor(1),
    }
    for word in place:
        content = {word: content, "lr": 0.1}
    own = {name: tensor.shape for name, tensor in STATE.items()}
    match = match_states(find_states(content), own, BODY, "fc", network="tiny")
    assert equal(match.tensors, STATE)
    assert match.foreign == ("epoch", "other.weight")


def test_what_is_left_out_is_listed(base: Backbone) -> None:
    with pytest.warns(CheckpointWarning, match=r"left out .*criterion\.weight, n_averaged\."):
        extract(base, under("model.") | {"criterion.weight": torch.ones(4), "n_averaged": torch.tensor(1)})


def shifted(by: float) -> State:
    return {name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("content", "read", "other"),
    [
        ({"state_dict": STATE, "state_dict_ema": shifted(1)}, 1, "state_dict"),
        ({"model": STATE, "model_ema": under("module.", shifted(1))}, 1, "model"),
        ({"student": STATE, "teacher": shifted(1)}, 1, "student"),
        ({**under("student.backbone."), **under("teacher.backbone.", shifted(1))}, 1, r"student\.backbone"),
        ({**under("online."), **under("ema_model.", shifted(1))}, 1, "online"),
        ({**under("base_encoder."), **under("momentum_encoder.", shifted(1))}, 0, "momentum_encoder"),
        ({**under("encoder_q."), **under("encoder_k.", shifted(1))}, 0, "encoder_k"),
    ],
)
def test_of_several_networks_the_average_is_read_and_the_other_told(
    content: dict[str, Any], read: float, other: str, base: Backbone
) -> None:
    with pytest.warns(CheckpointWarning, match=f"several networks: .* is read, not '{other}'"):
        state = read_finetuned(base, content)
    assert equal(state, shifted(read))


def test_a_part_is_read_by_its_name(base: Backbone) -> None:
    content = {"state_dict": STATE, "state_dict_ema": under("module.", shifted(1))}
    with pytest.warns(CheckpointWarning):
        assert equal(read_finetuned(base, content), shifted(1))
    assert equal(read_finetuned(base, content, part="state_dict"), STATE)
    assert equal(read_finetuned(base, content, part="state_dict_ema"), shifted(1))
    with pytest.raises(
        CheckpointError, match=r"at 'state_dict_em'\. Did you mean 'state_dict_ema.*'\?.* at: 'state_dict'"
    ):
        read_finetuned(base, content, part="state_dict_em")


def test_networks_that_nothing_tells_apart_are_asked_for(base: Backbone) -> None:
    with pytest.raises(CheckpointError, match=r"2 networks that .* could be, at 'a', 'b'\. Name one: part='a'"):
        read_finetuned(base, {"a": STATE, "b": shifted(1)})


def test_a_teacher_of_another_size_is_no_rival(base: Backbone) -> None:
    wide = {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in STATE.items()}
    assert equal(read_finetuned(base, {"student": STATE, "teacher": wide}), STATE)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"stage1.2.conv1.weight": torch.ones(1)}, r"1 tensor of the checkpoint.*stage1\.2"),
        ({"stem.0.bias": torch.ones(8)}, r"1 tensor of the checkpoint.*stem\.0\.bias"),
        ({"reg_token": torch.ones(1)}, "1 tensor of the checkpoint.*reg_token"),
    ],
)
def test_layers_that_the_network_lacks_are_no_foreign_keys(extra: State, problem: str, base: Backbone) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_finetuned(base, STATE | extra)


@pytest.mark.filterwarnings("ignore::modelpatch.errors.CheckpointWarning")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"fc.1.weight": torch.ones(8, 16), "fc.3.weight": torch.ones(4, 8)},
            r"fc has 2 layers with weights: fc\.1, fc\.3",
        ),
        ({"fc.0.weight": torch.ones(16), "fc.1.weight": torch.ones(4, 16)}, "fc has 2 layers"),
        ({"fc.1.weight": torch.ones(4, 7)}, r"shape \(4, 7\) \(fc\.1\); expected \(classes, 16\)"),
        ({"fc.1.weight": torch.ones(4, 16), "fc.1.bias": torch.ones(3)}, r"bias of fc\.1 has shape \(3,\)"),
        (
            {"head_a.fc.weight": torch.ones(4, 16), "head_b.fc.weight": torch.ones(4, 16)},
            "2 layers that could be its head",
        ),
        ({}, "no classifier fc"),
    ],
)
def test_heads_that_are_no_linear_layer_are_refused(change: State, problem: str, base: Backbone) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_finetuned(base, BODY | change)


@pytest.mark.filterwarnings("ignore::modelpatch.errors.CheckpointWarning")
def test_one_of_several_heads_is_named(base: Backbone) -> None:
    content = {**under("net.", BODY), "head_a.fc.weight": torch.ones(4, 16), "head_b.fc.weight": torch.zeros(2, 16)}
    assert read_finetuned(base, content, head="head_b.fc")["fc.weight"].shape == (2, 16)
    with pytest.raises(CheckpointError, match=r"0 layers 'head_c'; expected one"):
        read_finetuned(base, content, head="head_c")


def test_a_head_without_a_bias_has_none() -> None:
    own = {name: tensor.shape for name, tensor in STATE.items()}
    state = BODY | {"fc.weight": STATE["fc.weight"]}
    match = match_states({"": state}, own, BODY, "fc", network="tiny")
    assert find_head(match, "fc", 16).keys() == {"weight"}
