"""Verbs for many tasks or resolutions: `multitask`, `paint`, `multires` and `cascade`."""

import itertools
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from typer import Argument, Option

import modelpatch as mp
from modelpatch.cli import options as opt
from modelpatch.cli import reading as read
from modelpatch.cli.console import (
    JsonOption,
    Screen,
    check_file,
    check_once,
    check_out,
    is_resumed,
    make_folder,
    read_names,
)
from modelpatch.cli.verb import verb
from modelpatch.errors import CascadeError, TrainingError
from modelpatch.report import recipes, tables
from modelpatch.text import count_of, file_name


@verb(first="private set_ shared backbone epochs out", panel="Training", config=True)
def multitask(
    network: opt.Network,
    training: opt.Training,
    cluster: opt.Cluster,
    reading: read.Source,
    data: list[str] = Argument(..., help="The tasks' data, each as for fit."),
    out: Path = Option(..., "--out", "-o", help="The folder for backbone.safetensors and one patch per task."),
    private: str | None = Option(None, "--private", "-m", help="The patches' method; by default scale and bias."),
    set_: opt.SetOption = None,
    shared: str | None = Option(None, help="The shared weights, as a method: subset(blocks=layer4); default: all."),
    sampling: str = Option("equal", help="Images per task in a round: equal, or proportional to its training images."),
    weight: list[str] | None = Option(None, help="TASK=NUMBER, weight of its loss on shared weights; may be repeated."),
    augment: opt.AugmentOption = "auto",
    dtype: str = Option("float32", help="Type of the numbers in the patches, as for fit."),
    log: opt.LogOption = None,
    force: opt.ForceOption = False,
    restart: opt.RestartOption = False,
    json: JsonOption = None,
) -> None:
    """Train a copy of the backbone on several tasks together, with a private patch for each.

    The tasks share the weights that --shared names; each task trains the weights of --private alone. An interrupted run
    resumes exactly when the same command is given again. Under torchrun, processes share the tasks.
    """
    import modelpatch.recipes.multitask as recipe
    from modelpatch.backbone.files import check_writable
    from modelpatch.train.distributed import joined

    with joined() as team:
        console = Screen(json, quiet=not team.leads)
        make_folder("--log", log)
        method = opt.make_method(private or recipe.PRIVATE, set_)
        common = mp.methods.make_method(shared or recipe.SHARED)
        settings, weights = training.settings(augment=augment, dtype=dtype), _weights(weight)
        recipe.check_joint_settings(settings)
        tasks = [reading.load(one, training.seed) for one in data]
        console.tell_data(tasks)
        recipe.check_tasks(tasks)
        make_folder("--out", out)
        files = recipe.task_files(out, [task.task.name for task in tasks])
        whole = out / recipe.BACKBONE
        checkpoint = whole.with_name(f"{whole.name}.training")
        if not is_resumed(checkpoint, restart):
            check_out([whole, *files.values()], force)
        base = network.open()
        check_writable(base)
        with console.resumable(checkpoint, restart):
            settings |= {"shared": common, "sampling": sampling, "weights": weights, "out": out}
            settings |= {"checkpoint": checkpoint, "log": log, "progress": not console.quiet}
            result = cluster.run(partial(recipe.fit_multitask, base, tasks, method, **settings))
        if not team.leads:
            return
        if log is not None:
            for name in result.patches:
                console.draw_curves(log / file_name(name), name)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        console.show(tables.multitask_table(result, sizes))
        console.tell(
            f"wrote {whole} (fingerprint {result.backbone.fingerprint[:12]}) and "
            f"{count_of(len(files), 'patch', 'patches')} of it; {base.spec} is unchanged (fingerprint "
            f"{base.fingerprint[:12]})"
        )
        console.tell_run(out)
        console.write_json(result.as_dict())


def _weights(pairs: list[str] | None) -> dict[str, float]:
    """TASK=NUMBER pairs by task. Raises `TrainingError` for others, and for a task that is given twice."""
    weights: dict[str, float] = {}
    for pair in pairs or []:
        name, _, number = pair.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise TrainingError(f"--weight {pair!r} is not TASK=NUMBER with a number above 0.")
        if name in weights:
            raise TrainingError(f"--weight {name}=... is given twice. Give it once.")
        weights[name] = value
    return weights


