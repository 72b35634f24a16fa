"""Recipes on a bench: real fits of tiny tasks, parts that are kept, verdicts that follow from figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import SHARED
from dense import write_masks, write_voc
from modelpatch.errors import DataError, TrainingError
from modelpatch.train import fit
from modelpatch_studies.backbones import retrained, untrained
from modelpatch_studies.bench import Workbench
from modelpatch_studies.data import Sources
from modelpatch_studies.dense import DENSE, FCN
from modelpatch_studies.pages import claim_cells, doubts, markdown, overview, write_outcome, write_page
from modelpatch_studies.recipe import Claim, Job, Recipe, Scale
from modelpatch_studies.registry import RECIPES
from modelpatch_studies.results import Results

pytestmark = pytest.mark.slow

TINY = Scale(
    data=("colors",),
    backbones=("bundled:tiny",),
    methods={"head": "linear-probe", "body": "scale-bias"},
    fit={"epochs": 1, "image_size": 32},
    seeds=2,
)


def write_images(root: Path, classes: tuple[str, ...], seed: int = 0) -> Path:
    """Twelve training and six test pictures a class, each class of a colour of its own."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", 12), ("test", 6)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[:, :, number % 3] += 120
                Image.fromarray(pixels).save(root / split / name / f"{image}.png")
    return root


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("made") / "colors", ("red", "green", "blue"))


@pytest.fixture
def sources(colors: Path, tmp_path: Path) -> Sources:
    shutil.copytree(colors, tmp_path / "data" / "colors")
    return Sources(tmp_path / "data", tmp_path / "cache")


def make_recipe(parts: Callable[[Workbench], Iterator[Job]], *claims: Claim, scale: Scale = TINY) -> Recipe:
    return Recipe(
        paper="paper", table="table-1", title="a table", section="section 1", notes="None.",
        scales={"small": scale, "paper": scale}, claims=claims, jobs=parts,
    )  # fmt: skip


def fixed(values: dict[str, list[float]], done: list[str]) -> Callable[[Workbench], Iterator[Job]]:
    """Parts that give the value of a row and seed in two columns, the second ten higher, and say that they ran."""

    def work(row: str, seed: int) -> dict[str, float]:
        done.append(f"{row} {seed}")
        return {"a": values[row][seed], "b": values[row][seed] + 10}

    def parts(bench: Workbench) -> Iterator[Job]:
        for seed in bench.seeds:
            for row in values:
                yield Job(row, ("a", "b"), seed, partial(work, row, seed))

    return parts


def run(recipe: Recipe, sources: Sources, folder: Path, **options: object) -> Results:
    return Workbench(recipe, "small", sources, **options).run(folder)  # type: ignore[arg-type]


# running ------------------------------------------------------------------------------------------------------------


def test_means_and_standard_errors_are_those_of_the_seeds(sources: Sources, tmp_path: Path) -> None:
    outcome = run(make_recipe(fixed({"x": [50.0, 54.0]}, [])), sources, tmp_path / "out")
    mean = outcome.mean("x", "a")
    assert mean is not None
    assert mean.value == 52
    assert mean.error == pytest.approx(2)  # deviation √8 over √2 seeds
    assert outcome.mean("x", "c") is None
    assert (outcome.rows, outcome.columns) == (["x"], ["a", "b"])


def test_an_interrupted_run_goes_on_with_the_part_that_was_not_done(sources: Sources, tmp_path: Path) -> None:
    done: list[str] = []
    recipe = make_recipe(fixed({"x": [1.0, 2.0], "y": [3.0, 4.0]}, done))
    stop = {"left": 3}

    def interrupted(bench: Workbench) -> Iterator[Job]:
        def work(part: Job) -> object:
            stop["left"] -= 1
            if stop["left"] < 0:
                raise KeyboardInterrupt
            return part.work()

        for part in recipe.jobs(bench):
            yield replace(part, work=partial(work, part))

    with pytest.raises(KeyboardInterrupt):
        run(replace(recipe, jobs=interrupted), sources, tmp_path / "out")
    assert done == ["x 0", "y 0", "x 1"]
    outcome = run(recipe, sources, tmp_path / "out")
    assert done == ["x 0", "y 0", "x 1", "y 1"]
    assert outcome.figures["y", "b"] == {0: 13, 1: 14}
    run(recipe, sources, tmp_path / "out")
    assert len(done) == 4


