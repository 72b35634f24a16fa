"""What recipes compute between their fits and their figures."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from modelpatch import Backbone
from modelpatch.methods import DeltaNetwork, make_method
from modelpatch.recipes import Accuracy, Point
from modelpatch.select import profile
from modelpatch_studies import (
    extensions,
    masks,
    normalisation,
    painting,
    patching,
    piggyback,
    rivals,
    sharing,
    skips,
    subtuning,
    units,
)
from modelpatch_studies.bench import Workbench
from modelpatch_studies.data import Sources
from modelpatch_studies.jobs import top1
from modelpatch_studies.recipe import Recipe, Scale
from tests.test_bench import write_images

pytestmark = pytest.mark.slow


def bench_of(recipe: Recipe, folder: Path, **changes: object) -> Workbench:
    write_images(folder / "data" / "colors", ("red", "green", "blue"))
    write_images(folder / "data" / "others", ("red", "green", "blue"), 1)
    scale: Scale = replace(recipe.scales["small"], data=("colors",), images=None, tested=None, seeds=1)
    scale = replace(scale, **changes)  # type: ignore[arg-type]
    return Workbench(replace(recipe, scales={"small": scale}), "small", Sources(folder / "data", folder / "cache"))


def known(bench: Workbench, found: Mapping[Hashable, object]) -> None:
    """Give the workbench what fits would find, under the keys that its recipe looks it up by."""
    for key, value in found.items():
        bench.once(key, partial(lambda value: value, value))


def figures(bench: Workbench) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for part in bench.recipe.jobs(bench):
        found.setdefault(part.row, {}).update(part.work())
    return found


def test_the_decathlon_is_scored_by_twice_the_errors_of_individual_networks(tmp_path: Path) -> None:
    top1s = {piggyback.CLASSIFIER: 10.0, piggyback.MASKS: 80.0, piggyback.NORMS: 100.0, piggyback.INDIVIDUAL: 60.0}
    bench = bench_of(piggyback.DECATHLON, tmp_path)
    known(bench, {("decathlon", row, 0): {"colors": top1 / 100} for row, top1 in top1s.items()})
    scores = {row: score["score"] for row, score in figures(bench).items()}
    assert scores[piggyback.INDIVIDUAL] == pytest.approx(250)
    assert scores[piggyback.MASKS] == pytest.approx(1000 * (1 - 20 / 80) ** 2)
    assert scores[piggyback.NORMS] == pytest.approx(1000)
    assert scores[piggyback.CLASSIFIER] == 0


def test_masks_are_compared_by_the_difficulty_of_their_tasks_and_by_halves_of_the_network(tmp_path: Path) -> None:
    zeros = {
        "colors": [10, 20, 30, 200],
        "others": [30, 20, 10, 0],
        "more": [0, 0, 0, 40],
    }  # of 100, 100, 100, 1000 weights
    weights = [100, 100, 100, 1000]
    counts = {name: np.array([found, weights]).T for name, found in zeros.items()}
    accuracies = {"colors": 50.0, "others": 90.0, "more": 20.0}
    bench = bench_of(masks.SPARSITY, tmp_path, data=tuple(zeros), options={"depth": 4})
    known(bench, {("classifier", 0): accuracies, **{("masked out", name, 0): counts[name] for name in counts}})
    table = figures(bench)
    assert table["colors"] == pytest.approx({"1": 10, "2": 20, "3": 30, "4": 20, "all": 20})
    assert table[masks.HARDER]["all"] == pytest.approx((40 / 13 + 20) / 2)  # more and colors
    assert table[masks.EASIER]["all"] == pytest.approx((60 / 13 + 20) / 2)  # others and colors
    assert table[masks.EARLY]["all"] == pytest.approx((10 + 20 + 30 + 20 + 0 + 0) / 6)
    assert table[masks.LATE]["all"] == pytest.approx((30 + 20 + 10 + 0 + 0 + 4) / 6)


def test_masks_and_the_base_are_the_same_in_either_order_and_packed_weights_are_not(tmp_path: Path) -> None:
    fit = {"batch_size": 12, "augment": "none", "image_size": 32}
    methods = {masks.MASKS: "piggyback(lr=0.005)", masks.PACKNET: "packnet"}
    bench = bench_of(masks.ORDER, tmp_path, data=("colors", "others"), fit=fit, steps=4, methods=methods)
    changed = {row: found[masks.CHANGED] for row, found in figures(bench).items()}
    assert changed.pop(f"{masks.PACKNET}, later") > 1
    assert set(changed.values()) == {0}
    for first, second in masks.both_orders(bench, masks.MASKS, 0).values():
        assert first is not second
        assert any((mask == 0).any() for name, mask in first.tensors.items() if name.startswith("mask/"))


def test_bits_of_a_mask_that_differ_are_counted(tmp_path: Path) -> None:
    bench = bench_of(masks.OVERHEAD, tmp_path, steps=1)
    patch = bench.fit(bench.backbone(), bench.task("colors"), bench.method(masks.MASKS), 0)
    name = next(name for name in patch.tensors if name.startswith("mask/"))
    other = patch.tensors[name].clone()
    other.flatten()[:3] ^= True
    count = sum(tensor.numel() for tensor in patch.tensors.values())
    assert masks.changed(patch, replace(patch, tensors={**patch.tensors, name: other})) == pytest.approx(300 / count)


def test_chance_is_the_share_of_the_most_frequent_class(tmp_path: Path) -> None:
    bench = bench_of(piggyback.INITIALISATION, tmp_path, data=("colors", "others"), options={"other": "others"})
    chance = next(part for part in bench.recipe.jobs(bench) if part.row == piggyback.CHANCE)
    assert chance.work() == pytest.approx({"colors": 100 / 3})


def test_the_chosen_block_is_best_on_held_out_images_whatever_the_test_images_say(tmp_path: Path) -> None:
    found = [(70.0, 65.0), (80.0, 60.0), (75.0, 90.0)]  # held out, test
    bench = bench_of(subtuning.PROFILE, tmp_path, steps=1, options={"blocks": 3})
    known(bench, {("block", "colors", block, 0): pair for block, pair in enumerate(found)})
    table = figures(bench)
    assert table[subtuning.CHOSEN] == {"colors": 60.0}
    assert [table[row]["colors"] for row in ("block 1", "block 2", subtuning.LAST)] == [65.0, 60.0, 90.0]


def test_corrupted_tasks_train_and_test_on_different_images_of_the_test_split(tmp_path: Path) -> None:
    bench = bench_of(subtuning.TABLE_2, tmp_path, options={"trained": 6})
    data = bench.task("colors")
    shifted = subtuning.shifted(bench, "contrast", 0)  # keeps no two pictures alike, and has no randomness
    assert (len(shifted.train), len(shifted.test)) == (6, len(data.test) - 6)
    pictures = [image.tobytes() for split in (shifted.train, shifted.test) for image in split.images]
    assert len(set(pictures)) == len(data.test)


def test_the_curve_is_the_mean_of_all_tasks_and_the_chosen_mixture_one_height(tmp_path: Path) -> None:
    rows = (painting.SUPPORTED, painting.PATCHED, painting.MEAN, painting.CHOSEN)
    curves = {
        "colors": dict(zip(rows, ([1.0, 0.6], [0.2, 1.0], [0.6, 0.8], [0.9, 0.9]), strict=True)),
        "more": dict(zip(rows, ([0.8, 0.4], [0.4, 0.8], [0.6, 0.6], [0.7, 0.7]), strict=True)),
    }
    options = {"supported": "others", "alphas": 2}
    bench = bench_of(painting.CURVE, tmp_path, data=("others", "colors", "more"), options=options)
    bench.latest("curves", 0, lambda: list(curves.values()))
    table = figures(bench)
    assert table[painting.SUPPORTED] == pytest.approx({"0": 90.0, "1": 50.0})
    assert table[painting.CHOSEN] == pytest.approx({"0": 80.0, "1": 80.0})


def test_a_rival_is_shown_at_the_point_that_held_out_images_choose(tmp_path: Path) -> None:
    def point(place: float, held: float, tested: float) -> Point:
        return Point((place,), {"new": Accuracy("patched", held, tested), "old": Accuracy("supported", held, 0.4)})

    recipe = replace(rivals.RIVALS, scales={"small": painting.SMALL})
    bench = bench_of(recipe, tmp_path, data=("others", "colors"), options={"supported": "others", "alphas": 2})
    curve = (point(0.1, 0.9, 0.6), point(0.2, 0.5, 0.8))
    bench.latest("frontiers", 0, lambda: [dict.fromkeys(("paint", *rivals.BASELINES), curve)])
    shown = {painting.SUPPORTED: 40.0, painting.PATCHED: 60.0, painting.MEAN: 50.0}
    table = figures(bench)
    assert list(table) == ["paint", *rivals.BASELINES]
    assert all(row == pytest.approx(shown) for row in table.values())


def test_each_supported_set_chooses_alpha_on_its_own_held_out_images() -> None:
    """`firm` loses nothing along alpha, `weak` more than the patched task gains beyond 0.5."""

    def point(alpha: float, patched: float, firm: float, weak: float) -> Point:
        found = {"new": Accuracy("patched", patched, 0.1)}
        found |= {"firm": Accuracy("supported", firm, 0.9), "weak": Accuracy("supported", weak, 0.0)}
        return Point((alpha,), found)

    base = point(0, 0.5, 0.9, 0.9)
    curve = (base, point(0.5, 0.8, 0.9, 0.7), point(1, 0.9, 0.9, 0.2))
    choose = partial(painting.choose_for, curve, base, "mean")
    alphas = {kept: choose(kept).weights[0] for kept in (("firm",), ("weak",), ("firm", "weak"))}
    assert alphas == {("firm",): 1, ("weak",): 0.5, ("firm", "weak"): 0.5}
    assert choose(("weak",)).tasks.keys() == {"new", "firm", "weak"}


def test_heads_of_means_answer_any_classes_and_know_the_images_they_are_means_of(tmp_path: Path) -> None:
    bench = bench_of(painting.TRANSFER, tmp_path, options={"heads": "means"})
    data = bench.task("colors")
    heads = painting.open_heads(bench, (data,), 0)
    whole, some = heads(data.classes), heads(data.classes[1:])
    torch.testing.assert_close(whole.weight[1:], some.weight)
    features = bench.reader(bench.backbone(), 0).base_features(data.test)
    assert float((whole(features).argmax(1).numpy() == data.test.labels).mean()) > 2 / 3


def test_patches_that_leave_the_base_alone_keep_its_accuracy_in_the_mean(tmp_path: Path) -> None:
    options = {"supported": "others", "alphas": 2}
    bench = bench_of(patching.TABLE_2, tmp_path, data=("others", "colors"), steps=4, options=options)
    bench.latest("base", 0, lambda: 80.0)
    own = top1(bench, patching.PROBE, "colors", 0)
    assert patching.measure(bench, patching.PROBE, "colors", 0) == pytest.approx(2 * 80 * own / (80 + own))


def test_the_best_resolution_alone_costs_all_of_itself_and_the_cascade_what_it_saves_less(tmp_path: Path) -> None:
    fit = {"batch_size": 12, "augment": "none", "validation": 0.25}
    table = figures(bench_of(sharing.RESOLUTION_CASCADE, tmp_path, fit=fit, steps=1, options={"resolutions": (32, 64)}))
    assert table[sharing.BEST][sharing.COST] == 100
    assert (
        0 < table[sharing.CASCADE][sharing.COST] <= 100 + 100 / 4
    )  # at most the smaller one more, at a quarter the pixels


def test_the_best_of_a_group_of_units_is_that_of_held_out_images(tmp_path: Path) -> None:
    bench = bench_of(units.PAIRS, tmp_path, fit={"batch_size": 12, "image_size": 32, "augment": "none"}, steps=1)
    blocks = [block.name for block in bench.backbone().chain.blocks]
    groups = {"one": [(blocks[-1],)], "two": [(blocks[-2],), (blocks[-1],)]}
    data = bench.task("colors")
    found = units.winners(bench, data, groups, 0)
    settings = bench.settings(data, 0)
    profiled = profile(bench.backbone(), data, bench.method(subtuning.BLOCK), same_steps=True, **settings)
    score = {row.blocks: row.score.top1 for row in profiled.rows}
    assert found["one"] == (blocks[-1],)
    assert score[found["two"]] == max(score[unit] for unit in groups["two"])


def test_pairs_are_neighbours_or_apart_and_the_best_pair_is_of_all(tmp_path: Path) -> None:
    groups = units.groups_of(bench_of(units.PAIRS, tmp_path))
    pairs = [set(groups[row]) for row in (units.ADJACENT, units.APART, units.PAIR)]
    assert [len(pair) for pair in pairs] == [7, 21, 28]
    assert pairs[0] | pairs[1] == pairs[2]
    assert len(groups[units.LAST_TWO]) == 2
    assert not set(groups[units.LAST_TWO]) & set(groups[units.OTHERS])


def test_best_rates_are_those_of_held_out_images_on_either_side_of_the_other_method(tmp_path: Path) -> None:
    held = {normalisation.BOTH: [10, 20, 50, 30], normalisation.TUNED: [40, 60, 55, 20]}  # best at 0.01 and at 0.003
    test = {normalisation.BOTH: [1, 2, 3, 4], normalisation.TUNED: [5, 6, 7, 8]}
    rates = (0.001, 0.003, 0.01, 0.03)

    def rated(folder: Path) -> dict[str, dict[str, float]]:
        bench = bench_of(normalisation.RATES, folder, options={"learning_rates": rates})
        for row in held:
            figures_of = zip(rates, held[row], test[row], strict=True)
            known(bench, {("rate", row, "colors", rate, 0): pair for rate, *pair in figures_of})
        known(bench, {("rate", normalisation.LAST, "colors", 0, 0): (0, 9)})
        return figures(bench)

    table = rated(tmp_path)
    assert list(table[normalisation.TUNED].values()) == [5, 6, 7, 8]
    rows = (normalisation.BELOW, normalisation.FROM, normalisation.ABOVE, normalisation.UP_TO, normalisation.LAST)
    assert [set(table[row].values()) for row in rows] == [{6}, {7}, {3}, {2}, {9}]
    held[normalisation.BOTH] = [90, 20, 50, 30]  # the lowest rate is the best: none is below
    assert set(rated(tmp_path / "again")[normalisation.BELOW].values()) == {9}


def test_a_rate_at_which_training_diverges_has_nothing_right(tmp_path: Path) -> None:
    fit = {"batch_size": 12, "image_size": 32, "augment": "none"}
    bench = bench_of(normalisation.RATES, tmp_path, fit=fit, steps=6, options={"learning_rates": (1e9,)})
    jobs = [job for job in bench.recipe.jobs(bench) if job.row == normalisation.TUNED]
    assert [job.work() for job in jobs] == [{"1e+09": 0}]


def test_a_block_beside_the_base_adds_itself_and_all_that_follows(tmp_path: Path) -> None:
    bench = bench_of(extensions.INFERENCE, tmp_path)
    backbone: Backbone = bench.backbone()
    macs = [segment.macs for segment in backbone.chain]
    for block in backbone.chain.blocks:
        added = extensions.added_operations(bench, make_method(f"subset(blocks={block.name})"))
        assert added == pytest.approx(100 * sum(macs[block.index :]) / sum(macs)), block.name
    assert extensions.added_operations(bench, make_method("full-finetune")) == pytest.approx(100)


def test_pruned_rows_have_fewer_parameters_and_stand_beside_half_the_gain(tmp_path: Path) -> None:
    bench = bench_of(extensions.PRUNING, tmp_path)
    top1s = dict.fromkeys(bench.scale.methods, 70.0) | {extensions.PROBE: 40.0, extensions.WHOLE: 60.0}
    known(bench, {("top1", row, "colors", 0): top1 for row, top1 in top1s.items()})
    table = figures(bench)
    assert table[extensions.HALFWAY] == {"colors": 50}
    left = [
        table[row][extensions.PARAMETERS]
        for row in (extensions.WHOLE, extensions.HALF, extensions.TENTH, extensions.LEAST)
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] == 100
    assert left[-1] < 3
    assert extensions.PARAMETERS not in table[extensions.PROBE]


def test_the_lowest_skip_is_that_of_each_task_and_none_of_the_last_stage(tmp_path: Path) -> None:
    tasks = [[{"0→1": 60.0}, {"0→1": 10.0, "0→2": 40.0, "1→2": 70.0}, {"0→1": 5.0}], [{"0→1": 20.0}, *[{}] * 2]]
    tasks[1][1:] = [{"0→1": 30.0, "0→2": 60.0, "1→2": 90.0}, {"0→1": 95.0}]
    bench = bench_of(skips.WEIGHTS, tmp_path, options={"depths": (1, 2, 1)})
    bench.latest("skip weights", 0, lambda: tasks)
    table = figures(bench)
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