@verb(first="supported rule steps set_ backbone epochs out", panel="Mixing", config=True)
def paint(
    console: Screen,
    network: opt.Network,
    training: opt.Training,
    file: opt.PatchFile,
    words: opt.Words,
    reading: read.Source,
    data: list[str] = Argument(..., help="The data of the tasks to patch, as for fit."),
    supported: list[str] = Option(..., help="Data of a task whose accuracy must stay; may be repeated."),
    rule: str = Option("mean", help="Choice of alpha: mean, harmonic, or drop=POINTS of supported tasks."),
    steps: int = Option(11, help="Values of alpha from 0 to 1."),
    mode: str = Option("joint", help="Several tasks: joint, sequential or parallel."),
    mixing: str = Option("scalar", help="parallel: one scalar, a search, or exhaustive (up to 3 tasks)."),
    trials: int = Option(40, help="Mixtures that --mixing search tries."),
    orders: int = Option(1, help="sequential: orders of the tasks that are tried."),
    naive: bool = Option(False, "--naive", help="Train the head too instead of freezing it: the baseline."),
    refit: bool = Option(False, "--refit", help="Fit closed heads anew at every alpha."),
    norms: str = Option("kept", help="BatchNorm statistics of a mixture: kept, or measured (shared, or own)."),
    interpolate: bool = Option(True, help="Mix with the base; without, plain fine-tuning."),
    set_: opt.SetOption = None,
    validation: float = Option(0.2, help="Share of training images held out to choose alpha."),
    plot: Path | None = Option(None, help="A picture of patched against supported accuracy."),
    markdown: Path | None = Option(None, help="A file for the table as Markdown."),
    restart: opt.RestartOption = False,
) -> None:
    """Fine-tune, mix the result with the base at many alphas, and choose one on held-out images of both (PAINT).

    The patch keeps the whole change; alpha is its strength, which can be set later without training. An interrupted run
    continues when the same command is given again.
    """
    from modelpatch.data.task import joint_task
    from modelpatch.methods.paint import Paint
    from modelpatch.recipes.painting import PaintSettings

    mixture: dict[str, Any] = {"mode": mode, "mixing": mixing, "rule": rule, "norms": norms, "naive": naive}
    mixture |= {"steps": steps, "trials": trials, "refit": refit, "orders": orders, "interpolate": interpolate}
    common: dict[str, Any] = {"exploration": PaintSettings(**mixture, validation=validation)}
    common |= {"method": opt.make_method(Paint.name, set_), **training.settings()}
    tasks, kept = ([reading.load(one, training.seed) for one in own] for own in (data, supported))
    console.tell_data([*tasks, *kept])
    target = file.path(joint_task([task.task for task in tasks]).name)
    opened = network.open()
    vocabulary = words.open(opened)
    common |= {"heads": vocabulary and vocabulary.head, "progress": not console.quiet}
    checkpoint = target.with_name(target.name + ".training")
    with console.resumable(checkpoint, restart):
        painting = mp.paint(opened, tasks, kept, checkpoint=checkpoint, **common)
    patch = painting.patch if vocabulary is None else vocabulary.mark(painting.patch)
    patch.save(target)
    shutil.rmtree(checkpoint)
    console.show(recipes.painting_table(painting))
    console.tell(recipes.painting_summary(painting))
    if painting.orders:
        console.print()
        console.show(recipes.orders_table(painting))
    size, strength = f"{target.stat().st_size:,} bytes", f"strength {patch.strength:g}"
    console.tell(f"wrote {target} ({size}, {strength}); the base is unchanged")
    console.write(markdown, tables.cells_markdown(*recipes.painting_cells(painting)))
    title = f"{patch.task.name} on {opened.spec}"[:80]
    console.draw(plot, recipes.plot_tradeoff, painting, title)
    console.tell_run(target)
    console.write_json(painting.as_dict())