def test_other_settings_images_and_seeds_are_other_parts(sources: Sources, tmp_path: Path) -> None:
    done: list[str] = []
    recipe = make_recipe(fixed({"x": [1.0, 2.0, 3.0]}, done))
    run(recipe, sources, tmp_path / "out", seeds=1)
    run(recipe, sources, tmp_path / "out", seeds=3)
    assert done == ["x 0", "x 1", "x 2"], "more seeds keep what is there"
    longer = replace(TINY, fit={"epochs": 2, "image_size": 32})
    run(replace(recipe, scales={"small": longer}), sources, tmp_path / "out", seeds=1)
    assert len(done) == 4
    image = next((sources.folder / "colors" / "train" / "red").iterdir())
    Image.new("RGB", (32, 32)).save(image)
    run(recipe, sources, tmp_path / "out", seeds=1)
    assert len(done) == 5


def test_a_part_must_give_the_columns_it_names(sources: Sources, tmp_path: Path) -> None:
    def parts(bench: Workbench) -> Iterator[Job]:
        yield Job("x", ("a",), 0, lambda: {"b": 1.0})

    with pytest.raises(TrainingError, match=r"x, a, seed 0 gave figures for \['b'\]"):
        run(make_recipe(parts), sources, tmp_path / "out")


def test_fits_follow_the_scale_and_the_seed(sources: Sources, tmp_path: Path) -> None:
    scale = replace(TINY, images=18, tested=9, steps=5, fit={"batch_size": 8, "image_size": 32})
    bench = Workbench(make_recipe(fixed({}, []), scale=scale), "small", sources, seed=7)
    data = bench.task("colors")
    assert (len(data.train), len(data.test)) == (18, 9)
    assert bench.settings(data, 7) == {
        "batch_size": 8,
        "image_size": 32,
        "seed": 7,
        "epochs": 3,
    }  # 5 x 8 / 18 is above 2
    patch = bench.fit(bench.backbone(), data, bench.method("head"), 7)
    assert patch.created["settings"]["seed"] == 7
    assert list(bench.seeds) == [7, 8]


# verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "margin", "word"),
    [
        ([52.0, 53.0], 0.0, "holds"),  # differences 2 and 3: 2.5 ± 0.5
        ([49.0, 54.0], 0.0, "holds, within the error"),  # -1 and 4: 1.5 ± 2.5
        ([49.0, 48.0], 0.0, "does not hold"),
        ([52.0, 53.0], 4.0, "does not hold"),
        ([50.0, 50.0], 0.0, "holds, equal"),  # at least as good in every seed
    ],
)
def test_a_verdict_follows_from_paired_differences(
    values: list[float], margin: float, word: str, sources: Sources, tmp_path: Path
) -> None:
    claim = Claim("C1", "x is above y", (("x", "y"),), "always", margin=margin)
    outcome = run(make_recipe(fixed({"x": values, "y": [50.0, 50.0]}, []), claim), sources, tmp_path / "out")
    assert outcome.verdicts[0].word == word


def test_a_claim_holds_if_all_its_pairs_do_and_one_seed_makes_nothing_certain(sources: Sources, tmp_path: Path) -> None:
    claim = Claim("C1", "x is above both", (("x", "y"), ("x", "z")), "always")
    recipe = make_recipe(fixed({"x": [5.0, 5.0], "y": [1.0, 1.0], "z": [9.0, 9.0]}, []), claim)
    outcome = run(recipe, sources, tmp_path / "out")
    (verdict,) = outcome.verdicts
    assert [one.mean.value for one in verdict.differences] == [4, -4]
    assert [(one.cells, one.of) for one in verdict.differences] == [(2, 2), (0, 2)]
    assert not verdict.holds
    assert verdict.certain
    assert run(recipe, sources, tmp_path / "out", seeds=1).verdicts[0].word == "does not hold, one seed"


def test_a_claim_of_two_columns_says_where_a_row_is_further_above(sources: Sources, tmp_path: Path) -> None:
    def parts(bench: Workbench) -> Iterator[Job]:
        figures = {"x": [{"a": 9.0, "b": 4.0}, {"a": 7.0, "b": 4.0}], "y": [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 1.0}]}
        for row, seeds in figures.items():
            for seed, values in enumerate(seeds):
                yield Job(row, ("a", "b"), seed, partial(dict, values))

    claim = Claim("C1", "x gains more", (("x", "y"),), "", columns=("a",), than=("b",))
    outcome = run(make_recipe(parts, claim), sources, tmp_path / "out")
    (one,) = outcome.verdicts[0].differences
    assert one.mean.value == 4  # 8 beyond 2 and 5 beyond 3: 6 and 2
    assert one.mean.error == pytest.approx(2)
    assert (one.cells, one.of) == (1, 1)
    assert claim_cells(outcome)[0][1] == "x − y, a beyond b"


