"""All recipes, by paper and table."""

from __future__ import annotations

from collections.abc import Sequence

from modelpatch.errors import TrainingError
from modelpatch_studies import extensions, masks, painting, patching, piggyback, sharing, subtuning, units
from modelpatch_studies.adaptation import ADAPTATION
from modelpatch_studies.dense import DENSE, FCN
from modelpatch_studies.federated import FEDERATED
from modelpatch_studies.normalisation import RANDOM, RATES, TABLE_6, TRANSFER
from modelpatch_studies.recipe import Recipe
from modelpatch_studies.rivals import RIVALS
from modelpatch_studies.skips import SIZE, TABLE_5, WEIGHTS
from modelpatch_studies.transfer import LOW_DATA, SCRATCH, TABLE_7
from modelpatch_studies.words import EXPERIMENTS

RECIPES: tuple[Recipe, ...] = (
    *(patching.TABLE_2, patching.SEVERAL, TABLE_5, WEIGHTS, SIZE, ADAPTATION, DENSE, LOW_DATA, SCRATCH, TABLE_7),
    *(painting.CURVE, painting.MODES, painting.TRANSFER, painting.STABLE, RIVALS, *EXPERIMENTS),
    *(TRANSFER, RANDOM, TABLE_6, RATES, sharing.RESOLUTIONS, sharing.RESOLUTION_CASCADE, sharing.TASKS, FEDERATED),
    *(subtuning.PROFILE, subtuning.TABLE_1, subtuning.TABLE_2, units.PAIRS, units.SAMPLES),
    *(extensions.INFERENCE, extensions.SIAMESE_WAYS, extensions.PRUNING, extensions.ACTIVE_LEARNING),
    *(
        piggyback.TABLE_1,
        piggyback.INITIALISATION,
        piggyback.DECATHLON,
        masks.SPARSITY,
        masks.ORDER,
        masks.OVERHEAD,
        FCN,
    ),
)
PAPERS = tuple(dict.fromkeys(recipe.paper for recipe in RECIPES))


def choose(paper: str, table: str | None = None, scale: str | None = None) -> Sequence[Recipe]:
    """The recipes of a paper, of `all`, or of one table by its name or by the number that the name ends with.

    With `scale` only recipes that have it. Raises `TrainingError` for a paper, table or scale that does not exist.
    """
    if paper != "all" and paper not in PAPERS:
        raise TrainingError(f"there are no recipes of {paper!r}. Expected one of: {', '.join(PAPERS)}, or all.")
    found = [recipe for recipe in RECIPES if paper in ("all", recipe.paper)]
    if table is not None:
        chosen = [recipe for recipe in found if table in (recipe.table, recipe.table.removeprefix("table-"))]
        if not chosen:
            tables = ", ".join(recipe.table for recipe in found)
            raise TrainingError(f"{paper} has no table {table!r}. Expected one of: {tables}.")
        found = chosen
    having = [recipe for recipe in found if scale is None or scale in recipe.scales]
    if not having:
        known = ", ".join(dict.fromkeys(name for recipe in found for name in recipe.scales))
        raise TrainingError(f"{found[0].name} has no scale {scale!r}. Expected one of: {known}.")
    return having
