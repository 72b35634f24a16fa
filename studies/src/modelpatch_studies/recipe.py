"""A recipe: one table or figure of a paper, with the data and networks it needs, its claims, and the jobs that fill it.

    recipe = paper, table, rows x columns        small   real images, 2 cores, minutes
             claims: inequalities between rows    paper   the paper's own data sets, networks and hyperparameters

A job is one training and its measurements: figures in some columns of one row for one seed. It depends on nothing but its
recipe, scale and seed, so that finished jobs are kept on disk and an interrupted run continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from modelpatch.errors import TrainingError
from modelpatch.methods import make_method
from modelpatch.train import FitSettings

Figures = Mapping[str, float]  # by column


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Data, networks, methods and settings of a recipe at one scale.

    `data`: names of folders or archives, or sources of `load_task` such as `bundled:digits`. `backbones`: specifications.
    `methods`: the method of each row, spelled out. `fit`: settings of a fit. `images` and `tested` limit the training and the
    test images of a data set; `steps` replaces epochs by a number of steps. `options` are the recipe's own; with
    `pretrained=False` among them networks keep their initial weights.
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
        """Raise `MethodError` or `TrainingError` for an unknown method or setting."""
        known = {field.name for field in fields(FitSettings)}
        if unknown := sorted(self.fit.keys() - known):
            raise TrainingError(f"fit has no setting {unknown[0]!r}. Expected one of: {', '.join(sorted(known))}.")
        for spelled in self.methods.values():
            make_method(spelled)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def mobilenet(**given: Any) -> Scale:
    """The third scale of recipes that have one: an ImageNet MobileNetV2 over whole real data sets, three seeds."""
    return Scale(**{"backbones": ("timm:mobilenetv2_100.ra_in1k",), "seeds": 3, **given})


@dataclass(frozen=True)
class Claim:
    """An inequality: in every pair the first row is at least `margin` above the second, on the mean of `columns`.

    With `than` the difference on `columns` is compared with that on the columns `than`. `name` is the claim's number,
    `paper` the paper's measurement. `small`: true if the claim is known to hold in small settings too. `doubt`: the likely
    reason for a failure at the small scale, printed where it fails.
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
class Job:
    """One training: `work` returns the figures of one row in `columns` for one seed."""

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

    `jobs` yields the jobs for a `Workbench`. `published`: the paper's figures of comparable cells, by row and column. `unit`:
    the unit of all figures. `notes`: the differences from the paper. `numeric` columns are drawn as an axis, figures on a
    `logarithmic` one.
    """

    paper: str
    table: str
    title: str
    section: str
    notes: str
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...]
    jobs: Callable[..., Iterable[Job]]
    unit: str = "top-1, %"
    published: Mapping[tuple[str, str], float] = field(default_factory=dict)
    numeric: bool = False
    logarithmic: bool = False

    @property
    def name(self) -> str:
        return f"{self.paper}/{self.table}"