def test_pages_show_figures_claims_and_what_was_published(sources: Sources, tmp_path: Path) -> None:
    claim = Claim("C1", "x is above y", (("x", "y"),), "80.2 → 85.3")
    recipe = make_recipe(fixed({"x": [52.0, 53.0], "y": [50.0, 50.0]}, []), claim)
    outcome = run(replace(recipe, published={("x", "a"): 61.5}), sources, tmp_path / "out" / recipe.name)
    text = markdown(outcome)
    assert "| x | 52.5 ± 0.5 (61.5) | 62.5 ± 0.5 |" in text
    assert "- body: `scale-bias`" in text
    assert claim_cells(outcome) == [
        ["C1: x is above y", "x − y", "80.2 → 85.3", "+2.5 ± 0.5", "2 of 2", "holds (not known to hold at this scale)"]
    ]
    write_outcome(outcome, tmp_path / "out" / recipe.name)
    written = json.loads((tmp_path / "out" / recipe.name / "outcome.json").read_text())
    assert written["cells"][0]["seeds"] == {"0": 52.0, "1": 53.0}
    assert written["claims"][0]["holds"] is True
    assert written["settings"]["methods"] == TINY.methods
    page = write_page([outcome], tmp_path / "out").read_text()
    assert "Of 1 claims in 1 of the papers" in page
    assert page.count("<img") == 1
    assert "<td>body</td><td>scale-bias</td>" in page
    assert "<tr class=failed>" not in page


def test_a_claim_that_fails_is_discussed_and_one_that_holds_is_not(sources: Sources, tmp_path: Path) -> None:
    claims = (
        Claim("C1", "x is above y", (("x", "y"),), "always", doubt="Too few steps."),
        Claim("C2", "y is above x", (("y", "x"),), "always", small=True, doubt="Too many."),
    )
    recipe = make_recipe(fixed({"x": [1.0, 1.0], "y": [5.0, 5.0]}, []), *claims)
    outcome = run(recipe, sources, tmp_path / "out" / recipe.name)
    assert doubts(outcome) == ["C1 does not hold here. Too few steps."]
    assert overview([outcome]) == [
        ["C1: x is above y", recipe.name, "no", "does not hold"],
        ["C2: y is above x", recipe.name, "yes", "holds"],
    ]
    write_outcome(outcome, tmp_path / "out" / recipe.name)
    for page in (markdown(outcome), write_page([outcome], tmp_path / "out").read_text()):
        assert ("Too few steps." in page, "Too many." in page) == (True, False)
    assert page.count("<tr class=failed>") == 1
    assert "<tr class=failed><td>C1: x is above y" in page


# data and backbones -------------------------------------------------------------------------------------------------


def test_archives_are_unpacked_once_and_folders_used_as_they_are(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "made" / "packed", ("a", "b"))
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "packed.tar", "w") as archive:
        archive.add(folder, "packed")
    sources = Sources(tmp_path / "data", tmp_path / "cache")
    first = sources.find("packed")
    assert first == str(tmp_path / "cache" / "packed")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["packed"]
    (tmp_path / "data" / "packed.tar").write_bytes(b"no archive any more")
    assert sources.find("packed") == first
    assert sources.find("bundled:digits") == "bundled:digits"


def test_a_data_set_is_read_with_what_it_does_not_say_itself(tmp_path: Path) -> None:
    """CamVid's masks have a value that is no class, and nothing in its folder says so."""
    folder = write_masks(tmp_path / "data" / "camvid", count=2)
    (folder / "classes.txt").unlink()
    for name in ("train", "test"):
        for path in (folder / name / "labels").iterdir():
            mask = np.array(Image.open(path))
            mask[:2] = 11
            Image.fromarray(mask).save(path)
    os.symlink(folder, tmp_path / "data" / "other")
    sources = Sources(tmp_path / "data", tmp_path / "cache")
    assert sources.load("camvid").classes == ("0", "1", "2")
    assert sources.load("other").classes == ("0", "1", "2", "11")


def test_networks_of_which_only_shapes_count_are_not_downloaded(tmp_path: Path) -> None:
    scale = replace(TINY, backbones=("timm:resnet10t.c3_in1k",), options={"pretrained": False})
    bench = Workbench(make_recipe(fixed({}, []), scale=scale), "small", Sources(tmp_path, tmp_path))
    assert bench.backbone().chain.feature_dim == 512