@verb(first="resolutions sharing set_ backbone epochs seeds out", panel="Resolutions", config=True)
def multires(
    console: Screen,
    data: read.DataArgument,
    network: opt.Network,
    training: opt.Training,
    reading: read.Source,
    resolutions: str = Option("96,128,160", help="Pixels, comma-separated."),
    sharing: str = Option(
        "private", help="Own weights: private (scale and bias), shared (none) or independent (all); several, or 'all'."
    ),
    set_: opt.SetOption = None,
    seeds: int = Option(1, min=1, help="Seeds of each; several give standard errors."),
    out: Path | None = Option(None, "--out", "-o", help="The folder for all results; by default TASK-multires."),
    restart: bool = Option(False, "--restart", help="Train anew instead of continuing from the folder."),
    plot: Path | None = Option(None, help="A picture of top-1 against the resolution."),
) -> None:
    """Train one network for several resolutions: shared weights, a private scale and bias for each (K for the Price of 1).

    Writes a backbone file and one patch per resolution. An interrupted run continues when the same command is given again.
    """  # fmt: skip
    from modelpatch.recipes.multires import METHOD, SHARINGS, Files, MultiResolution, fit_multires

    sharings = list(SHARINGS) if sharing == "all" else list(read_names("--sharing", sharing))
    if unknown := sorted(set(sharings) - set(SHARINGS)):
        raise TrainingError(f"--sharing {unknown[0]!r} is unknown. Expected some of: {', '.join(SHARINGS)}, or 'all'.")
    pixels = opt.parse_counts("--resolutions", resolutions)
    if training.image_size is not None:
        raise TrainingError("--image-size is given beside --resolutions. Give the latter alone.")
    method = opt.make_method(METHOD.name, set_, statistics=METHOD.statistics)
    settings: dict[str, Any] = training.settings()
    task = reading.load(data, training.seed)
    console.tell_data([task])
    base = network.open()
    folder = out or Path(f"{task.task.name}-multires")
    make_folder("--out", folder)
    settings |= {"method": method, "out": folder, "reuse": not restart, "progress": not console.quiet}
    runs: dict[str, list[MultiResolution]] = {}
    for one, seed in itertools.product(dict.fromkeys(sharings), range(training.seed, training.seed + seeds)):
        if restart:
            shutil.rmtree(Files(folder, task, one, seed).checkpoint, ignore_errors=True)
        settings |= {"sharing": one, "seed": seed}
        runs.setdefault(one, []).append(fit_multires(base, task, pixels, **settings))
    rows, title = [recipes.SharingRow.of(own) for own in runs.values()], f"{task.task.name} on {base.spec}"
    console.show(recipes.sharing_table(rows, title))
    for first, *_ in runs.values():
        patches = ", ".join(f"{size} px" for size in first.patches)
        console.tell(f"{first.sharing}: patches at {patches} over {first.backbone.spec} in {folder}")
    console.tell_run(folder)
    tops = {name: [run.top1 for run in own] for name, own in runs.items()}
    console.write_json({"task": task.task.name, "backbone": base.spec, "rows": [*map(asdict, rows)], "runs": tops})
    console.draw(plot, recipes.plot_sharing, rows, title)


@verb(first="data accuracy confidence caution out", panel="Cascade")
def cascade(
    console: Screen,
    network: opt.PatchNetwork,
    reading: read.Source,
    patches: list[Path] = Argument(..., help="Patch files of one task, all in one folder."),
    data: str = Option(..., help="The task's data: validation or held-out images set the thresholds."),
    out: Path | None = Option(None, "--out", "-o", help="The file; by default TASK.cascade.json beside the patches."),
    force: opt.ForceOption = False,
    accuracy: float | None = Option(None, help="Held-out top-1 to keep, 0 to 1; by default the best patch's."),
    confidence: str = Option("probability", help="Its measure: probability, or fitted (that, entropy and gap)."),
    caution: float = Option(1.0, min=0, help="Standard errors of safety for the accuracy; 0: the paper's rule."),
    seed: int | None = Option(None, help="Seed of splits that the data does not have; by default that of the fits."),
    plot: Path | None = Option(None, help="A picture of top-1 against multiply-adds."),
    device: opt.DeviceOption = "cpu",
) -> None:
    """Build an early-exit cascade: as accurate as the best patch on held-out images, with the fewest multiply-adds on average.

    Writes a small file beside the patches that eval and predict take like a patch (Streeter, 2018).
    """
    from modelpatch.engine.cascade import is_cascade

    check_file("--out", out)
    check_once(patches)
    loaded = {path: mp.Patch.load(path) for path in patches}
    first = patches[0]
    target = out or first.parent / f"{loaded[first].task.name}.cascade.json"
    if not is_cascade(target):
        raise CascadeError(f"--out {target} is not the name of a cascade. Expected one that ends in .json.")
    check_out(target, force)
    if away := [path for path in patches if path.resolve().parent != target.resolve().parent]:
        raise CascadeError(f"{away[0]} does not lie beside {target}. Write the cascade into the folder of its patches.")
    base = network.open(loaded[first], first, device)
    chosen = read.fitted_seed(loaded[first]) if seed is None else seed
    task = reading.load_own(loaded[first], [data], chosen)
    rules: Any = {"accuracy": accuracy, "confidence": confidence, "caution": caution, "seed": chosen}
    named = {path.stem: patch for path, patch in loaded.items()}
    result = mp.cascade(base, named, task, **rules, progress=not console.quiet)
    files = {path.stem: path for path in patches}
    result.cascade.save(target, [files[name] for name in result.order])
    console.show(recipes.cascade_table(result), recipes.stages_table(result))
    console.tell(f"wrote {target} ({target.stat().st_size:,} bytes) with {count_of(len(result.order), 'stage')}")
    if len(result.order) == 1:
        console.tell("no cascade of these patches keeps that accuracy for less work: the file holds the best one")
    console.write_json(result.as_dict())
    console.draw(plot, recipes.plot_cascade, result)
