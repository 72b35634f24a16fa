"""Profiles cover the units that were asked for and go on where they were."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest

from conftest import color_task, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.errors import MethodError, MethodNotApplicableError, TrainingError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.registry import make_method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.report.selection import plot_profile
from modelpatch.select import profile
from modelpatch.select.study import Profile, Score, best, rungs, units
from modelpatch.select.trials import Bench

pytestmark = pytest.mark.slow

BLOCKS = ["stage1.0", "stage1.1", "stage2.0", "stage2.1"]
FAST = {"epochs": 2, "batch_size": 8}


def small(backbone: Backbone, *arguments: object, **options: object) -> Profile:
    return profile(backbone, color_task(), *arguments, **{**FAST, **options})  # type: ignore[arg-type]


def test_units_are_blocks_runs_pairs_or_stages(tiny: Backbone) -> None:
    assert units(tiny) == [(name,) for name in BLOCKS]
    assert units(tiny, consecutive=3) == [tuple(BLOCKS[:3]), tuple(BLOCKS[1:])]
    assert units(tiny, pairs=True) == list(itertools.combinations(BLOCKS, 2))
    assert units(tiny, stages=True) == [tuple(BLOCKS[:2]), tuple(BLOCKS[2:])]
    with pytest.raises(MethodError, match="exclude each other"):
        units(tiny, pairs=True, stages=True)
    with pytest.raises(MethodError, match="has 4 blocks"):
        units(tiny, consecutive=5)


def test_a_profile_has_a_row_a_block_with_what_the_method_trains_of_it(tiny: Backbone) -> None:
    result = small(tiny, folds=3, seeds=2)
    assert [row.blocks for row in result.rows] == [(name,) for name in BLOCKS]
    assert [row.parameters for row in result.rows] == [block.parameters for block in tiny.chain.blocks]
    for row in (*result.rows, result):
        score = row.probe if isinstance(row, Profile) else row.score
        assert len(score.top1s) == 3 * 2
        assert score.error is not None
    assert result.best is not None
    assert result.best.score.top1 == max(row.score.top1 for row in result.rows)
    assert result.as_dict()["rows"][0]["top1s"] == result.rows[0].score.top1s


@pytest.mark.parametrize("method", [ScaleBias(), Depthwise(), "piggyback(lr=0.01)", "scale-bias+subset"])
def test_any_method_has_a_profile(tiny: Backbone, method: object) -> None:
    result = small(tiny, method, stages=True)
    assert [row.name for row in result.rows] == ["stage1.0 + stage1.1", "stage2.0 + stage2.1"]
    assert all(row.parameters > 0 for row in result.rows)


def test_units_in_which_the_method_has_nothing_to_change_are_named(tiny: Backbone) -> None:
    result = small(tiny, DeltaNetwork(), stages=True)
    assert [row.blocks for row in result.rows] == [tuple(BLOCKS[2:])]
    assert "nothing to change" in result.skipped["stage1.0 + stage1.1"]
    with pytest.raises(MethodNotApplicableError, match="in any unit"):
        small(tiny, LinearProbe())


def test_an_interrupted_profile_goes_on_and_gives_what_a_whole_one_gives(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(tiny, folds=2).as_dict()
    run, count = Bench.run, itertools.count()

    def interrupted(self, trial):  # type: ignore[no-untyped-def]
        if next(count) == 5:
            raise KeyboardInterrupt
        return run(self, trial)

    monkeypatch.setattr(Bench, "run", interrupted)
    file = tmp_path / "trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        small(tiny, folds=2, trials=file)
    assert len(file.read_text().splitlines()) == 5
    resumed = small(tiny, folds=2, trials=file).as_dict()
    assert next(count) == 6 + 10 - 5  # every trial once, the interrupted one again
    for a, b in zip(whole["rows"], resumed["rows"], strict=True):
        assert a["top1s"] == b["top1s"]
    small(tiny, folds=2, trials=file)
    assert len(file.read_text().splitlines()) == 10


def test_other_images_or_settings_are_other_trials(tiny: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    counts = []
    for seed, options in ((0, {}), (0, {}), (1, {}), (0, {"batch_size": 4})):
        profile(tiny, color_task(24, seed=seed), trials=file, **{**FAST, **options})  # type: ignore[arg-type]
        counts.append(len(file.read_text().splitlines()))
    assert counts == [5, 5, 10, 15]


def test_halving_trains_the_best_longest_and_says_what_it_saved() -> None:
    assert rungs(10, 3) == [1, 3, 10]
    assert rungs(2, 3) == [2]
    result = small(make_tiny(), halving=2, epochs=4)
    epochs = sorted(row.score.epochs for row in result.rows)
    assert epochs == [1, 1, 2, 4]
    assert result.best is not None
    assert result.best.score.epochs == 4
    assert str(result.effect) == f"successive halving: {4 * 1 + 2 * 2 + 4} epochs instead of {4 * 4}"
    with pytest.raises(TrainingError, match="2 or more"):
        small(make_tiny(), halving=1)


def test_halving_that_saves_nothing_says_so() -> None:
    result = small(make_tiny(), halving=3, epochs=2)  # two epochs cannot be divided by three
    assert str(result.effect) == "successive halving saved nothing: 8 epochs, 8 without it"


def test_bars_that_halving_left_early_are_pale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("matplotlib.figure")
    axes = plots.Figure().subplots()
    monkeypatch.setattr("modelpatch.report.selection.figure", lambda *_: nullcontext(axes))
    result = small(make_tiny(), halving=2, epochs=4)
    plot_profile(result, tmp_path / "profile.png")
    pale = [bar.get_alpha() is not None for bar in axes.patches]
    assert pale == [row.score.epochs < 4 for row in result.rows]
    assert axes.get_legend_handles_labels()[1].count("fewer epochs") == 1


def test_the_best_is_the_first_of_equals_among_those_trained_longest() -> None:
    scores = [Score(1, (0.9,), 1, 1), Score(3, (0.5,), 1, 1), Score(3, (0.5,), 1, 1), Score(3, (), 1, 1, "diverged")]
    assert best(scores) == 1
    assert best([scores[0], None, *scores[2:]]) == 2
    assert best(scores[3:]) is None


def test_a_method_is_confined_as_it_is_spelled(tiny: Backbone) -> None:
    spelled = make_method("scale-bias(blocks=[stage1.0,stage2])")
    owned = spelled.blueprint(tiny).owned
    assert {name.rpartition(".bn")[0] for name in owned} == {"stage1.0", "stage2.0", "stage2.1"}
    assert spelled.hyperparameters()["blocks"] == ("stage1.0", "stage2")
    assert make_method("scale-bias", blocks="stage1.0").count_parameters(tiny) == 2 * (8 + 8)
    assert isinstance(make_method("subset(blocks=stage1)"), Subset)
    with pytest.raises(MethodError, match="blocks = 3 is not valid"):
        make_method("scale-bias", blocks=3)
