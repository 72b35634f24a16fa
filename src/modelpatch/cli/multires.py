"""`modelpatch multires`: one network at several resolutions."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typer import Option

from modelpatch.cli.console import Screen, make_folder, read_names
from modelpatch.cli.options import DataArgument, Network, SetOption, Training
from modelpatch.cli.settings import parse_pairs
from modelpatch.cli.verb import verb
from modelpatch.errors import TrainingError


@verb(first="resolutions sharing set_ backbone epochs seeds out", panel="Resolutions", config=True)
def multires(
    console: Screen,
    data: DataArgument,
    network: Network,
    training: Training,
    resolutions: str = Option("96,128,160", help="Pixels, comma-separated."),
    sharing: str = Option(
        "private", help="Own weights: private (scale and bias), shared (none) or independent (all); several, or 'all'."
    ),
    set_: SetOption = None,
    seeds: int = Option(1, min=1, help="Seeds of each; several give standard errors."),
    out: Path | None = Option(None, "--out", "-o", help="The folder for all results; by default TASK-multires."),
    restart: bool = Option(False, "--restart", help="Train anew instead of continuing from the folder."),
    plot: Path | None = Option(None, help="A picture of top-1 against the resolution."),
) -> None:
    """Train one network for several resolutions: shared weights, a private scale and bias for each (K for the Price of 1).

    Writes a backbone file and one patch per resolution. An interrupted run continues when the same command is given again.
    """  # fmt: skip

    from modelpatch.data.task import load_task
    from modelpatch.methods.registry import make_method
    from modelpatch.recipes.multires import METHOD, SHARINGS, Files, MultiResolution, fit_multires
    from modelpatch.report.resolutions import SharingRow, plot_sharing, sharing_table

    sharings = list(SHARINGS) if sharing == "all" else list(read_names("--sharing", sharing))
    if unknown := sorted(set(sharings) - set(SHARINGS)):
        raise TrainingError(f"--sharing {unknown[0]!r} is unknown. Expected some of: {', '.join(SHARINGS)}, or 'all'.")
    pixels = _read_pixels(resolutions)
    if training.image_size is not None:
        raise TrainingError("--image-size is given beside --resolutions. Give the latter alone.")
    method = make_method(METHOD.name, **{"statistics": METHOD.statistics, **parse_pairs(set_, "--set")})
    settings: dict[str, Any] = training.settings()
    task = load_task(data, seed=training.seed)
    base = network.open()
    folder = out or Path(f"{task.task.name}-multires")
    make_folder("--out", folder)
    settings |= {"method": method, "out": folder, "reuse": not restart, "progress": not console.quiet}
    runs: dict[str, list[MultiResolution]] = {}
    for one, seed in itertools.product(dict.fromkeys(sharings), range(training.seed, training.seed + seeds)):
        if restart:
            shutil.rmtree(Files.of(folder, task, one, seed).checkpoint, ignore_errors=True)
        settings |= {"sharing": one, "seed": seed}
        runs.setdefault(one, []).append(fit_multires(base, task, pixels, **settings))
    rows, title = [SharingRow.of(own) for own in runs.values()], f"{task.task.name} on {base.spec}"
    console.show(sharing_table(rows, title))
    for first, *_ in runs.values():
        patches = ", ".join(f"{size} px" for size in first.patches)
        console.tell(f"{first.sharing}: patches at {patches} over {first.backbone.spec} in {folder}")
    console.tell_run(folder)
    tops = {name: [run.top1 for run in own] for name, own in runs.items()}
    console.write_json({"task": task.task.name, "backbone": base.spec, "rows": [*map(asdict, rows)], "runs": tops})
    console.draw(plot, plot_sharing, rows, title)


def _read_pixels(text: str) -> list[int]:
    """The pixels of --resolutions. Raises `TrainingError` for values that are not numbers."""
    names = read_names("--resolutions", text)
    if wrong := [name for name in names if not name.isascii() or not name.isdigit()]:
        raise TrainingError(f"--resolutions {wrong[0]!r} is not a number of pixels. Write them as 96,128,160.")
    return [int(name) for name in names]
