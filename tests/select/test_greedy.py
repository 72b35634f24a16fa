"""Greedy selection follows its rule, keeps its limits, and never reads the test images before the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import color_task, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.splits import Split
from modelpatch.errors import MethodError, TrainingError
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.report.selection import selection_table
from modelpatch.select.budget import Budget, added_latency, draft_patch, parse_bytes, parse_latency
from modelpatch.select.greedy import Greedy, Selection, select
from modelpatch.select.trials import Bench, Outcome, Trial, file_bytes

pytestmark = pytest.mark.slow

FAST = {"epochs": 1, "batch_size": 8, "folds": 2}
WORTH = {"stage1.0": 0.3, "stage1.1": 0.2, "stage2.0": 0.05, "stage2.1": -0.1}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Every block adds a known accuracy to 0.2; returns the trials that were run."""
    seen: list[Trial] = []

    def outcome(self: Bench, trial: Trial) -> Outcome:
        seen.append(trial)
        blocks = getattr(trial.method, "blocks", ())
        return Outcome(0.2 + sum(WORTH[name] for name in blocks), 1000 + len(blocks), 0.0)

    monkeypatch.setattr(Bench, "run", outcome)
    return seen


def run(backbone: Backbone, **options: object) -> Selection:
    return select(backbone, color_task(), **{**FAST, **options})  # type: ignore[arg-type]


def test_blocks_are_taken_while_they_add_more_than_epsilon(tiny: Backbone, known: list[Trial]) -> None:
    result = run(tiny, greedy=Greedy(epsilon=0.1))
    assert result.blocks == ("stage1.0", "stage1.1")
    assert [one.accepted for one in result.rounds] == [True, True, False]
    assert [len(one.steps) for one in result.rounds] == [4, 3, 2]
    assert len(known) == 2 * (1 + 4 + 3 + 2 + 1)  # folds of the probe, of the rounds' candidates and of all blocks
    assert result.every is not None
    assert result.every.top1 == pytest.approx(0.2 + sum(WORTH.values()))
    assert result.every.top1 < result.score.top1
    assert result.replaced is None
    assert result.patch.method.hyperparameters["blocks"] == ("stage1.0", "stage1.1")
    facts = result.complexity
    sizes = {block.name: block.parameters for block in tiny.chain.blocks}
    assert (facts.tuned, facts.every) == (sizes["stage1.0"] + sizes["stage1.1"], sum(sizes.values()))
    assert facts.bound == pytest.approx(math.sqrt(facts.tuned / 24) * math.log(2 * 4))
    assert run(tiny, greedy=Greedy(epsilon=0)).blocks == ("stage1.0", "stage1.1", "stage2.0")


def test_whole_stages_are_chosen_as_blocks_are(tiny: Backbone, known: list[Trial]) -> None:
    stages = [tuple(block.name for block in stage) for stage in tiny.chain.stages]
    worth = sorted(stages, key=lambda stage: -sum(WORTH[name] for name in stage))
    result = run(tiny, greedy=Greedy(stages=True))
    assert [len(one.steps) for one in result.rounds] == [len(stages), len(stages) - 1]
    assert result.blocks == worth[0]
    assert (result.complexity.blocks, result.complexity.candidates) == (1, len(stages))
    every = run(tiny, greedy=Greedy(rule="code", start="all", stages=True))
    assert [step.blocks for step in every.rounds[0].steps] == [stages[1], stages[0]]


