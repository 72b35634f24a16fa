"""Every recipe: both scales, claims over rows that it makes, and the papers' own settings at the paper scale."""

from __future__ import annotations

import pytest

from modelpatch.errors import TrainingError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.method import Composite
from modelpatch.methods.registry import make_method
from modelpatch.train.settings import check_settings
from modelpatch_studies import masks, painting, piggyback, subtuning
from modelpatch_studies.adaptation import ADAPTATION
from modelpatch_studies.bench import Workbench
from modelpatch_studies.data import Sources
from modelpatch_studies.normalisation import RANDOM, TABLE_6
from modelpatch_studies.recipe import Recipe
from modelpatch_studies.registry import PAPERS, RECIPES, choose
from modelpatch_studies.skips import TABLE_5
from modelpatch_studies.transfer import LOW_DATA, SCRATCH, TABLE_7

EVERY = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
SCALES = pytest.mark.parametrize("scale", ["small", "paper"])


def members(spelled: str) -> dict[str, object]:
    method = make_method(spelled)
    return {one.name: one for one in (method.methods if isinstance(method, Composite) else (method,))}


@EVERY
@SCALES
def test_a_recipe_can_be_planned_at_both_scales_and_its_claims_compare_rows_it_makes(
    recipe: Recipe, scale: str, tmp_path: object
) -> None:
    bench = Workbench(recipe, scale, Sources(folder=None, cache=None))  # type: ignore[arg-type]  no data is read to plan
    parts = list(recipe.jobs(bench))
    rows = {part.row for part in parts}
    assert recipe.claims
    for claim in recipe.claims:
        assert {row for pair in claim.pairs for row in pair} <= rows
        for better, worse in claim.pairs:
            columns = [{c for part in parts if part.row == row for c in part.columns} for row in (better, worse)]
            assert columns[0] & columns[1]
    assert len({(part.row, part.columns, part.seed) for part in parts}) == len(parts)
    assert {part.seed for part in parts} == set(range(recipe.scales[scale].seeds))
    assert recipe.scales[scale].seeds >= 2, "a standard error needs two"


@EVERY
def test_a_recipe_says_where_it_is_from_and_where_it_leaves_the_paper(recipe: Recipe) -> None:
    assert set(recipe.scales) == {"small", "paper"}
    assert recipe.paper in PAPERS
    assert recipe.title
    assert recipe.section
    assert recipe.notes.endswith(".")


def test_recipes_have_names_of_their_own() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


def test_recipes_are_chosen_by_paper_and_by_table() -> None:
    assert choose("all") == list(RECIPES)
    assert {recipe.paper for recipe in choose("k-for-1")} == {"k-for-1"}
    assert choose("delta-networks", "7") == choose("delta-networks", "table-7") == [TABLE_7]
    with pytest.raises(TrainingError, match="no recipes of 'resnet'"):
        choose("resnet")
    with pytest.raises(TrainingError, match=r"k-for-1 has no table '7'\. Expected one of: transfer, section-5\.1"):
        choose("k-for-1", "7")


# the papers' settings, from the specification of the methods ---------------------------------------------------------


@pytest.mark.parametrize("recipe", [LOW_DATA, TABLE_7, SCRATCH], ids=lambda recipe: recipe.name)
def test_transfer_follows_table_7_at_the_paper_scale(recipe: Recipe) -> None:
    """SGD-Nesterov 0.9, rate 0.01 (backbone a tenth), decay 5e-4, batches of 48, 20 x 500 steps, a tenth at epoch 12 of 20."""
    scale = recipe.scales["paper"]
    settings = check_settings(dict(scale.fit))
    assert (settings.batch_size, scale.steps, settings.warmup) == (48, 20 * 500, 0)
    assert [settings.factor(step, 10_000) for step in (0, 5_999, 6_000, 9_999)] == [1, 1, 0.1, 0.1]
    found = [one for spelled in scale.methods.values() for one in members(spelled).values()]
    for one in found:
        assert (one.optimizer, one.head_lr, one.weight_decay) == ("sgd", 0.01, 5e-4)  # type: ignore[attr-defined]
    tuned = {one.lr for one in found if isinstance(one, FullFinetune)}
    assert tuned == ({0.01} if recipe is SCRATCH else {0.001})
    assert {one.modules for one in found if isinstance(one, DeltaNetwork)} == {4}


def test_low_data_has_the_paper_sampling_rates() -> None:
    for recipe, scale in ((LOW_DATA, "small"), (LOW_DATA, "paper"), (TABLE_7, "paper")):
        assert tuple(recipe.scales[scale].options["rates"]) == (15, 30, 50, 100)


