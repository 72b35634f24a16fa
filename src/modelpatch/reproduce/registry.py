"""All recipes, by paper and table."""

from __future__ import annotations

from collections.abc import Sequence

from modelpatch.errors import TrainingError
from modelpatch.reproduce import extensions, masks, painting, patching, piggyback, sharing, subtuning, units
from modelpatch.reproduce.adaptation import ADAPTATION
from modelpatch.reproduce.dense import DENSE, FCN
from modelpatch.reproduce.federated import FEDERATED
from modelpatch.reproduce.normalisation import RANDOM, RATES, TABLE_6, TRANSFER
from modelpatch.reproduce.recipe import Recipe
from modelpatch.reproduce.skips import SIZE, TABLE_5, WEIGHTS
from modelpatch.reproduce.transfer import LOW_DATA, SCRATCH, TABLE_7

RECIPES: tuple[Recipe, ...] = (
    *(patching.TABLE_2, patching.SEVERAL, TABLE_5, WEIGHTS, SIZE, ADAPTATION, DENSE, LOW_DATA, SCRATCH, TABLE_7),
    *(painting.CURVE, painting.MODES, painting.TRANSFER, painting.STABLE),
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


def choose(paper: str, table: str | None = None) -> Sequence[Recipe]:
    """The recipes of a paper, or of `all`, or the one for a table: by its name, or the number that the name ends with.

    Raises `TrainingError` for a paper or table that has none.
    """
    if paper != "all" and paper not in PAPERS:
        raise TrainingError(f"there are no recipes of {paper!r}. Papers: {', '.join(PAPERS)}, or all.")
    found = [recipe for recipe in RECIPES if paper in ("all", recipe.paper)]
    if table is None:
        return found
    chosen = [recipe for recipe in found if table in (recipe.table, recipe.table.removeprefix("table-"))]
    if not chosen:
        raise TrainingError(f"{paper} has no table {table!r}. It has: {', '.join(recipe.table for recipe in found)}.")
    return chosen
