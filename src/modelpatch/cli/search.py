"""modelpatch search: the best patch within a budget."""

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
    ImageSizeOption,
    ImagesOption,
    RayAddressOption,
    RayOption,
    SeedsOption,
    TrialsOption,
    WorkersOption,
    load_images,
    ray_address,
    read_disk,
    trials_file,
)
from modelpatch.methods.registry import split_outside
from modelpatch.report.search import plot_search, search_table
from modelpatch.report.tables import percent, show
from modelpatch.select import added_latency
from modelpatch.select import search as run_search
from modelpatch.select.budget import parse_bytes, parse_latency
from modelpatch.select.search import METHODS


def search(
    data: Annotated[str, typer.Argument(help="The task's data, as for fit.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The patch file; by default TASK.safetensors.")
    ] = None,
    force: ForceOption = False,
    backbone: BackboneOption = "bundled:tiny",
    max_bytes: Annotated[str | None, typer.Option(help="The largest file: 200KB, 1.5MB.")] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="The most time the patch may add to the base's: +15%.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated methods to choose among, with hyperparameters as in subset(blocks=last)."),
    ] = ",".join(METHODS),
    tries: Annotated[int, typer.Option(min=1, help="The most proposals to train.")] = 48,
    halving: Annotated[
        int, typer.Option(help="N: few epochs for all, N times as many for the best of N, and so on; 0: off.")
    ] = 3,
    folds: Annotated[int, typer.Option(min=1, help="Folds of the training images; 1: one held-out split.")] = 1,
    seeds: SeedsOption = 1,
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
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy, bytes and time to this picture.")] = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Choose method, blocks and settings by validation, within limits, and train the best patch that keeps them.

    An interrupted search goes on when the same command is given again.
    """
    console = open_console(json)
    check_file("--json", json)
    check_pictures(plot=plot)
    if out is not None:
        check_file("--out", out)
    most_bytes = None if max_bytes is None else parse_bytes(max_bytes)
    most_latency = None if max_latency is None else parse_latency(max_latency)
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
    result = run_search(
        base,
        task,
        split_outside(methods, ","),
        max_bytes=most_bytes,
        max_latency=most_latency,
        tries=tries,
        folds=folds,
        halving=halving,
        out=path,
        seeds=seeds,
        workers=workers,
        ray=cluster,
        trials=file,
        disk=room,
        progress=True,
        **settings,
    )
    show(console, search_table(result))
    patch = result.patch
    added = added_latency(base, patch)
    tell(
        console,
        f"{result.chosen.name}: {percent(patch.metrics['test_top1'])} % of the test images, "
        f"{patch.inspect().file_bytes:,} bytes, +{added:.1%} time\nwrote {path}; outcomes kept in {file}",
    )
    write_json(json, {**result.as_dict(), "file_bytes": patch.inspect().file_bytes, "added_latency": added})
    if plot is not None:
        plot_search(result, plot)
        tell(console, f"drew {plot}")
