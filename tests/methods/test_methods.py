"""What all methods have in common: the registry, hyperparameters, counting and optimizer groups."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.method import Method
from modelpatch.methods.registry import METHODS, make_method, sweep
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset


def test_every_method_is_found_by_its_name() -> None:
    assert {name: type(make_method(name)) for name in METHODS} == METHODS
    assert all(kind.paper for kind in METHODS.values())


def test_an_unknown_method_is_an_error_that_names_all_methods() -> None:
    with pytest.raises(MethodError, match=f"no method 'magic'.*{', '.join(METHODS)}"):
        make_method("magic")


def test_an_unknown_hyperparameter_is_an_error_that_names_all_of_them() -> None:
    with pytest.raises(MethodError, match=r"scale-bias has no hyperparameter 'depth'.*head_lr.*statistics"):
        make_method("scale-bias", depth=3)


@pytest.mark.parametrize("hyperparameter", ["name", "paper", "lists"])
def test_what_a_class_says_of_itself_is_no_hyperparameter(hyperparameter: str) -> None:
    with pytest.raises(MethodError, match=f"has no hyperparameter '{hyperparameter}'") as caught:
        make_method("scale-bias", **{hyperparameter: "x"})
    listed = str(caught.value).partition("It has: ")[2].rstrip(".").split(", ")
    assert listed == list(ScaleBias().hyperparameters())


@pytest.mark.parametrize("spec", [None, 3, ScaleBias()])
def test_a_name_that_is_no_text_is_refused(spec: Any) -> None:
    with pytest.raises(MethodError, match="is not a method's name"):
        make_method(spec)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("hyperparameter", "value"),
    [("lr", "fast"), ("lr", -1), ("head_lr", 0), ("weight_decay", -0.1), ("optimizer", "lion"), ("head", "none")],
)
def test_a_value_that_makes_no_sense_is_an_error_that_quotes_it(name: str, hyperparameter: str, value: object) -> None:
    with pytest.raises(MethodError, match=f"{name}: {hyperparameter} = {value!r} is not valid"):
        make_method(name, **{hyperparameter: value})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ScaleBias, {"lr": -1}, "scale-bias: lr = -1"),
        (ScaleBias, {"lr": float("inf")}, "lr = inf"),
        (ScaleBias, {"statistics": "recomputd"}, "'frozen', 'recomputed' or 'learned'"),
        (Subset, {"blocks": ()}, "blocks = "),
        (Subset, {"blocks": 3}, "blocks = 3"),
    ],
)
def test_python_is_checked_as_the_command_line_is(kind: type[Method], values: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=re.escape(message)):
        kind(**values)


def test_one_name_may_stand_for_a_list_of_one() -> None:
    assert Subset(blocks="last") == Subset(blocks=("last",))  # type: ignore[arg-type]


def test_a_sweep_spells_a_method_at_every_value() -> None:
    assert sweep("scale-bias", "lr", ["0.1", "1"]) == {"0.1": "scale-bias(lr=0.1)", "1": "scale-bias(lr=1)"}
    spelled = sweep("scale-bias(layers=norm)+subset", "scale-bias.lr", ["0.1"])["0.1"]
    assert make_method(spelled) == ScaleBias(layers="norm", lr=0.1) + Subset()
    with pytest.raises(MethodError, match="'lr' names no method of"):
        sweep("scale-bias+subset", "lr", ["0.1"])
    with pytest.raises(MethodError, match="lr = 'x' is not valid"):
        sweep("scale-bias", "lr", ["x"])


def test_strings_become_the_values_they_spell() -> None:
    made = make_method("subset", lr="0.003", blocks="layer4.1, stage0", statistics="learned")
    assert made == Subset(lr=0.003, blocks=("layer4.1", "stage0"), statistics="learned")
    assert make_method("scale-bias", affine="false", statistics="recomputed").affine is False  # type: ignore[attr-defined]


def test_hyperparameters_give_back_what_makes_the_same_method() -> None:
    method = ScaleBias(lr=0.02, layers="norm")
    assert make_method(method.name, **method.hyperparameters()) == method


def test_parameters_are_counted_without_the_head(tiny: Backbone) -> None:
    norms = [module for module in tiny.module.modules() if isinstance(module, nn.BatchNorm2d)]
    assert LinearProbe().count_parameters(tiny) == 0
    assert ScaleBias().count_parameters(tiny) == sum(2 * norm.num_features for norm in norms)
    assert FullFinetune().count_parameters(tiny) == sum(segment.parameters for segment in tiny.chain)


def test_the_head_has_its_own_rate_and_vectors_never_decay(tiny: Backbone) -> None:
    method = FullFinetune(lr=1e-3, head_lr=1e-2, weight_decay=0.1)
    model = method.draft(tiny, 3)
    groups = method.parameter_groups(model, tiny)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    head = {id(parameter) for parameter in model.head.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (1e-2 if id(parameter) in head else 1e-3)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)


def test_a_random_head_is_in_no_group(tiny: Backbone) -> None:
    method = ScaleBias(head="random")
    model = method.draft(tiny, 3)
    trained = {id(p) for group in method.parameter_groups(model, tiny) for p in group["params"]}
    assert trained.isdisjoint(map(id, model.head.parameters()))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_is_the_one_named(tiny: Backbone, name: str, kind: type[torch.optim.Optimizer]) -> None:
    method = make_method("linear-probe", optimizer=name)
    assert type(method.make_optimizer(method.draft(tiny, 3), tiny)) is kind


@pytest.mark.parametrize(
    "method", [LinearProbe(head="random"), ScaleBias(head="random", affine=False, statistics="recomputed")]
)
def test_settings_that_train_nothing_are_an_error(tiny: Backbone, method: Method) -> None:
    with pytest.raises(MethodError, match="trains nothing"):
        method.make_optimizer(method.draft(tiny, 3), tiny)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("linear-probe(lr=0.1)", "linear-probe trains a head alone: give head_lr=0.1 instead of lr"),
        ("head2toe(lr=0.1)", "head2toe trains a head alone: give head_lr=0.1 instead of lr"),
        ("piggyback(norm_lr=0.1)", "is for norms='trained'"),
        ("paint+scale-bias", "paint already trains everything"),
        ("scale-bias+full-finetune", "full-finetune already trains everything"),
    ],
)
def test_what_would_be_ignored_is_refused(spec: str, problem: str) -> None:
    with pytest.raises(MethodError, match=re.escape(problem)):
        make_method(spec)


def test_only_methods_are_added_to_a_method() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        ScaleBias() + 3  # type: ignore[operator]