def test_what_cannot_be_found_or_unpacked_is_said_in_a_line(tmp_path: Path) -> None:
    sources = Sources(tmp_path, tmp_path / "cache")
    with pytest.raises(
        DataError, match=r"lacks data sets: cub \(for one, two\); cars \(for two\). Each is a folder"
    ) as raised:
        sources.check({"one": ["cub", "bundled:digits"], "two": ["cub", "cars"]})
    assert "\n" not in str(raised.value)
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"broken.tar cannot be unpacked"):
        sources.find("broken")
    assert not list((tmp_path / "cache").iterdir())


def test_a_retrained_backbone_computes_what_the_patched_one_did(sources: Sources) -> None:
    bench = Workbench(make_recipe(fixed({}, [])), "small", sources)
    base, data = bench.backbone(), bench.task("colors")
    before = base.fingerprint
    patch = fit(base, data, "full-finetune(lr=0.01)", epochs=1, image_size=32)
    other = retrained(base, patch)
    tensors = {name: tensor for segment in other.chain for name, tensor in segment.named_tensors()}
    for name, tensor in patch.tensors.items():
        if name.startswith("replace/"):
            assert (tensors[name.removeprefix("replace/")] == tensor).all(), name
    assert other.fingerprint != before
    assert untrained(base, 1).fingerprint not in (before, untrained(base, 2).fingerprint)
    assert base.fingerprint == before


# every recipe, on made-up images --------------------------------------------------------------------------------------


COLORS = ("red", "green", "blue", "rose")
NEEDS_TWO = {"other", "pairs", "shared", "supported"}
QUICK = {
    "pairs": (("one", ("two",)),),
    "supported": "two",
    "rates": (50,),
    "kinds": ("fog",),
    "trained": 6,
    "folds": 1,
    "blocks": 2,
    "depth": 2,
    "other": "two",
    "pretraining": {"epochs": 1},
    "sets": ("two", "three", "four"),
    "alphas": 2,
    "resolutions": (32, 64),
    "greedy": {"candidates": ("stages.3.blocks.0",)},
    "labels": (6, 12),
    "learning_rates": (0.001, 0.003),
    "runs": 1,
}


SMALL = [recipe for recipe in RECIPES if "small" in recipe.scales]


def kinds(jobs: Iterable[Job]) -> list[Job]:
    """The cheapest choice that calls every function of a recipe: the first job of each."""
    first: dict[object, Job] = {}
    for job in jobs:
        work = job.work
        inner = [one for one in getattr(work, "args", ()) if callable(one)]
        first.setdefault((getattr(work, "func", work), *inner), job)
    return list(first.values())


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
def test_a_job_of_every_kind_fills_its_cells(recipe: Recipe, tmp_path: Path) -> None:
    """One seed, one step or epoch, a few images; one data set, or as many as the recipe needs."""
    small = recipe.scales["small"]
    if recipe in (DENSE, FCN):
        pytest.importorskip("pycocotools")
        pytest.importorskip("torchmetrics")
        write_masks(tmp_path / "data" / "one", count=4)
        write_voc(tmp_path / "data" / "two")
        names: tuple[str, ...] = ("one", "two")[: len(small.data)]
    else:
        count = 4 if "sets" in small.options else 2 if NEEDS_TWO & set(small.options) else 1
        names = ("one", "two", "three", "four")[:count]
        for number, name in enumerate(names):
            prefix = f"{name} " if "sets" in small.options else ""  # supported sets are told apart by their classes
            write_images(tmp_path / "data" / name, tuple(prefix + color for color in COLORS), number)
    options = {name: QUICK.get(name, value) for name, value in small.options.items()}
    settings = {**small.fit, "image_size": 32, "batch_size": 24, "epochs": 1, "augment": "none"}
    if "resolutions" in options:
        del settings["image_size"]
    scale = replace(small, data=names, fit=settings, seeds=1, steps=small.steps and 1, images=None, options=options)
    planned = replace(recipe, scales={"small": scale}, jobs=lambda bench: kinds(recipe.jobs(bench)), claims=())
    results = Workbench(planned, "small", Sources(tmp_path / "data", tmp_path / "cache")).run(tmp_path / "out")
    unbounded = recipe.unit == "%" or not recipe.unit.endswith("%")  # time added to the base's, parameters
    highest = 1000 * len(names) if recipe.unit == "score" else math.inf if unbounded else 100
    assert results.figures
    assert all(0 <= value <= highest for seeds in results.figures.values() for value in seeds.values())


@pytest.mark.real
def test_the_real_data_has_what_the_small_scales_need(tmp_path: Path) -> None:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the real images {SHARED / 'data'} are not on this machine")
    Sources(SHARED / "data", tmp_path).check({recipe.name: recipe.scales["small"].data for recipe in SMALL})
