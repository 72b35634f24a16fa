"""A recipe: one table or figure of a paper, with what it runs on, what it claims and how its figures are made.

    recipe = paper, table, rows x columns        small   real images, 2 cores, minutes
             claims: inequalities between rows    paper   the paper's own data sets, networks and hyperparameters

A recipe yields parts. A part is one training and its measurements, figures in some columns of one row for one seed, and
depends on nothing but its recipe, scale and seed: parts that are done are kept, and an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modelpatch.methods.registry import make_method
from modelpatch.train.settings import check_settings

if TYPE_CHECKING:
    from modelpatch_studies.bench import Bench

ScaleName = Literal["small", "paper"]
Figures = Mapping[str, float]  # by column


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a recipe runs with at one scale.

    `data` are names of folders or archives, or sources of `load_task` such as `bundled:digits`; `backbones` are
    specifications; `methods` spells the methods behind the recipe's rows; `fit` are settings of a fit. `images` limits the
    training images of a data set and `tested` its test images, `steps` replaces epochs by a number of steps. `options` are
    the recipe's own; `pretrained=False` among them takes networks as they are initialised.
    """

    data: tuple[str, ...]
    backbones: tuple[str, ...]
    methods: Mapping[str, str]
    fit: Mapping[str, Any]
    seeds: int
    images: int | None = None
    tested: int | None = None
    steps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `MethodError` or `TrainingError` for methods or settings that cannot be."""
        check_settings(dict(self.fit))
        for spelled in self.methods.values():
            make_method(spelled)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """An inequality of the table: in every pair the first row is at least `margin` above the second, on the mean of the
    columns (of all, or those named). With `than` it is by that much further above on these columns than on those.

    `name` is its number in the list of checkable claims, `paper` what the paper measured. `small` says whether it is known to
    hold in small settings too. `doubt` is why it may fail at the small scale, which is shown where it does.
    """

    name: str
    text: str
    pairs: tuple[tuple[str, str], ...]
    paper: str
    margin: float = 0.0
    columns: tuple[str, ...] = ()
    than: tuple[str, ...] = ()
    small: bool = False
    doubt: str = ""


@dataclass(frozen=True)
class Part:
    """The figures of one row in `columns` for one seed, once `work` is done."""

    row: str
    columns: tuple[str, ...]
    seed: int
    work: Callable[[], Figures]

    @property
    def name(self) -> str:
        return f"{self.row}, {', '.join(self.columns)}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One table or figure of `paper`, found as `PAPER/TABLE`.

    `parts` makes them for a bench. `published` are the paper's figures for cells that mean the same, by row and column;
    `unit` is what figures are in. `notes` says where the recipe leaves the paper. `numeric` columns are drawn as an axis,
    figures on a `logarithmic` one where they are of many sizes.
    """

    paper: str
    table: str
    title: str
    section: str
    notes: str
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...]
    parts: Callable[[Bench], Iterator[Part]]
    unit: str = "top-1, %"
    published: Mapping[tuple[str, str], float] = field(default_factory=dict)
    numeric: bool = False
    logarithmic: bool = False

    @property
    def name(self) -> str:
        return f"{self.paper}/{self.table}"