@pytest.mark.parametrize("recipe", [RANDOM, TABLE_6], ids=lambda recipe: recipe.name)
def test_scale_and_bias_follow_their_paper_at_its_scale(recipe: Recipe) -> None:
    """RMSProp 0.045, 0.98 every 2.5 epochs, 50K steps at least, 224 px; epsilon 1 as in TF-slim."""
    scale = recipe.scales["paper"]
    settings = check_settings({**scale.fit, "epochs": 10})
    assert settings.image_size == 224
    assert scale.steps == 50_000
    assert settings.factor(0, 400) == 1
    assert settings.factor(100, 400) == pytest.approx(0.98)  # a quarter of ten epochs
    assert settings.factor(400, 400) == pytest.approx(0.98**4)
    for spelled in scale.methods.values():
        for one in members(spelled).values():
            assert (one.optimizer, one.head_lr) == ("rmsprop", 0.045)  # type: ignore[attr-defined]


def test_adaptation_puts_modules_into_four_stages_for_fifty_epochs() -> None:
    scale = ADAPTATION.scales["paper"]
    assert scale.fit["epochs"] == 50
    assert len(scale.options["pairs"]) == 3
    delta = members(scale.methods["network + Δ"])["delta"]
    assert isinstance(delta, DeltaNetwork)
    assert (delta.modules, delta.start) == (4, "random")


def test_the_ablations_of_skips_differ_from_the_modules_in_all_four_stages_alone() -> None:
    scale = TABLE_5.scales["paper"]
    assert (scale.fit["epochs"], scale.fit["batch_size"]) == (50, 128)
    found = [one for spelled in scale.methods.values() if isinstance(one := make_method(spelled), DeltaNetwork)]
    assert {one.modules for one in found} == {4}
    assert len({(one.skips, one.batch_norm) for one in found}) == len(found) == len(scale.methods) - 1


def test_subtuning_follows_its_paper_at_its_scale() -> None:
    """AdamW at 1e-3 (the probe 1e-2), decay 0.01, batches of 256; 10, 50 and 15 epochs; blocks by 5 folds."""
    for recipe, epochs in ((subtuning.PROFILE, 10), (subtuning.TABLE_1, 50), (subtuning.TABLE_2, 15)):
        scale = recipe.scales["paper"]
        settings = check_settings(dict(scale.fit))
        assert (settings.batch_size, settings.epochs, settings.schedule) == (256, epochs, "cosine")
        for row in {subtuning.TUNED, subtuning.SUBTUNING, subtuning.BLOCK} & scale.methods.keys():
            method = make_method(scale.methods[row])
            assert (method.optimizer, method.lr, method.weight_decay) == ("adamw", 1e-3, 0.01)
        assert make_method(scale.methods[subtuning.PROBE]).head_lr == 0.01
    for recipe in (subtuning.TABLE_1, subtuning.TABLE_2):
        assert recipe.scales["paper"].options["folds"] == 5
    assert recipe.scales["paper"].options["trained"] == 1000
    assert len(recipe.scales["paper"].options["kinds"]) == 15


def test_piggyback_follows_its_paper_at_its_scale() -> None:
    """Adam at 1e-4 for masks and head, without decay, batches of 32, 30 epochs and a tenth after 15; decathlon 60 and 45."""
    own = (piggyback.TABLE_1, piggyback.INITIALISATION, masks.SPARSITY, masks.ORDER, masks.OVERHEAD)
    for recipe, epochs, drop in (*((one, 30, 15) for one in own), (piggyback.DECATHLON, 60, 45)):
        scale = recipe.scales["paper"]
        settings = check_settings(dict(scale.fit))
        assert (settings.batch_size, settings.epochs) == (32, epochs)
        assert [settings.factor(epoch, epochs) for epoch in (drop - 1, drop)] == [1, 0.1]
        method = make_method(scale.methods[piggyback.MASKS])
        assert (method.lr, method.head_lr, method.weight_decay) == (1e-4, 1e-4, 0)
    assert scale.options["max_errors"]["imagenet"] == 80.26
    assert set(scale.data) == set(scale.options["max_errors"])


def test_paint_follows_its_paper_at_its_scale() -> None:
    """AdamW at 1e-5, decay 0.1, batches of 128, 2,000 steps with 200 of warm-up, alpha in tenths."""
    for recipe in (painting.CURVE, painting.MODES, painting.TRANSFER, painting.STABLE):
        scale = recipe.scales["paper"]
        settings, method = check_settings(dict(scale.fit)), make_method(scale.methods[painting.PATCHED])
        assert (method.optimizer, method.lr, method.weight_decay) == ("adamw", 1e-5, 0.1)
        assert (settings.batch_size, scale.steps, settings.warmup * scale.steps) == (128, 2000, 200)
        assert scale.options["alphas"] == 11


def test_every_small_scale_runs_over_the_bundled_backbone() -> None:
    assert {spec for recipe in RECIPES for spec in recipe.scales["small"].backbones} == {"bundled:tiny"}
