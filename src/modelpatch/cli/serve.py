"""`modelpatch serve`: answer over HTTP with the patches of a store."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpatch.cli.console import open_console, tell
from modelpatch.cli.options import ArgumentOption, BackboneOption, DeviceOption
from modelpatch.cli.settings import parse_arguments
from modelpatch.cli.verb import verb
from modelpatch.errors import ServeError
from modelpatch.serve.settings import Settings

if TYPE_CHECKING:
    from modelpatch.engine.cascade import Cascade

DEFAULT = Settings()


@verb(first="backbone host port token workers cascade", panel="Limits")
def serve(
    store: Annotated[str, typer.Argument(help="The folder or URL of a store of patches.")],
    backbone: BackboneOption,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MODELPATCH_TOKEN",
            help="Token of requests that publish, tag and remove; without one they are refused.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer and share the backbone's memory.")] = 1,
    cache: Annotated[int, typer.Option(min=1, help="Bytes for resident patches, per worker.")] = DEFAULT.cache_bytes,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds per request, at most.")] = DEFAULT.deadline,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch, at most.")] = DEFAULT.batch,
    queue: Annotated[int, typer.Option(min=1, help="Waiting images, at most; more get 429.")] = DEFAULT.queue,
    pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image, at most.")] = DEFAULT.pixels,
    refresh: Annotated[
        float, typer.Option(min=0, help="Seconds until changes of the store are seen.")
    ] = DEFAULT.refresh,
    tune: Annotated[bool, typer.Option(help="Measure the fastest way to run first: some seconds.")] = True,
    cascade: Annotated[
        list[Path] | None,
        typer.Option(help="A cascade file, served under its task's name, always resident; may be repeated."),
    ] = None,
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    ray: Annotated[bool, typer.Option("--ray", help="Deploy replicas on Ray Serve instead of workers.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas, with --ray.")] = 2,
) -> None:
    """Answer over HTTP with the patches of a store: any of them, several, or all at once, loaded on demand.

    The page is at /, the routes are described at /openapi.json. Ctrl-C or SIGTERM finishes what runs, then stops.
    """
    import torch

    from modelpatch.cli.loading import find_device, open_backbone
    from modelpatch.serve.run import check_libraries, serve_forever

    check_libraries()
    console = open_console()
    settings = Settings(
        token=token,
        cache_bytes=cache,
        deadline=deadline,
        batch=batch,
        queue=queue,
        images=min(DEFAULT.images, queue),
        pixels=pixels,
        refresh=refresh,
    )
    place = find_device(device)
    cascades = _read_cascades(cascade or [])
    options: dict[str, Any] = {"host": host, "port": port}
    if ray:
        from modelpatch.serve.deployment import deploy

        if cascades:
            raise ServeError("--cascade is for servers of this machine. Leave --ray out, or serve the patches alone.")
        if workers != 1:
            raise ServeError("--workers and --ray are two ways to have several processes. With --ray, give --replicas.")
        deploy(
            store,
            backbone,
            parse_arguments(argument),
            str(place),
            settings,
            replicas=replicas,
            tune=tune,
            say=partial(tell, console),
            **options,
        )
        return
    load = partial(open_backbone, backbone, parse_arguments(argument), torch.device("cpu"))
    serve_forever(
        store,
        load,
        place,
        settings,
        workers=workers,
        tune=tune,
        say=partial(tell, console),
        cascades=cascades,
        **options,
    )


def _read_cascades(files: list[Path]) -> dict[str, Cascade]:
    """Cascades by their tasks' names. Raises `ServeError` for two of one task and for the backbone's name."""
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.engine import BASE

    read: dict[str, Cascade] = {}
    for file in files:
        cascade = Cascade.load(file)
        if cascade.task.name in read or cascade.task.name == BASE:
            raise ServeError(f"--cascade {file}: there is a task {cascade.task.name!r} already.")
        read[cascade.task.name] = cascade
    return read
