"""What recipes compute between their fits and their figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import write_images

from modelpatch.methods import DeltaNetwork
from modelpatch.reproduce import Bench, Recipe, Scale, Sources, painting, patching, piggyback, sharing, skips, subtuning
from modelpatch.train import harmonic_mean


def bench_of(recipe: Recipe, folder: Path, **changes: object) -> Bench:
    write_images(folder / "data" / "colors", ("red", "green", "blue"))
    write_images(folder / "data" / "others", ("red", "green", "blue"), 1)
    scale: Scale = replace(recipe.scales["small"], data=("colors",), images=None, tested=None, seeds=1)
    scale = replace(scale, **changes)  # type: ignore[arg-type]
    return Bench(replace(recipe, scales={"small": scale}), "small", Sources(folder / "data", folder / "cache"))


def figures(bench: Bench) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for part in bench.recipe.parts(bench):
        found.setdefault(part.row, {}).update(part.work())
    return found


def test_the_decathlon_is_scored_by_twice_the_errors_of_individual_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top1s = {piggyback.CLASSIFIER: 10.0, piggyback.MASKS: 80.0, piggyback.NORMS: 100.0, piggyback.INDIVIDUAL: 60.0}
    monkeypatch.setattr(piggyback, "top1", lambda bench, row, name, seed: top1s[row])
    scores = {row: score["score"] for row, score in figures(bench_of(piggyback.DECATHLON, tmp_path)).items()}
    assert scores[piggyback.INDIVIDUAL] == pytest.approx(250)
    assert scores[piggyback.MASKS] == pytest.approx(1000 * (1 - 20 / 80) ** 2)
    assert scores[piggyback.NORMS] == pytest.approx(1000)
    assert scores[piggyback.CLASSIFIER] == 0


def test_the_chosen_block_is_best_on_held_out_images_whatever_the_test_images_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(70.0, 65.0), (80.0, 60.0), (75.0, 90.0)]  # held out, test
    monkeypatch.setattr(subtuning, "_tuned_alone", lambda bench, name, block, seed: found[block])
    monkeypatch.setattr(subtuning, "_end", lambda bench, row, name, seed: {name: 0.0})
    table = figures(bench_of(subtuning.PROFILE, tmp_path, options={"blocks": 3}))
    assert table[subtuning.CHOSEN] == {"colors": 60.0}
    assert [table[row]["colors"] for row in ("block 1", "block 2", subtuning.LAST)] == [65.0, 60.0, 90.0]


def test_corrupted_tasks_train_and_test_on_different_images_of_the_test_split(tmp_path: Path) -> None:
    bench = bench_of(subtuning.TABLE_2, tmp_path, options={"trained": 6})
    data = bench.task("colors")
    shifted = subtuning._shifted(bench, "contrast", 0)  # keeps no two pictures alike, and has no randomness
    assert (len(shifted.train), len(shifted.test)) == (6, len(data.test) - 6)
    pictures = [image.tobytes() for split in (shifted.train, shifted.test) for image in split.images]
    assert len(set(pictures)) == len(data.test)


def test_the_curve_is_the_mean_of_all_tasks_and_the_chosen_mixture_one_height(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (painting.SUPPORTED, painting.PATCHED, painting.MEAN, painting.CHOSEN)
    curves = {
        "colors": dict(zip(rows, ([1.0, 0.6], [0.2, 1.0], [0.6, 0.8], [0.9, 0.9]), strict=True)),
        "more": dict(zip(rows, ([0.8, 0.4], [0.4, 0.8], [0.6, 0.6], [0.7, 0.7]), strict=True)),
    }
    monkeypatch.setattr(painting, "_curve", lambda bench, name, seed: curves[name])
    options = {"supported": "others", "alphas": 2}
    table = figures(bench_of(painting.CURVE, tmp_path, data=("others", "colors", "more"), options=options))
    assert table[painting.SUPPORTED] == pytest.approx({"0": 90.0, "1": 50.0})
    assert table[painting.CHOSEN] == pytest.approx({"0": 80.0, "1": 80.0})


def test_patches_that_leave_the_base_alone_keep_its_accuracy_in_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "base_top1", lambda bench, name, seed: 80.0)
    monkeypatch.setattr(patching, "top1", lambda bench, row, name, seed: 40.0)
    bench = bench_of(patching.TABLE_2, tmp_path, data=("others", "colors"))
    assert patching.measure(bench, patching.ONE, "colors", 0) == harmonic_mean(80, 40) == pytest.approx(160 / 3)


def test_the_best_resolution_alone_costs_all_of_itself_and_the_cascade_what_it_saves_less(tmp_path: Path) -> None:
    fit = {"batch_size": 12, "augment": "none", "validation": 0.25}
    table = figures(bench_of(sharing.RESOLUTION_CASCADE, tmp_path, fit=fit, steps=1, options={"resolutions": (32, 64)}))
    assert table[sharing.BEST][sharing.COST] == 100
    assert (
        0 < table[sharing.CASCADE][sharing.COST] <= 100 + 100 / 4
    )  # at most the smaller one more, at a quarter the pixels


def test_the_lowest_skip_is_that_of_each_task_and_none_of_the_last_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [[{"0→1": 60.0}, {"0→1": 10.0, "0→2": 40.0, "1→2": 70.0}, {"0→1": 5.0}], [{"0→1": 20.0}, *[{}] * 2]]
    tasks[1][1:] = [{"0→1": 30.0, "0→2": 60.0, "1→2": 90.0}, {"0→1": 95.0}]
    monkeypatch.setattr(skips, "_weights", lambda bench, seed: tasks)
    table = figures(bench_of(skips.WEIGHTS, tmp_path, options={"depths": (1, 2, 1)}))
    assert table["stage 1"] == {"0→1": 40, skips.MEAN: 40}
    assert table["stage 2"] == {"0→1": 20, "0→2": 50, "1→2": 80, skips.MEAN: 50}
    assert table["stage 3"] == {"0→1": 50, skips.MEAN: 50}
    assert table[skips.LOWEST] == {skips.MEAN: 15}


def test_sizes_leave_out_the_last_layer_of_the_backbone_and_count_that_of_the_patch_in_its_file(tmp_path: Path) -> None:
    bench = bench_of(skips.SIZE, tmp_path, data=())
    table = figures(bench)
    module = bench.backbone().module
    features = sum(tensor.numel() for name, tensor in module.named_parameters() if not name.startswith("head.fc."))
    assert table[skips.BACKBONE]["tiny"] == features / 1000
    assert table[skips.LIMIT] == pytest.approx({"tiny": 0.31 * features / 1000})
    for row, modules in ((skips.ONE, 1), (skips.TWO, 2), (skips.FOUR, 4)):
        parameters = DeltaNetwork(modules=modules).count_parameters(bench.backbone())
        assert table[row]["tiny"] == parameters / 1000
        assert table[row]["tiny, file"] > 4 * (parameters + 100 * 160) / 1000
