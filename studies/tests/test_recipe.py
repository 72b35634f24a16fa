"""Every recipe: it can be planned at each of its scales, and its claims compare rows and columns that it fills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modelpatch.errors import MethodError, TrainingError
from modelpatch_studies.bench import Workbench
from modelpatch_studies.data import Sources
from modelpatch_studies.recipe import Recipe
from modelpatch_studies.registry import PAPERS, RECIPES, choose
from modelpatch_studies.transfer import TABLE_7

pytestmark = pytest.mark.slow

PLANS = [(recipe, scale) for recipe in RECIPES for scale in recipe.scales]


@pytest.mark.parametrize(("recipe", "scale"), PLANS, ids=[f"{recipe.name}-{scale}" for recipe, scale in PLANS])
def test_a_recipe_can_be_planned_and_its_claims_compare_cells_that_it_fills(recipe: Recipe, scale: str) -> None:
    bench = Workbench(recipe, scale, Sources(Path("nowhere"), Path("nowhere")))  # no data is read to plan
    jobs = list(recipe.jobs(bench))
    assert len({(job.row, job.columns, job.seed) for job in jobs}) == len(jobs)
    assert {job.seed for job in jobs} == set(range(recipe.scales[scale].seeds))
    assert recipe.scales[scale].seeds >= 2, "a standard error needs two"
    cells = {row: {column for job in jobs if job.row == row for column in job.columns} for row in {j.row for j in jobs}}
    whole = scale in ("small", "paper")  # other scales may lack rows of a claim, which is left out there
    for claim in recipe.claims:
        for better, worse in claim.pairs:
            assert better != worse
            if whole:
                assert cells[better] & cells[worse] >= ({*claim.columns, *claim.than} if scale == "small" else set())
                assert cells[better] & cells[worse]


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.claims], ids=lambda recipe: recipe.name)
def test_both_scales_of_a_paper_have_the_rows_that_claims_compare(recipe: Recipe) -> None:
    assert set(recipe.scales) >= {"small", "paper"}
    compared = {row for claim in recipe.claims for pair in claim.pairs for row in pair}
    for scale in ("small", "paper"):
        bench = Workbench(recipe, scale, Sources(Path("nowhere"), Path("nowhere")))
        assert compared <= {job.row for job in recipe.jobs(bench)}


def test_published_figures_are_of_cells_of_the_paper_scale() -> None:
    for recipe in RECIPES:
        if recipe.published:
            bench = Workbench(recipe, "paper", Sources(Path("nowhere"), Path("nowhere")))
            cells = {(job.row, column) for job in recipe.jobs(bench) for column in job.columns}
            assert recipe.published.keys() <= cells


def test_recipes_have_names_of_their_own() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    assert {recipe.paper for recipe in RECIPES} == set(PAPERS)


def test_recipes_are_chosen_by_paper_table_and_scale() -> None:
    assert choose("all") == list(RECIPES)
    assert {recipe.paper for recipe in choose("k-for-1")} == {"k-for-1"}
    assert choose("delta-networks", "7") == choose("delta-networks", "table-7") == [TABLE_7]
    assert all("mobilenet" in recipe.scales for recipe in choose("all", scale="mobilenet"))
    with pytest.raises(TrainingError, match="no recipes of 'resnet'"):
        choose("resnet")
    with pytest.raises(TrainingError, match=r"k-for-1 has no table '7'\. Expected one of: transfer, section-5\.1"):
        choose("k-for-1", "7")
    with pytest.raises(TrainingError, match=r"table-7 has no scale 'huge'\. Expected one of: small, paper"):
        choose("delta-networks", "7", "huge")


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"fit": {"epoch": 3}}, TrainingError, "fit has no setting 'epoch'. Expected one of: .*epochs"),
        ({"methods": {"row": "scale-bios"}}, MethodError, "scale-bios"),
    ],
)
def test_a_scale_with_a_wrong_name_is_refused_before_anything_runs(
    changes: dict[str, object], error: type[Exception], problem: str
) -> None:
    scale = replace(TABLE_7.scales["small"], **changes)  # type: ignore[arg-type]
    recipe = replace(TABLE_7, scales={"small": scale})
    with pytest.raises(error, match=problem):
        Workbench(recipe, "small", Sources(Path("nowhere"), Path("nowhere")))
