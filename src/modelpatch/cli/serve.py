"""`modelpatch serve`: answer over HTTP with the patches of a store."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from modelpatch.cli.console import Screen
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
    backbone: BackboneOption,
    store: str = Argument(..., help="The folder or URL of a store of patches."),
    host: str = Option("127.0.0.1", help="Address to listen on; 0.0.0.0 is every network."),
    port: int = Option(8000, min=0, max=65535, help="Port; 0 takes a free one."),
    token: str | None = Option(None, envvar="MODELPATCH_TOKEN", help="To publish, tag and remove; none: nobody may."),
    workers: int = Option(1, min=1, help="Processes that answer and share the backbone's memory."),
    cache: int = Option(DEFAULT.cache_bytes, min=1, help="Bytes for resident patches, per worker."),
    deadline: float = Option(DEFAULT.deadline, min=0.1, help="Seconds per request, at most."),
    batch: int = Option(DEFAULT.batch, min=1, help="Images in a batch, at most."),
    queue: int = Option(DEFAULT.queue, min=1, help="Waiting images, at most; more get 429."),
    pixels: int = Option(DEFAULT.pixels, min=1, help="Pixels of an image, at most."),
    refresh: float = Option(DEFAULT.refresh, min=0, help="Seconds until changes of the store are seen."),
    tune: bool = Option(True, help="Measure the fastest way to run first: some seconds."),
    cascade: list[Path] | None = Option(None, help="A cascade to serve under its task's name; may be repeated."),
    device: DeviceOption = "cpu",
    argument: ArgumentOption = None,
    ray: bool = Option(False, "--ray", help="Deploy replicas on Ray Serve instead of workers."),
    replicas: int = Option(2, min=1, help="Number of replicas, with --ray."),
) -> None:
    """Answer over HTTP with the patches of a store: any of them, several, or all at once, loaded on demand.

    The page is at /, the routes are described at /openapi.json. Ctrl-C or SIGTERM finishes what runs, then stops.
    """
    import torch

    from modelpatch.cli.loading import find_device, open_backbone
    from modelpatch.serve.run import check_libraries, serve_forever

    check_libraries()
    limits: dict[str, Any] = {"cache_bytes": cache, "deadline": deadline, "batch": batch, "queue": queue}
    limits |= {"images": min(DEFAULT.images, queue), "pixels": pixels, "refresh": refresh}
    settings = Settings(token=token, **limits)
    place = find_device(device)
    cascades = _read_cascades(cascade or [])
    arguments = parse_arguments(argument)
    options: dict[str, Any] = {"host": host, "port": port, "tune": tune, "say": Screen().tell}
    if ray:
        from modelpatch.serve.deployment import deploy

        if cascades:
            raise ServeError("--cascade is for servers of this machine. Leave --ray out, or serve the patches alone.")
        if workers != 1:
            raise ServeError("--workers and --ray are two ways to have several processes. With --ray, give --replicas.")
        deploy(store, backbone, arguments, str(place), settings, replicas=replicas, **options)
        return
    load = partial(open_backbone, backbone, arguments, torch.device("cpu"))
    serve_forever(store, load, place, settings, workers=workers, cascades=cascades, **options)


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
