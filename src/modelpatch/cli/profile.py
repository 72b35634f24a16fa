"""modelpatch profile: which blocks are worth training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from modelpatch.cli.outputs import JsonOption, check_file, check_pictures, open_console, tell, write_json
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
from modelpatch.report.selection import plot_profile, profile_table
from modelpatch.report.tables import show
from modelpatch.select import profile as run_profile


def profile(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    backbone: BackboneOption = "bundled:tiny",
    method: MethodOption = "subset",
    set_: SetOption = None,
    consecutive: Annotated[int, typer.Option(min=1, help="Train runs of this many blocks.")] = 1,
    pairs: Annotated[bool, typer.Option("--pairs", help="Train every pair of blocks.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Train whole stages.")] = False,
    folds: Annotated[int, typer.Option(min=1, help="Folds of the training images; 1: one held-out split.")] = 1,
    seeds: SeedsOption = 1,
    epochs: EpochsOption = 10,
    batch_size: BatchSizeOption = 32,
    image_size: ImageSizeOption = None,
    seed: SeedOption = 0,
    images: ImagesOption = None,
    halving: HalvingOption = 0,
    option: FitOption = None,
    workers: WorkersOption = 1,
    ray: RayOption = False,
    ray_address_: RayAddressOption = "local",
    trials: TrialsOption = None,
    disk: DiskOption = "16GB",
    plot: Annotated[Path | None, typer.Option(help="Draw the bars, or the heat map of pairs, to this picture.")] = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Train each block (or run, pair or stage) alone with the head and show what it gains on held-out training images.

    The test images are not read. An interrupted profile goes on when the same command is given again.
    """
    console = open_console(json)
    check_file("--json", json)
    check_pictures(plot=plot)
    made = make_method(method, **parse_pairs(set_, "--set"))
    settings = fit_settings(option, epochs=epochs, batch_size=batch_size, image_size=image_size, seed=seed)
    arguments, place = parse_arguments(argument), find_device(device)
    cluster, room = ray_address(ray, ray_address_), read_disk(disk)
    task = load_images(data, images, seed)
    file = trials_file(trials, task.task.name)
    check_file("--trials", file)
    base = open_backbone(backbone, arguments, place)
    result = run_profile(
        base,
        task,
        made,
        consecutive=consecutive,
        pairs=pairs,
        stages=stages,
        folds=folds,
        halving=halving,
        seeds=seeds,
        workers=workers,
        ray=cluster,
        trials=file,
        disk=room,
        progress=True,
        **settings,
    )
    show(console, profile_table(result))
    tell(console, f"outcomes kept in {file}")
    write_json(json, result.as_dict())
    if plot is not None:
        plot_profile(result, plot)
        tell(console, f"drew {plot}")
