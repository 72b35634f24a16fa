"""The engine: each task's answer as if it were alone, whoever else is there and whatever happens meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from conftest import draft_patch, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.tuning import CACHE, Tuning
from modelpatch.engine import measure
from modelpatch.engine.engine import Engine
from modelpatch.engine.residency import OFTEN
from modelpatch.engine.resident import BoundPart, BoundPatch, Template
from modelpatch.errors import BackboneError, BudgetError, EngineError, UnknownTaskError, WrongBackboneError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.method import Method
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from tolerance import close

PLAIN = Tuning()
FAST = Tuning(channels_last=True, fold=True, piece_bytes=4096, merge_rows=64)
BLOCKS = ("stage1.0", "stage1.1", "stage2.0", "stage2.1")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shared() -> Backbone:
    """The tiny network for all examples of a property."""
    return make_tiny()


def many(backbone: Backbone) -> dict[str, Patch]:
    methods: dict[str, Method | None] = {
        "probe": None,
        "other probe": None,
        "scale": ScaleBias(),
        "mask": Piggyback(),
        "last": Subset(),
        "middle": Subset(blocks=(BLOCKS[1],)),
        "full": FullFinetune(),
        "delta": DeltaNetwork(),
        "siamese": Subset(head="siamese"),
    }
    return {
        name: draft_patch(backbone, method, classes=2 + number, seed=number)
        for number, (name, method) in enumerate(methods.items())
    }


def use_often(engine: Engine, images: Tensor) -> None:
    """Until its variants are modules of their own, as far as the budget allows."""
    for _ in range(OFTEN):
        engine(images)
    engine.settle()


def masked(backbone: Backbone, seed: int) -> Patch:
    """A patch of random masks."""
    patch = draft_patch(backbone, Piggyback(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(tensor.shape, generator=generator) < 0.8
        for name, tensor in patch.tensors.items()
        if name.startswith("mask/")
    }
    return replace(patch, tensors={**patch.tensors, **masks})


def test_answers_are_those_of_each_patch_alone_when_nothing_is_tuned(tiny: Backbone, images: Tensor) -> None:
    patches = {name: patch for name, patch in many(tiny).items() if name != "other probe"}
    answers = Engine(tiny, patches, tuning=PLAIN)(images)
    assert close(answers.pop("base"), tiny(images))
    assert answers.keys() == patches.keys()
    for name, patch in patches.items():
        assert close(answers[name], tiny.patched(patch)(images)), name


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [PLAIN, FAST, Tuning(merge_rows=64), Tuning(channels_last=True)], ids=str)
@pytest.mark.parametrize("budget", [0, 10**8])
def test_every_tuning_and_budget_gives_the_same_answers(
    tiny: Backbone, images: Tensor, tuning: Tuning, budget: int
) -> None:
    patches = many(tiny)
    engine = Engine(tiny, patches, tuning=tuning, budget=budget)
    alone = {"base": tiny(images)} | {name: tiny.patched(patch)(images) for name, patch in patches.items()}
    for _ in range(OFTEN + 1):
        answers = engine(images)
        engine.settle()
        for name, expected in alone.items():
            assert close(answers[name], expected), name
    assert Fingerprint.of(tiny.chain) == tiny.fingerprints
    assert engine.memory["variants"] <= budget


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(st.sets(st.sampled_from(BLOCKS), min_size=1), min_size=1, max_size=4),
    tasks=st.lists(st.integers(0, 4), max_size=8),
    tuning=st.sampled_from([PLAIN, FAST]),
)
def test_a_mixed_batch_of_random_patches_equals_each_row_alone(
    shared: Backbone, spans: Sequence[set[str]], tasks: list[int], tuning: Tuning
) -> None:
    patches = {
        f"patch {number}": draft_patch(shared, Subset(blocks=tuple(sorted(blocks))), seed=number % 2)
        for number, blocks in enumerate(spans)
    }
    names = ["base", *patches]
    rows = [names[number % len(names)] for number in tasks]
    images = torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(len(rows)))
    answers = Engine(shared, patches, tuning=tuning)(images, tasks=rows)
    assert len(answers) == len(rows)
    for row, name in enumerate(rows):
        image = images[row : row + 1]
        alone = shared(image) if name == "base" else shared.patched(patches[name])(image)
        assert close(answers[row], alone[0])


def test_a_head_that_reads_intermediate_outputs_is_an_ordinary_member(images: Tensor) -> None:
    backbone = make_tiny()
    torch.manual_seed(0)
    patches = {
        "taps": head2toe_patch(backbone),
        "probe": draft_patch(backbone),
        "last": draft_patch(backbone, Subset()),
    }
    engine = Engine(backbone, patches, tuning=PLAIN)
    assert close(engine(images)["taps"], backbone.patched(patches["taps"])(images))
    rows = ["taps", "probe", "taps", "last", "base", "probe"]
    for row, answer in enumerate(engine(images, tasks=rows)):
        if rows[row] != "base":
            assert close(answer, backbone.patched(patches[rows[row]])(images[row : row + 1])[0])


def head2toe_patch(backbone: Backbone) -> Patch:
    from conftest import color_task
    from modelpatch.train import fit

    return fit(backbone, color_task(12), Head2Toe(), epochs=1)


def test_some_tasks_may_be_asked_for(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, many(tiny), tuning=PLAIN)
    assert set(engine(images, only=["full", "probe"])) == {"full", "probe"}
    assert all(len(logits) == 0 for logits in engine(images[:0]).values())
    assert engine(images[:0], tasks=[]) == []


# images -----------------------------------------------------------------------------------------------------


def pictures(count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (20, 24, 3), dtype=np.uint8) for _ in range(count)]


def test_every_task_sees_pictures_through_its_own_preprocessing(tiny: Backbone) -> None:
    large = replace(draft_patch(tiny, Subset()), preprocessing=small_preprocessing(32))
    engine = Engine(tiny, {"large": large, "small": draft_patch(tiny)}, tuning=FAST)
    answers = engine(pictures())
    assert close(answers["large"], tiny.patched(large)(small_preprocessing(32)(*pictures())))
    assert close(answers["base"], tiny(small_preprocessing()(*pictures())))
    batches = engine.read(pictures())
    assert set(batches) == {small_preprocessing(32), small_preprocessing()}
    assert close(engine(batches)["small"], answers["small"])
    assert len(engine.plan.roots) == 2


def test_one_batch_for_tasks_that_normalise_differently_is_refused(tiny: Backbone, images: Tensor) -> None:
    other = small_preprocessing().model_copy(update={"mean": (0.1, 0.2, 0.3)})
    engine = Engine(tiny, {"other": replace(draft_patch(tiny), preprocessing=other)}, tuning=PLAIN)
    with pytest.raises(EngineError, match=r"normalise images differently.*only="):
        engine(images)
    assert engine(images, only=["other"]).keys() == {"other"}
    with pytest.raises(EngineError, match="no images for the preprocessing of: other"):
        engine({small_preprocessing(): images})


@pytest.mark.parametrize("bad", [torch.zeros(3, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16).byte()])
def test_what_is_no_batch_of_images_is_refused(tiny: Backbone, bad: Tensor) -> None:
    with pytest.raises(EngineError, match=r"expected normalised floats"):
        Engine(tiny, tuning=PLAIN)(bad)


def test_as_many_tasks_as_images_are_needed(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, {"a": draft_patch(tiny)}, tuning=PLAIN)
    with pytest.raises(EngineError, match="6 images and 2 tasks"):
        engine(images, tasks=["a", "base"])
    with pytest.raises(EngineError, match="not both"):
        engine(images, tasks=["a"] * 6, only=["a"])


@pytest.mark.parametrize("bad", ["photo.jpg", None, 3, np.zeros((4, 4, 3), np.uint8)])
def test_what_is_no_list_of_pictures_is_refused(tiny: Backbone, bad: object) -> None:
    with pytest.raises(EngineError, match="expected a list of files or pictures"):
        Engine(tiny, tuning=PLAIN)(bad)  # type: ignore[call-overload]


def test_batches_by_preprocessing_are_checked(tiny: Backbone) -> None:
    engine, kind = Engine(tiny, tuning=PLAIN), tiny.preprocessing
    for batch, problem in (
        (torch.zeros(3, 16, 16), "expected normalised floats"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "expected normalised floats"),
        (torch.zeros(1, 3, 8, 8), "its preprocessing gives"),
    ):
        with pytest.raises(EngineError, match=problem):
            engine({kind: batch})


def test_no_pictures_give_no_answers(tiny: Backbone) -> None:
    engine = Engine(tiny, {"a": draft_patch(tiny, Subset())}, tuning=PLAIN)
    assert {name: tuple(logits.shape) for name, logits in engine([]).items()} == {"base": (0, 5), "a": (0, 3)}


def test_one_text_in_place_of_a_list_of_tasks_is_refused(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, tuning=PLAIN)
    with pytest.raises(EngineError, match=r"only='base' is one text"):
        engine(images, only="base")
    with pytest.raises(EngineError, match=r"tasks='base' is one text"):
        engine(images, tasks="base")


def test_engines_of_what_is_none_are_refused(tiny: Backbone, tmp_path: Path) -> None:
    for arguments, problem in (
        (("bundled:tiny",), "expected what load_backbone gives"),
        ((tiny, [tmp_path]), "expected them by name"),
        ((tiny, {}, -1), "expected a number of bytes"),
    ):
        with pytest.raises(EngineError, match=problem):
            Engine(*arguments[:2], tuning=PLAIN, budget=arguments[2] if len(arguments) > 2 else None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="the tuning is a dict"):
        Engine(tiny, tuning={"fold": True})  # type: ignore[arg-type]


def test_operations_follow_height_and_width(tiny: Backbone) -> None:
    engine = Engine(tiny, tuning=PLAIN)
    square, tall = (engine.explain(torch.zeros(1, 3, height, 16))[0].flops for height in (16, 64))
    assert tall == 4 * square


def test_a_backbone_that_somebody_puts_into_train_mode_answers_as_before(tiny: Backbone, images: Tensor) -> None:
    patch = draft_patch(tiny, Subset())
    engine, bound = Engine(tiny, {"a": patch}, tuning=PLAIN), BoundPatch(tiny, patch)
    before = engine(images)
    tiny.module.train()
    after = Engine(tiny, {"a": patch}, tuning=PLAIN)(images)
    for name in before:
        assert torch.equal(engine(images)[name], before[name])
        assert close(after[name], before[name])
    assert close(bound(images), before["a"])
    tiny.verify()


def test_nothing_that_an_engine_does_moves_a_backbone_in_train_mode(tiny: Backbone, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.module.state_dict().items()}
    tiny.module.train()
    for tuning in (measure(tiny, seconds=0.0), FAST):
        engine = Engine(tiny, {"a": draft_patch(tiny, Subset())}, tuning=tuning, eager=True)
        engine(images)
        assert engine.plan.flops > 0
    assert tiny.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.module.state_dict().items())


# members ----------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused_by_name_and_the_known_ones_are_named(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, {"flowers": draft_patch(tiny)}, tuning=PLAIN)
    for ask in (
        lambda: engine(images, tasks=["birds"] * 6),
        lambda: engine(images, only=["birds"]),
        lambda: engine.remove("birds"),
        lambda: engine.swap("birds", draft_patch(tiny)),
        lambda: engine.pin("birds"),
        lambda: engine.classes("birds"),
    ):
        with pytest.raises(UnknownTaskError, match=r"no task 'birds'\. Known tasks: base, flowers"):
            ask()


def test_patches_are_added_swapped_and_removed(tiny: Backbone, images: Tensor, tmp_path: Path) -> None:
    engine = Engine(tiny, tuning=FAST)
    first, second = draft_patch(tiny, Subset(), seed=1), draft_patch(tiny, Subset(), seed=2)
    engine.add("a", first.save(tmp_path / "first.safetensors"))
    assert close(engine(images)["a"], tiny.patched(first)(images))
    engine.swap("a", second)
    assert close(engine(images)["a"], tiny.patched(second)(images))
    assert engine.classes("a") == second.task.classes
    use_often(engine, images)
    assert engine.memory["variants"] > 0
    engine.remove("a")
    assert engine.tasks == ("base",)
    assert "a" not in engine
    assert engine.memory["variants"] == engine.memory["patches"] == 0
    assert close(engine(images)["base"], tiny(images))


def test_a_bound_patch_is_swapped_in_as_it_is(tiny: Backbone, images: Tensor) -> None:
    first, second = (BoundPatch(tiny, draft_patch(tiny, ScaleBias(), seed=seed)) for seed in range(2))
    engine = Engine(tiny, {"a": first}, tuning=PLAIN)
    engine.swap("a", second)
    assert close(engine(images)["a"], second(images))
    with pytest.raises(WrongBackboneError, match="bound to another backbone"):
        Engine(make_tiny(), {"a": first}, tuning=PLAIN)


def test_names_that_are_taken_or_cannot_be_are_refused(tiny: Backbone) -> None:
    engine = Engine(tiny, {"a": draft_patch(tiny)}, tuning=PLAIN)
    with pytest.raises(EngineError, match=r"already.*swap"):
        engine.add("a", draft_patch(tiny))
    for name in ("base", ""):
        with pytest.raises(EngineError, match="cannot be named"):
            engine.add(name, draft_patch(tiny))
    with pytest.raises(EngineError, match="cannot be removed"):
        engine.remove("base")


def test_a_patch_that_does_not_fit_leaves_the_engine_as_it_was(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, {"a": draft_patch(tiny)}, tuning=PLAIN)
    before = engine(images)["a"]
    for attempt in (engine.add, engine.swap):
        with pytest.raises(WrongBackboneError):
            attempt("b" if attempt == engine.add else "a", draft_patch(make_tiny(seed=1)))
    assert engine.tasks == ("base", "a")
    assert close(engine(images)["a"], before)


@pytest.mark.slow
def test_calls_get_one_valid_version_while_patches_come_and_go(tiny: Backbone, images: Tensor) -> None:
    versions = [draft_patch(tiny, method, seed=seed) for seed in range(2) for method in (ScaleBias(), Subset())]
    engine = Engine(tiny, {"a": versions[0], "b": draft_patch(tiny, seed=9)}, tuning=PLAIN, budget=4000)
    valid = [tiny.patched(version)(images) for version in versions]
    other, base = tiny.patched(draft_patch(tiny, seed=9))(images), tiny(images)
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            try:
                answers = engine(images)
            except Exception as error:
                wrong.append(repr(error))
                return
            right = any(close(answers["a"], version) for version in valid)
            if not right or not close(answers["b"], other) or not close(answers["base"], base):
                wrong.append("an answer of no version")

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for change in range(334):  # a swap, an addition and a removal each: 1,000 changes
            engine.swap("a", versions[change % len(versions)])
            engine.add("c", versions[(change + 1) % len(versions)])
            engine.remove("c")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert engine.tasks == ("base", "a", "b")


# memory -----------------------------------------------------------------------------------------------------


def test_modules_of_variants_stay_within_the_budget_and_the_most_recent_have_them(
    tiny: Backbone, images: Tensor
) -> None:
    patches = {str(seed): masked(tiny, seed) for seed in range(3)}
    one = Engine(tiny, {"0": patches["0"]}, tuning=PLAIN, eager=True).memory["variants"]
    assert one == sum(t.numel() * 4 for name, t in patches["0"].tensors.items() if name.startswith("mask/"))
    engine = Engine(tiny, patches, tuning=PLAIN, budget=one)
    expected = {name: tiny.patched(patch)(images) for name, patch in patches.items()}
    for name in "0001121111100000":
        assert close(engine(images, only=[name])[name], expected[name])
        engine.settle()
        assert engine.memory["variants"] <= one
    assert engine.memory["variants"] == one
    assert engine.residency.evicted > 0


def test_a_variant_larger_than_the_whole_budget_looks_at_no_other(
    tiny: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny, {"mask": draft_patch(tiny, Piggyback())}, tuning=PLAIN, budget=1)
    monkeypatch.delattr(type(engine.residency), "nbytes")
    use_often(engine, images)


def test_eager_engines_make_modules_when_a_patch_is_added_lazy_ones_when_it_is_used(
    tiny: Backbone, images: Tensor
) -> None:
    patch = {"mask": draft_patch(tiny, Piggyback())}
    assert Engine(tiny, patch, tuning=PLAIN, eager=True).memory["variants"] > 0
    lazy = Engine(tiny, patch, tuning=PLAIN)
    assert lazy.memory["variants"] == 0
    use_often(lazy, images)
    assert lazy.memory["variants"] > 0


def test_a_pinned_task_keeps_its_modules_and_what_has_no_room_is_refused(tiny: Backbone, images: Tensor) -> None:
    patches = {str(seed): masked(tiny, seed) for seed in range(2)}
    one = Engine(tiny, {"0": patches["0"]}, tuning=PLAIN, eager=True).memory["variants"]
    engine = Engine(tiny, patches, tuning=PLAIN, budget=one)
    engine.pin("0")
    with pytest.raises(BudgetError, match="no room beside what is pinned"):
        engine.pin("1")
    for _ in range(OFTEN + 2):
        engine(images, only=["1"])
        engine.settle()
    assert engine.residency.evicted == 0
    engine.unpin("0")
    engine.pin("1")
    assert engine.residency.evicted > 0
    assert close(engine(images)["1"], tiny.patched(patches["1"])(images))


class Gate:
    """Holds up the making of variants until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        make = Template.copy_with

        def wait(template: Template, part: BoundPart) -> nn.Module:
            self.reached.set()
            assert self.opened.wait(30)
            return make(template, part)

        monkeypatch.setattr(Template, "copy_with", wait)

    def pinning(self, backbone: Backbone) -> tuple[Engine, threading.Thread]:
        """An engine whose task "a" is being pinned by a thread that stands before the gate."""
        engine = Engine(backbone, {"a": masked(backbone, 0)}, tuning=PLAIN)
        thread = threading.Thread(target=engine.pin, args=["a"])
        thread.start()
        assert self.reached.wait(30)
        return engine, thread


