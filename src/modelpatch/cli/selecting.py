"""Verbs that choose: `profile` and `select` blocks, `search` the best patch within limits, `label` the images that help."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from typer import Argument, Option

import modelpatch as mp
from modelpatch.cli import options as opt
from modelpatch.cli import reading as read
from modelpatch.cli.console import Screen, check_file
from modelpatch.cli.runs import QUIET
from modelpatch.cli.verb import option, verb
from modelpatch.errors import DataError, ModelpatchError
from modelpatch.report import selection, tables

HalvingOption = Annotated[
    int, Option(min=0, help="N > 1: successive halving, where the best 1/N train N times as long, and so on; 0: off.")
]
FoldsOption = Annotated[int, Option(min=1, help="Folds of the training images; 1: one held-out split.")]


@dataclass(frozen=True)
class Limits:
    """Limits of a chosen patch. Raises `ModelpatchError` for invalid numbers of bytes or shares of time."""

    panel: ClassVar[str] = "Limits"
    max_bytes: str | None = option(None, help="The largest patch file: 200KB, 1.5MB.")
    max_latency: str | None = option(None, help="Time that the patch may add to the base's: +15%.")

    def __post_init__(self) -> None:
        self.read()

    def warn(self, console: Screen) -> None:
        """Warn if times are to be measured on a busy machine."""
        from modelpatch.select.budget import is_busy

        if self.max_latency is not None and is_busy():
            console.tell("this machine is busy: times measured now may be wrong. Use --max-latency on an idle machine.")

    def read(self) -> dict[str, Any]:
        """The limits as numbers, for `select` and `search`."""
        from modelpatch.select.budget import parse_bytes, parse_latency

        return {
            "max_bytes": None if self.max_bytes is None else parse_bytes(self.max_bytes),
            "max_latency": None if self.max_latency is None else parse_latency(self.max_latency),
        }


@dataclass(frozen=True)
class Study:
    """Trials of candidates and the file of their outcomes. Raises `ModelpatchError` for an address without --ray."""

    panel: ClassVar[str] = "Trials"
    images: int | None = option(None, min=1, help="Training images to use, stratified; by default all.")
    seeds: int = option(1, min=1, help="Seeds of each candidate and fold.")
    workers: int = option(1, min=1, help="Processes that train candidates side by side.")
    ray: bool = option(False, "--ray", help="Run the workers on Ray (see --ray-address).")
    ray_address: opt.RayAddressOption = opt.LOCAL
    trials: Path | None = option(None, help="The file of outcomes, not repeated; by default TASK.trials.jsonl.")
    same_steps: bool = option(False, "--same-steps", help="Train candidates for the final patch's steps, not epochs.")
    disk: str = option("16GB", help="Temporary files for cached activations, at most.")

    def __post_init__(self) -> None:
        from modelpatch.select.budget import parse_bytes

        if not self.ray and self.ray_address != opt.LOCAL:
            raise ModelpatchError(f"--ray-address {self.ray_address} is given without --ray. Give both.")
        parse_bytes(self.disk)
        check_file("--trials", self.trials)

    def open(
        self,
        reading: read.Source,
        data: str,
        network: opt.Network,
        training: opt.Training,
        file: opt.PatchFile | None = None,
    ) -> "tuple[mp.Backbone, mp.Task, dict[str, Any]]":
        """Check everything, read the task and load the backbone: the checks that fail soonest come first."""
        from modelpatch.select.budget import parse_bytes

        settings = training.settings()
        task = reading.load(data, training.seed)
        if self.images is not None:
            task = task.subsample(self.images, training.seed)
        trials = self.trials or Path(f"{task.task.name}.trials.jsonl")
        options: dict[str, Any] = {} if file is None else {"out": file.path(task.task.name)}
        check_file("--trials", trials)
        options |= {name: getattr(self, name) for name in ("seeds", "workers", "same_steps")} | settings
        options |= {"ray": self.ray_address if self.ray else None, "trials": trials}
        options |= {"disk": parse_bytes(self.disk), "progress": not QUIET.get()}
        return network.open(), task, options


def _kept(options: dict[str, Any]) -> str:
    """A line with the files that a study wrote."""
    out = options.get("out")
    written = f"wrote {out} ({out.stat().st_size:,} bytes); " if out else ""
    return f"{written}outcomes kept in {options['trials']}"


@verb(first="method set_ backbone epochs stages plot", panel="Profile", config=True)
def profile(
    console: Screen,
    data: read.DataArgument,
    network: opt.Network,
    training: opt.Training,
    study: Study,
    reading: read.Source,
    method: opt.MethodOption = "subset",
    set_: opt.SetOption = None,
    consecutive: int = Option(1, min=1, help="Train runs of this many blocks."),
    pairs: bool = Option(False, "--pairs", help="Train every pair of blocks."),
    stages: bool = Option(False, "--stages", help="Train whole stages."),
    folds: FoldsOption = 1,
    halving: HalvingOption = 0,
    sizes: str | None = Option(None, help="N1,N2,...: profiles with these numbers of training images, side by side."),
    plot: Path | None = Option(None, help="A picture: bars, or a heat map of --pairs or --sizes."),
) -> None:
    """Train each block (or run, pair or stage) alone with the head and show its gain on held-out training images.

    The test images are not read. An interrupted profile goes on when the same command is given again.
    """
    from modelpatch.select.study import profile as run_profile

    made = opt.make_method(method, set_)
    counts = [] if sizes is None else opt.parse_counts("--sizes", sizes)
    if counts and (study.images is not None or pairs):
        raise ModelpatchError("--sizes sets the number of images, and draws no pairs. Leave --images and --pairs out.")
    base, task, options = study.open(reading, data, network, training)
    console.tell_data([task])
    parts = [task.subsample(count, training.seed) for count in counts] or [task]
    options |= {"consecutive": consecutive, "pairs": pairs, "stages": stages}
    options |= {"folds": folds, "halving": halving}
    results = [run_profile(base, part, made, **options) for part in parts]
    console.show(selection.sizes_table(results) if counts else selection.profile_table(results[0]))
    console.tell(_kept(options))
    console.write_json([result.as_dict() for result in results] if counts else results[0].as_dict())
    console.draw(plot, *((selection.plot_sizes, results) if counts else (selection.plot_profile, results[0])))


@verb(first="method set_ backbone epochs max_blocks max_bytes max_latency out", panel="Selection", config=True)
def select(
    console: Screen,
    data: read.DataArgument,
    network: opt.Network,
    training: opt.Training,
    study: Study,
    reading: read.Source,
    file: opt.PatchFile,
    limits: Limits,
    method: opt.MethodOption = "subset",
    set_: opt.SetOption = None,
    folds: FoldsOption = 5,
    epsilon: float = Option(0.01, help="Accuracy that a block must add to be taken."),
    rule: str = Option("paper", help="paper: Algorithm 1; code: the authors' program."),
    start: str = Option("none", help="With --rule code: none, all (blocks are removed) or better."),
    among: str | None = Option(None, help="Comma-separated blocks to choose among, as in a profile; by default all."),
    stages: bool = Option(False, "--stages", help="Choose whole stages instead of blocks."),
    ends: bool = Option(True, help="Compare the choice with no blocks and with all on the same folds; train the best."),
    max_blocks: int | None = Option(None, min=1, help="At most this many blocks, with --stages too."),
    warm_start: bool = Option(False, "--warm-start", help="Start candidates from the last round's trained blocks."),
    halving: HalvingOption = 0,
    plot: Path | None = Option(None, help="A picture of the order of the blocks."),
) -> None:
    """Choose blocks greedily by cross-validation, then train a patch of them on all training images and test it once.

    An interrupted selection goes on when the same command is given again.
    """
    from modelpatch.select.greedy import Greedy
    from modelpatch.select.greedy import select as run_select

    limits.warn(console)
    made = opt.make_method(method, set_)
    settings: dict[str, Any] = {"rule": rule, "start": start, "epsilon": epsilon, "warm_start": warm_start}
    candidates = tuple(name.strip() for name in among.split(",")) if among else ()
    greedy = Greedy(**settings, halving=halving, candidates=candidates, stages=stages, ends=ends)
    base, task, options = study.open(reading, data, network, training, file)
    console.tell_data([task])
    options |= {"folds": folds, "max_blocks": max_blocks, **limits.read()}
    options["each_round"] = lambda one: console.show(selection.round_table(one, task.task.name))
    result = run_select(base, task, made, greedy=greedy, **options)
    console.show(selection.selection_table(result))
    console.tell(_kept(options))
    console.write_json(result.as_dict())
    console.draw(plot, selection.plot_order, result)


@verb(first="methods max_bytes max_latency tries backbone epochs out", panel="Search", config=True)
def search(
    console: Screen,
    data: read.DataArgument,
    network: opt.Network,
    training: opt.Training,
    study: Study,
    reading: read.Source,
    file: opt.PatchFile,
    limits: Limits,
    methods: str | None = Option(None, help="Comma-separated, as subset(blocks=last); by default those for budgets."),
    tries: int = Option(48, min=1, help="Proposals to train at most."),
    halving: HalvingOption = 3,
    folds: FoldsOption = 1,
    margin: float = Option(
        1.0, min=0, help="Standard errors of accuracy that a cheaper proposal may lie below the best."
    ),
    plot: Path | None = Option(None, help="A picture of accuracy, bytes and time."),
) -> None:
    """Choose method, blocks and settings by validation, within limits, and train the best patch that keeps them.

    An interrupted search goes on when the same command is given again.
    """
    from modelpatch.methods.registry import split_outside
    from modelpatch.select.budget import added_latency
    from modelpatch.select.searching import search as run_search

    limits.warn(console)
    base, task, options = study.open(reading, data, network, training, file)
    console.tell_data([task])
    names = None if methods is None else split_outside(methods, ",")
    options |= {"tries": tries, "folds": folds, "halving": halving, "margin": margin, **limits.read()}
    result = run_search(base, task, names, **options)
    if result.left_out:
        console.show(selection.left_out_table(result))
    console.show(selection.search_table(result))
    patch = result.patch
    added = added_latency(base, patch, limit=result.budget.latency)
    top1 = tables.percent(patch.metrics["test_top1"])
    console.tell(f"{result.chosen.name}: {top1} % of the test images, +{added:.1%} time")
    console.tell(_kept(options))
    console.write_json({**result.as_dict(), "file_bytes": patch.inspect().file_bytes, "added_latency": added})
    console.draw(plot, selection.plot_search, result)


@verb(first="unlabeled budget patch method set_ epochs out", panel="Simulation", config=True)
def label(
    console: Screen,
    network: opt.LabellingNetwork,
    training: opt.Training,
    reading: read.Source,
    data: str = Argument(..., help="The labelled data, as for fit."),
    unlabeled: list[Path] | None = Option(None, help="Images, folders or tables to choose from; may be repeated."),
    budget: int = Option(32, min=1, help="Images to choose."),
    patch: Path | None = Option(None, "--patch", "-p", help="Use this patch instead of training one on DATA."),
    out: Path | None = Option(None, "--out", "-o", help="A CSV file for the list."),
    sheet: Path | None = Option(None, help="A picture of the chosen images."),
    simulate_: str | None = Option(None, "--simulate", help="N1,N2,...: label DATA in steps, by margin and at random."),
    seeds: int = Option(1, min=1, help="Seeds of the simulation."),
    plot: Path | None = Option(None, help="A picture of the simulation's curves."),
    rounds: Path | None = Option(None, help="The file of finished rounds, not repeated; by default TASK.rounds.jsonl."),
    method: opt.MethodOption = "subset",
    set_: opt.SetOption = None,
) -> None:
    """List the images whose labels would help most: those with the smallest margin between the two best classes.

    With --simulate, accuracy against the number of labels is measured on DATA, for choice by margin and at random.
    """
    from modelpatch.select.active import pick, simulate

    check_file("--out", out)
    if (simulate_ is None) == (unlabeled is None):
        raise ModelpatchError("give either --unlabeled FOLDER, to choose from it, or --simulate N1,N2,...")
    if simulate_ is not None and (patch or out or sheet):
        raise ModelpatchError("--simulate trains patches and lists nothing: leave --patch, --out and --sheet out.")
    if simulate_ is None and (plot or rounds or seeds > 1):
        raise ModelpatchError("--plot, --rounds and --seeds belong to --simulate.")
    made = opt.make_method(method, set_)
    settings = training.settings()
    asked = None if patch is None else mp.Patch.load(patch)
    load = network.opener(asked, patch)
    task = reading.load(data, training.seed)
    console.tell_data([task])
    if simulate_ is not None:
        file = rounds or Path(f"{task.task.name}.rounds.jsonl")
        base = load()
        counts = opt.parse_counts("--simulate", simulate_)
        settings |= {"labels": counts, "seeds": seeds, "rounds": file, "progress": not console.quiet}
        curves = simulate(base, task, made, **settings)
        console.show(selection.curves_table(curves))
        console.tell(f"rounds kept in {file}")
        console.tell_run(file)
        console.write_json(curves.as_dict())
        console.draw(plot, selection.plot_curves, curves)
        return
    images = read.gather_images(unlabeled or [])
    problems: list[str] = []
    if next(_readable(images, problems.append), None) is None:
        raise DataError(f"none of the {len(images)} images can be read: {problems[0]}")
    base = load()
    if asked is None:
        asked = mp.fit(base, task, made, progress=not console.quiet, **settings)
    with console.progress("label") as bar, opt.naming(patch or Path("the patch")):
        try:
            picks = pick(base, asked, images, budget, bar)
        except DataError:
            images = list(_readable(images, lambda problem: console.tell(f"left out: {problem}")))
            picks = pick(base, asked, images, budget, bar)
    names = [str(image) for image in images]
    console.show(selection.picks_table(picks, names))
    rows = [
        {"image": names[one.position], "margin": one.margin, "first": one.first, "second": one.second} for one in picks
    ]
    console.write_json(rows)
    if out is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        console.write(out, text.getvalue())
        console.tell_run(out)
    console.draw(sheet, selection.contact_sheet, picks, images)


def _readable(images: list[Path], report: Callable[[str], None]) -> Iterator[Path]:
    """Yield the images that can be read; report the errors of the others."""
    from modelpatch.backbone.preprocessing import open_image

    for image in images:
        try:
            open_image(image)
        except DataError as error:
            report(str(error))
        else:
            yield image
