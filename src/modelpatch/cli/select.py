"""modelpatch select: choose the blocks to patch, and patch them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from modelpatch.cli.options import (
    ArgumentOption,
    BackboneOption,
    DeviceOption,
    SeedOption,
    find_device,
    fit_settings,
    open_backbone,
    parse_arguments,
    parse_pairs,
)
from modelpatch.cli.outputs import (
    ForceOption,
    JsonOption,
    check_file,
    check_free,
    check_pictures,
    open_console,
    tell,
    write_json,
)
from modelpatch.cli.selecting import (
    BatchSizeOption,
    DiskOption,
    EpochsOption,
    FitOption,
    HalvingOption,
    ImageSizeOption,
    ImagesOption,
    MethodOption,
    RayAddressOption,
    RayOption,
    SeedsOption,
    SetOption,
    TrialsOption,
    WorkersOption,
    load_images,
    ray_address,
    read_disk,
    trials_file,
)
from modelpatch.methods import make_method
from modelpatch.report.selection import plot_order, round_table, selection_table
from modelpatch.report.tables import show
from modelpatch.select import Greedy
from modelpatch.select import select as run_select
from modelpatch.select.budget import parse_bytes, parse_latency
from modelpatch.select.greedy import Rule, Start


def select(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The patch file; by default TASK.safetensors.")
    ] = None,
    force: ForceOption = False,
    backbone: BackboneOption = "bundled:tiny",
    method: MethodOption = "subset",
    set_: SetOption = None,
    folds: Annotated[int, typer.Option(min=1, help="Folds of the training images; 1: one held-out split.")] = 5,
    seeds: SeedsOption = 1,
    epsilon: Annotated[float, typer.Option(help="The accuracy a block must add to be taken.")] = 0.01,
    rule: Annotated[str, typer.Option(help="paper: Algorithm 1; code: what the paper's authors run.")] = "paper",
    start: Annotated[str, typer.Option(help="With --rule code: none, all (blocks are removed) or better.")] = "none",
    among: Annotated[
        str | None, typer.Option(help="Comma-separated blocks to choose among, as a profile shows; by default all.")
    ] = None,
    max_blocks: Annotated[int | None, typer.Option(min=1, help="At most this many blocks.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="The largest file: 200KB, 1.5MB.")] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="The most time the patch may add to the base's: +15%.")
    ] = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Candidates go on from the blocks trained in the round before.")
    ] = False,
    halving: HalvingOption = 0,
    epochs: EpochsOption = 10,
    batch_size: BatchSizeOption = 32,
    image_size: ImageSizeOption = None,
    seed: SeedOption = 0,
    images: ImagesOption = None,
    option: FitOption = None,
    workers: WorkersOption = 1,
    ray: RayOption = False,
    ray_address_: RayAddressOption = "local",
    trials: TrialsOption = None,
    disk: DiskOption = "16GB",
    plot: Annotated[Path | None, typer.Option(help="Draw the order of the blocks to this picture.")] = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Choose blocks greedily by cross-validation, then train a patch of them on all training images and test it once.

    An interrupted selection goes on when the same command is given again.
    """
    console = open_console(json)
    check_file("--json", json)
    check_pictures(plot=plot)
    if out is not None:
        check_file("--out", out)
    made = make_method(method, **parse_pairs(set_, "--set"))
    greedy = Greedy(
        rule=cast(Rule, rule),
        start=cast(Start, start),
        epsilon=epsilon,
        warm_start=warm_start,
        halving=halving,
        candidates=tuple(name.strip() for name in among.split(",")) if among else (),
    )
    limits = {
        "max_blocks": max_blocks,
        "max_bytes": None if max_bytes is None else parse_bytes(max_bytes),
        "max_latency": None if max_latency is None else parse_latency(max_latency),
    }
    settings = fit_settings(option, epochs=epochs, batch_size=batch_size, image_size=image_size, seed=seed)
    arguments, place = parse_arguments(argument), find_device(device)
    cluster, room = ray_address(ray, ray_address_), read_disk(disk)
    task = load_images(data, images, seed)
    path = out or Path(f"{task.task.name}.safetensors")
    file = trials_file(trials, task.task.name)
    check_file("--out", path)
    check_file("--trials", file)
    check_free("--out", [path], force)
    base = open_backbone(backbone, arguments, place)
    result = run_select(
        base,
        task,
        made,
        greedy=greedy,
        folds=folds,
        seeds=seeds,
        out=path,
        workers=workers,
        ray=cluster,
        trials=file,
        disk=room,
        progress=True,
        each_round=lambda one: show(console, round_table(one, task.task.name)),
        **limits,  # type: ignore[arg-type]
        **settings,
    )
    show(console, selection_table(result))
    tell(console, f"wrote {path} ({result.patch.inspect().file_bytes:,} bytes); outcomes kept in {file}")
    write_json(json, result.as_dict())
    if plot is not None:
        plot_order(result, plot)
        tell(console, f"drew {plot}")