def test_calls_are_answered_while_a_pinned_task_is_made(
    tiny: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine, pinning = gate.pinning(tiny)
    answers = engine(images)
    assert pinning.is_alive()
    gate.opened.set()
    pinning.join(30)
    assert close(engine(images)["a"], answers["a"])
    assert engine.residency.made == len(engine.residency._known)


def test_a_task_may_be_removed_while_its_variants_are_made(
    tiny: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine, pinning = gate.pinning(tiny)
    engine.remove("a")
    gate.opened.set()
    pinning.join(30)
    assert engine.memory["variants"] == 0
    assert engine.tasks == ("base",)


def test_a_pin_takes_the_room_of_what_is_being_made(
    tiny: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = {str(seed): masked(tiny, seed) for seed in range(2)}
    one = Engine(tiny, {"0": patches["0"]}, tuning=PLAIN, eager=True).memory["variants"]
    gate = Gate(monkeypatch)
    engine = Engine(tiny, patches, tuning=PLAIN, budget=one)
    for _ in range(OFTEN):
        engine(images, only=["0"])
    gate.opened.set()
    engine.pin("1")
    engine.settle()
    assert engine.memory["variants"] == one
    held = {key for key, variant in engine.residency._known.items() if variant.module is not None}
    assert held == {part.key for part in BoundPatch(tiny, patches["1"]).parts}


def test_calls_that_outlive_their_task_leave_nothing_behind(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, {"a": masked(tiny, 0)}, tuning=PLAIN)
    engine(images, only=["a"])
    program = next(iter(engine._programs.values()))
    engine.remove("a")
    for _ in range(OFTEN + 1):
        program({None: images})
    engine.settle()
    assert engine.memory["variants"] == 0


def test_a_refused_patch_or_pin_leaves_nothing_behind(tiny: Backbone) -> None:
    engine = Engine(tiny, {"a": draft_patch(tiny)}, tuning=PLAIN, eager=True, budget=10_000)
    with pytest.raises(EngineError, match="already"):
        engine.add("a", masked(tiny, 0))
    assert engine.memory["variants"] == 0
    tight = Engine(tiny, {"a": masked(tiny, 0)}, tuning=PLAIN, budget=100)
    with pytest.raises(BudgetError, match="no room"):
        tight.pin("a")
    assert tight.memory["variants"] == 0
    assert all(not variant.pins for variant in tight.residency._known.values())


def test_two_tasks_pin_one_patch_each_for_itself(tiny: Backbone, images: Tensor) -> None:
    patch = masked(tiny, 0)
    engine = Engine(tiny, {"a": patch, "b": patch}, tuning=PLAIN)
    engine.pin("a")
    engine.pin("b")
    engine.unpin("b")
    assert all(len(variant.pins) == 1 for variant in engine.residency._known.values())
    engine.swap("a", masked(tiny, 1))
    assert all(not variant.pins for variant in engine.residency._known.values())


def test_joined_heads_are_held_once_for_all_batch_sizes_and_not_for_mixed_batches(tiny: Backbone) -> None:
    engine = Engine(tiny, {str(seed): draft_patch(tiny, seed=seed) for seed in range(4)}, tuning=PLAIN)
    for rows in (1, 2, 3):
        engine(torch.zeros(rows, 3, 16, 16))
    heads = [4 * (16 + 1) * outputs for outputs in (5, 3, 3, 3, 3)]
    assert engine.memory["joined heads"] == sum(heads)
    for shift in range(4):
        engine(torch.zeros(4, 3, 16, 16), tasks=[str((row + shift) % 4) for row in range(4)])
    assert engine.memory["joined heads"] == sum(heads)


def test_scale_and_bias_patches_cost_their_numbers_and_nothing_else_without_folding(
    tiny: Backbone, images: Tensor
) -> None:
    engine = Engine(tiny, {str(s): draft_patch(tiny, ScaleBias(), seed=s) for s in range(4)}, tuning=PLAIN)
    engine(images)
    assert engine.memory["variants"] == 0


# tuning and explanations ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_measurement_reports_what_it_chose(tiny: Backbone, images: Tensor) -> None:
    tuning = measure(tiny, seconds=0.05)
    text = str(tuning)
    assert text.startswith("tuning: ")
    for name in ("channels_last", "fold", "piece", "streams concatenated"):
        assert name in text
    assert close(Engine(tiny, tuning=tuning)(images)["base"], tiny(images))


def test_an_engine_without_settings_follows_the_rule_and_times_nothing(
    tiny: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse() -> float:
        raise AssertionError("an engine read the clock")

    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", refuse)
        engine = Engine(tiny)
    assert engine.tuning == Tuning.of(tiny) == Tuning(channels_last=True, fold=True, piece_bytes=CACHE, merge_rows=16)
    assert close(engine(images)["base"], tiny(images))
    path = Tuning(fold=True, merge_rows=3, measured=("fold: 2x",)).save(tmp_path / "tuning.json")
    assert Engine(tiny, tuning=path).tuning == Tuning(fold=True, merge_rows=3)
    assert Tuning.load(path).measured == ("fold: 2x",)


@pytest.mark.parametrize("text", ["", "[]", '{"fold": 3}', '{"folds": true}', '{"merge_rows": -1}'])
def test_a_file_of_other_settings_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(EngineError, match=r"tuning\.json holds no settings|merge_rows=-1"):
        Tuning.load(tmp_path / "tuning.json")


def test_the_rule_is_one_of_architecture() -> None:
    assert Tuning.of(make_timm("vit_tiny_patch16_224", 32, img_size=32, depth=2)) == Tuning(merge_rows=16)
    convnext = make_timm("convnext_atto", 32, depths=(1, 1, 1, 1))
    assert Tuning.of(convnext) == Tuning(channels_last=True, piece_bytes=CACHE, merge_rows=16)
    assert Tuning.of(convnext, device=torch.device("cuda")) == Tuning(channels_last=True, merge_rows=16)
    swin = make_timm("swin_tiny_patch4_window7_224", 224, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    assert Tuning.of(swin) == Tuning(merge_rows=16)  # maps (H, W, C), and one convolution alone
    with pytest.raises(EngineError, match="bfloat16=True is for the rule"):
        Engine(swin, tuning=Tuning(), bfloat16=True)


def test_sixteen_bits_are_used_only_where_they_are_asked_for(tiny: Backbone, images: Tensor) -> None:
    engine = Engine(tiny, {"a": draft_patch(tiny, Subset())}, tuning=Tuning(bfloat16=True, fold=True))
    answers = engine(images)
    assert answers["base"].dtype == torch.float32
    assert not close(answers["base"], tiny(images))
    assert torch.allclose(answers["base"], tiny(images), atol=0.05 * float(tiny(images).abs().max()))
    assert not measure(tiny, seconds=0.05).bfloat16


@pytest.mark.slow
def test_segments_may_be_compiled_and_a_compiler_that_fails_is_named(tiny: Backbone, images: Tensor) -> None:
    patch = draft_patch(tiny, Subset())
    engine = Engine(tiny, {"a": patch}, tuning=Tuning(compile="eager"))
    assert close(engine(images)["a"], tiny.patched(patch)(images))
    assert "compiled by eager" in str(engine.tuning)
    with pytest.raises(BackboneError, match="backend 'no such backend' fails here"):
        Engine(tiny, tuning=Tuning(compile="no such backend"))(images)


def test_pictures_are_streamed_in_order_and_broken_ones_named(tiny: Backbone, tmp_path: Path) -> None:
    files: list[Path | np.ndarray] = [*pictures(5)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    files.insert(2, broken)
    engine = Engine(tiny, {"a": draft_patch(tiny, Subset())}, tuning=PLAIN)
    for workers in (0, 2):
        batches = list(engine.stream(files, only=["a"], batch_size=4, workers=workers))
        assert [batch.rows for batch in batches] == [(0, 1, 3), (4, 5)]
        assert list(batches[0].errors) == [2]
        assert "broken.png" in batches[0].errors[2]
        logits = torch.cat([batch.logits["a"] for batch in batches])
        expected = engine([file for file in files if file is not broken], only=["a"])["a"]
        assert close(logits, expected)


def test_folders_and_data_sets_are_streamed(tiny: Backbone, tmp_path: Path) -> None:
    arrays = pictures(3)
    for number, array in enumerate(arrays):
        (tmp_path / str(number)).mkdir()
        Image.fromarray(array).save(tmp_path / str(number) / "picture.png")
    engine = Engine(tiny, tuning=PLAIN)
    expected = engine(arrays)["base"]
    pairs = Items([(array, 0) for array in arrays])
    rows = Items([{"image": array, "label": 0} for array in arrays])
    for sources in (tmp_path, str(tmp_path), pairs, rows):
        (batch,) = engine.stream(sources)
        assert close(batch.logits["base"], expected)
    (batch,) = engine.stream(Items([{"picture": arrays[0]}]))
    assert 'expected an "image"' in batch.errors[0]


class Items(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> object:
        return self.items[place]


def test_what_cannot_be_streamed_is_refused_before_the_first_batch(tiny: Backbone) -> None:
    engine = Engine(tiny, tuning=PLAIN)
    for bad in (torch.zeros(2, 3, 16, 16), {"a": 1}, 7):
        with pytest.raises(EngineError, match="expected a list of files"):
            engine.stream(bad)
    with pytest.raises(EngineError, match="there is no folder 'photos'"):
        engine.stream("photos")
    with pytest.raises(EngineError, match="workers='a'"):
        engine.stream([], workers="a")
    with pytest.raises(EngineError, match="only='base' is one text"):
        engine.stream([], only="base")
    with pytest.raises(EngineError, match="batch_size=0"):
        engine.stream([], batch_size=0)
    with pytest.raises(UnknownTaskError):
        engine.stream([], only=["birds"])


def test_an_explanation_times_every_step(tiny: Backbone, images: Tensor) -> None:
    plan, timings = Engine(tiny, many(tiny), tuning=PLAIN).explain(images)
    assert [timing.step for timing in timings] == list(plan.steps)
    assert all(timing.seconds >= 0 for timing in timings)
    assert plan.flops == plan.floor < plan.separate_flops


def test_any_tasks_for_any_image(tiny: Backbone, images: Tensor) -> None:
    patches = many(tiny)
    engine = Engine(tiny, patches, tuning=PLAIN)
    wanted = {"scale": [0, 3], "probe": [3], "base": [1, 2, 5], "siamese": [0]}
    answers = engine.answer(images, wanted)
    assert answers.keys() == wanted.keys()
    for name, rows in wanted.items():
        alone = tiny(images[rows]) if name == "base" else tiny.patched(patches[name])(images[rows])
        assert close(answers[name], alone), name
    assert engine.plan_for(wanted).rows == tuple(map(tuple, wanted.values()))
    assert engine.answer(images, {}) == {}
    for wrong in ([1, 0], [0, 0], [6], [-1]):
        with pytest.raises(EngineError, match="increasing"):
            engine.answer(images, {"scale": wrong})
    with pytest.raises(UnknownTaskError):
        engine.answer(images, {"nobody": [0]})