def test_the_first_round_always_takes_a_block(
    tiny: Backbone, known: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_greedy.WORTH", dict.fromkeys(WORTH, -0.1))
    result = run(tiny, greedy=Greedy(ends=False))
    assert result.blocks == ("stage1.0",)
    assert result.probe.top1 > result.score.top1
    assert (result.every, result.replaced) == (None, None)


@pytest.mark.parametrize(
    ("worth", "blocks"),
    [(dict.fromkeys(WORTH, -0.1), ()), (WORTH | {"stage1.1": -0.3, "stage2.0": 0.005}, ("stage1.0",))],
)
def test_an_end_that_does_better_on_the_folds_is_trained_instead(
    tiny: Backbone,
    known: list[Trial],
    monkeypatch: pytest.MonkeyPatch,
    worth: dict[str, float],
    blocks: tuple[str, ...],
) -> None:
    monkeypatch.setattr("test_greedy.WORTH", worth)
    result = run(tiny)
    assert result.blocks == blocks
    assert result.score.top1 == pytest.approx(0.2 + sum(worth[name] for name in blocks))
    assert (result.replaced is None) == bool(blocks)
    table = "".join(str(cell) for column in selection_table(result).columns for cell in column.cells)
    assert ("the linear probe does better on the folds" in table) == (not blocks)


def test_all_blocks_are_trained_where_no_single_one_gains(
    tiny: Backbone, known: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    def together(self: Bench, trial: Trial) -> Outcome:
        blocks = getattr(trial.method, "blocks", ())
        return Outcome(0.9 if len(blocks) == len(WORTH) else 0.2 - 0.1 * len(blocks), 1000, 0.0)

    monkeypatch.setattr(Bench, "run", together)
    result = run(tiny)
    assert set(result.blocks) == set(WORTH)
    assert result.replaced is not None
    assert result.replaced[0] == "stage1.0"
    assert result.as_dict()["replaced"]["top1"] == pytest.approx(0.1)
    limited = run(tiny, max_blocks=3)
    assert (limited.blocks, limited.every, limited.every_left_out) == ((), None, "4 blocks")


def test_the_authors_code_begins_with_the_probe_and_returns_the_best_set_seen(
    tiny: Backbone, known: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tiny, greedy=Greedy(rule="code", epsilon=0.2)).blocks == ("stage1.0", "stage1.1", "stage2.0")
    assert run(tiny, greedy=Greedy(rule="code", start="all")).blocks == ("stage1.0", "stage1.1", "stage2.0")
    assert run(tiny, greedy=Greedy(rule="code", start="better")).rounds[0].steps[0].blocks == (
        "stage1.1",
        "stage2.0",
        "stage2.1",
    )
    monkeypatch.setattr("test_greedy.WORTH", dict.fromkeys(WORTH, -0.1))
    probe = run(tiny, greedy=Greedy(rule="code"))
    assert probe.blocks == ()
    assert probe.patch.method.name == "linear-probe"


def test_limits_leave_candidates_out_before_they_are_trained(tiny: Backbone, known: list[Trial]) -> None:
    assert run(tiny, max_blocks=1).blocks == ("stage1.0",)
    task = color_task().task
    size = file_bytes(draft_patch(tiny, task, Subset(blocks=("stage1.0",)), 16))
    # a trained patch has the facts of its run besides
    result = run(tiny, max_bytes=size + 1200)
    assert file_bytes(result.patch) <= size + 1200
    assert result.rounds[0].steps[0].left_out is None
    with pytest.raises(TrainingError, match="nothing to start from"):
        run(tiny, max_bytes=100)


def test_a_patch_that_breaks_a_limit_once_it_is_trained_is_given_up(
    tiny: Backbone, known: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Budget.broken_by

    def strict(self: Budget, backbone: Backbone, patch: Patch) -> str | None:
        many = len(patch.method.hyperparameters["blocks"]) > 1
        return "it is too large" if many else kept(self, backbone, patch)

    monkeypatch.setattr(Budget, "broken_by", strict)
    result = run(tiny, greedy=Greedy(epsilon=0.1))
    assert result.blocks == ("stage1.0",)
    assert result.dropped == ("stage1.0 + stage1.1: it is too large",)


def test_a_selection_s_patch_is_an_ordinary_fit_and_it_goes_on_after_an_interruption(tmp_path: Path) -> None:
    backbone, file, out = make_tiny(), tmp_path / "trials.jsonl", tmp_path / "patch.safetensors"
    first = run(backbone, trials=file, out=out)
    lines = file.read_text().splitlines()
    again = run(backbone, trials=file)
    assert file.read_text().splitlines() == lines
    assert again.blocks == first.blocks
    assert again.patch.content_hash == first.patch.content_hash == Patch.load(out).content_hash


def test_the_choice_does_not_depend_on_the_test_images() -> None:
    data, backbone = color_task(), make_tiny()
    other = replace(data, test=Split(data.test.images, 0 * data.test.labels))
    one, two = (select(backbone, task, **FAST) for task in (data, other))  # type: ignore[arg-type]
    assert one.patch.content_hash == two.patch.content_hash
    assert one.patch.metrics["test_top1"] != two.patch.metrics["test_top1"]


def test_warm_starts_go_on_from_the_round_before(tiny: Backbone, known: list[Trial]) -> None:
    run(tiny, greedy=Greedy(epsilon=0.1, warm_start=True))
    second = [trial for trial in known if len(getattr(trial.method, "blocks", ())) == 2]
    assert second
    for trial in second:
        assert trial.start is not None
        assert trial.start.method.hyperparameters()["blocks"] == ("stage1.0",)
        assert (trial.start.fold, trial.start.seed) == (trial.fold, trial.seed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "best"},
        {"start": "all"},
        {"rule": "code", "start": "all", "warm_start": True},
        {"epsilon": -0.1},
        {"stages": True, "candidates": ("stage1.0",)},
    ],
)
def test_choices_that_contradict_each_other_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError):
        Greedy(**wrong)  # type: ignore[arg-type]


def test_only_named_blocks_are_tried(tiny: Backbone, known: list[Trial]) -> None:
    assert run(tiny, greedy=Greedy(candidates=("stage1.1", "stage2.1"))).blocks == ("stage1.1",)
    with pytest.raises(MethodError, match="no block 'stage9'"):
        run(tiny, greedy=Greedy(candidates=("stage9",)))


# limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("200KB", 200_000), ("1.5 MB", 1_500_000), ("64KiB", 65536), ("12,000", 12000), ("7b", 7)]
)
def test_bytes_are_read(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("+15%", 0.15), ("15 %", 0.15), ("0.15", 0.15), ("+0%", 0.0)])
def test_latencies_are_read(text: str, value: float) -> None:
    assert parse_latency(text) == pytest.approx(value)


@pytest.mark.parametrize(("read", "text"), [(parse_bytes, "many"), (parse_bytes, "3XB"), (parse_latency, "-5%")])
def test_what_is_no_limit_is_quoted(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        read(text)


def test_a_patch_of_the_last_block_adds_less_time_than_one_of_all() -> None:
    from conftest import make_timm

    backbone = make_timm("resnet18", 64)
    late, early = (Subset(blocks=(block.name,)) for block in (backbone.chain.blocks[-1], backbone.chain.blocks[0]))
    task = color_task().task
    added = [added_latency(backbone, draft_patch(backbone, task, method, 64), runs=9) for method in (late, early)]
    assert 0 <= added[0] < added[1]
