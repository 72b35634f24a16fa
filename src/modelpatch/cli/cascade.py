"""`modelpatch cascade`: build an early-exit cascade of patches of one task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import Argument, Option

from modelpatch.cli.console import ForceOption, Screen, check_file, check_out
from modelpatch.cli.options import DeviceOption, PatchNetwork
from modelpatch.cli.verb import verb
from modelpatch.errors import CascadeError
from modelpatch.text import count_of


@verb(first="data accuracy confidence caution out", panel="Cascade")
def cascade(
    console: Screen,
    network: PatchNetwork,
    patches: list[Path] = Argument(..., help="Patch files of one task, all in one folder."),
    data: str = Option(..., help="The task's data: validation or held-out images set the thresholds."),
    out: Path | None = Option(None, "--out", "-o", help="The file; by default TASK.cascade.json beside the patches."),
    force: ForceOption = False,
    accuracy: float | None = Option(None, help="Held-out top-1 to keep, 0 to 1; by default the best patch's."),
    confidence: str = Option("probability", help="Its measure: probability, or fitted (that, entropy and gap)."),
    caution: float = Option(1.0, min=0, help="Standard errors of safety for the accuracy; 0: the paper's rule."),
    seed: int | None = Option(None, help="Seed of splits that the data does not have; by default that of the fits."),
    plot: Path | None = Option(None, help="A picture of top-1 against multiply-adds."),
    device: DeviceOption = "cpu",
) -> None:
    """Build an early-exit cascade: as accurate as the best patch on held-out images, with the fewest multiply-adds on average.

    Writes a small file beside the patches that eval and predict take like a patch (Streeter, 2018).
    """
    from modelpatch.cli.loading import fitted_seed
    from modelpatch.data.task import load_task
    from modelpatch.engine.cascade import is_cascade
    from modelpatch.patch.contents import Patch
    from modelpatch.recipes.cascading import cascade as build_cascade
    from modelpatch.report.cascades import cascade_table, plot_cascade, stages_table

    check_file("--out", out)
    if len(set(patches)) < len(patches):
        raise CascadeError("a patch file is given twice. Give each once.")
    loaded = {path: Patch.load(path) for path in patches}
    first = patches[0]
    target = out or first.parent / f"{loaded[first].task.name}.cascade.json"
    if not is_cascade(target):
        raise CascadeError(f"--out {target} is not the name of a cascade. Expected one that ends in .json.")
    check_out(target, force)
    if away := [path for path in patches if path.resolve().parent != target.resolve().parent]:
        raise CascadeError(f"{away[0]} does not lie beside {target}. Write the cascade into the folder of its patches.")
    base = network.open(loaded[first], first, device)
    chosen = fitted_seed(loaded[first]) if seed is None else seed
    task = load_task(data, seed=chosen)
    named, files = {path.stem: patch for path, patch in loaded.items()}, {path.stem: path for path in patches}
    rules: Any = {"accuracy": accuracy, "confidence": confidence, "caution": caution, "seed": chosen}
    result = build_cascade(base, named, task, **rules, progress=not console.quiet)
    result.cascade.save(target, [files[name] for name in result.order])
    console.show(cascade_table(result), stages_table(result))
    console.tell(f"wrote {target} ({target.stat().st_size:,} bytes) with {count_of(len(result.order), 'stage')}")
    if len(result.order) == 1:
        console.tell("no cascade of these patches keeps that accuracy for less work: the file holds the best one")
    console.write_json(result.as_dict())
    console.draw(plot, plot_cascade, result)
