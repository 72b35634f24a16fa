"""Templates: shared by patches of one structure, whatever their strength; counted; freed with the last patch."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import draft_patch
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine import resident
from modelpatch.engine.engine import Engine
from modelpatch.engine.resident import BoundPatch, Templates
from modelpatch.errors import ForeignTensorError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch import changes, model
from tolerance import close

METHODS: list[Method] = [ScaleBias(), Subset(), LoRA(), DeltaNetwork()]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_sixty_strengths_of_a_patch_share_one_structure_and_each_answers_at_its_own(
    tiny: Backbone, method: Method, images: Tensor
) -> None:
    patch = draft_patch(tiny, method)
    strengths = [number / 59 for number in range(60)]
    engine = Engine(tiny, {"0": patch.at_strength(0.0)}, tuning=Tuning())
    one = engine.memory["templates"]
    for number in range(1, 60):
        engine.add(str(number), patch.at_strength(strengths[number]))
    assert engine.memory["templates"] == one
    assert len(engine.templates._structures) == 1
    answers = engine(images)
    for number in (0, 1, 30, 59, 2):
        expected = tiny.patched(patch.at_strength(strengths[number]))(images)
        assert close(answers[str(number)], expected), number
        alone = Engine(tiny, {"a": patch.at_strength(strengths[number])}, tuning=Tuning(fold=True), eager=True)
        assert close(alone(images)["a"], expected), number


@pytest.mark.slow
def test_a_structure_is_freed_with_the_last_patch_that_uses_it(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, tuning=Tuning())
    bound = BoundPatch(tiny, draft_patch(tiny, Subset()), engine.templates)
    gone = weakref.ref(bound.structure)
    engine.add("a", bound)
    engine.add("b", draft_patch(tiny, Subset(), seed=1))
    engine(images)
    del bound
    counted = engine.memory["templates"]
    engine.remove("a")
    gc.collect()
    assert gone() is not None
    assert engine.memory["templates"] == counted
    engine.swap("b", draft_patch(tiny, LinearProbe()))
    engine(images)
    gc.collect()
    assert gone() is None
    engine.remove("b")
    gc.collect()
    assert (engine.memory["templates"], len(engine.templates._structures)) == (0, 0)


def test_patches_outside_engines_share_templates_that_go_with_the_last(tiny: Backbone, images: Tensor) -> None:
    bound = [BoundPatch(tiny, draft_patch(tiny, ScaleBias(), seed=seed)) for seed in range(3)]
    assert len({id(one.structure) for one in bound}) == 1
    gone = weakref.ref(bound[0].templates)
    for one in bound:
        one(images)
    del bound, one
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_a_template_holds_no_tensors_of_a_patch_that_is_gone(tiny: Backbone, images: Tensor) -> None:
    templates = Templates(tiny)
    for method in (ScaleBias(), Piggyback()):
        first, second = (BoundPatch(tiny, draft_patch(tiny, method, seed=seed), templates) for seed in range(2))
        second(images)
        first(images)
        flat = weakref.ref(first.parts[0].flat)
        del first
        gc.collect()
        assert flat() is None
        assert second(images).isfinite().all()


def test_a_first_patch_is_resolved_once(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def resolve(*given: object) -> dict[str, Tensor]:
        calls.append(1)
        return changes.resolve(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(resident, "resolve", resolve)
    monkeypatch.setattr(model, "resolve", resolve)
    BoundPatch(tiny, draft_patch(tiny, ScaleBias()), Templates(tiny))
    assert len(calls) == 1


def test_a_structure_whose_first_patch_is_refused_is_not_kept(tiny: Backbone) -> None:
    templates = Templates(tiny)
    patch = draft_patch(tiny, Subset())
    name = next(name for name in patch.tensors if name.startswith("replace/"))
    with pytest.raises(ForeignTensorError):
        BoundPatch(tiny, replace(patch, tensors={**patch.tensors, name: torch.zeros(1, 1, 1, 1)}), templates)
    gc.collect()
    assert len(templates._structures) == 0
