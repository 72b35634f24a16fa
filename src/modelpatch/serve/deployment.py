"""The same server as replicas on Ray Serve: Ray places requests, every replica keeps its own cache."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.errors import ServeError, require
from modelpatch.serve.run import DRAIN, bind, check_store, rehearse
from modelpatch.serve.settings import Settings
from modelpatch.store.store import Store
from modelpatch.text import first_line

NAME = "modelpatch"
LOCAL = "local"  # Ray's word for a Ray of this machine that ends with this process
HINTS = 1000  # patches a replica may be known for: Ray sends it requests whose header names one of them
HEARTBEAT = 1.0  # seconds between two looks whether a replica lives
PAUSE = 0.5  # seconds between two looks whether all replicas have started
QUIET = {"log_level": "WARNING", "enable_access_log": False}


def deploy(
    url: str,
    spec: str,
    arguments: Mapping[str, Any],
    device: str,
    settings: Settings,
    *,
    host: str,
    port: int,
    replicas: int,
    tuning: Tuning | None = None,
    say: Callable[[str], None],
) -> None:
    """Run replicas until SIGTERM or Ctrl-C, on the Ray cluster that `RAY_ADDRESS` names or on one of this machine.

    Raises `MissingExtraError` without Ray Serve, `ServeError` where it, the store or the backbone cannot be used.
    """

    def check() -> None:
        check_store(url, settings)
        load_backbone(spec, **arguments)

    rehearse(check)  # a replica that raises is started again and again; before Ray is imported, which starts threads
    address = os.environ.get("RAY_ADDRESS", LOCAL)
    if address == LOCAL:
        with bind(host, port) as free:
            port = free.getsockname()[1]
    require("ray.serve", "ray", "--ray", "ray[serve]")
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's is 15: other processes would run before requests
    threads = max(1, (os.cpu_count() or 1) // replicas)
    own: dict[str, Any] = {"num_cpus": threads * replicas, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, logging_level=logging.WARNING, **own)
    except Exception as error:  # Ray raises that itself
        raise ServeError(f"there is no Ray at {address!r}: {first_line(error)}.") from error
    stopped: SimpleQueue[int] = (
        SimpleQueue()
    )  # whose `put` may come while this thread is inside `get`; an Event's `set` may not
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
        signal.signal(number, lambda number, _: stopped.put(number))
    try:
        resources = {"num_cpus": threads if own else 1, "num_gpus": int(device.startswith("cuda"))}
        application = replica(url, spec, arguments, device.partition(":")[0], settings, tuning).options(
            name=NAME,
            num_replicas=replicas,
            ray_actor_options=resources,
            max_ongoing_requests=settings.requests,
            graceful_shutdown_timeout_s=settings.deadline,
            health_check_period_s=HEARTBEAT,
            logging_config=QUIET,
        )
        if _run(application, host, port, stopped):
            say(f"http://{host}:{port} ({replicas} replicas)")
            stopped.get()
    finally:
        _stop(settings.deadline + 2 * DRAIN, last=bool(own))


def replica(
    url: str, spec: str, arguments: Mapping[str, Any], device: str, settings: Settings, tuning: Tuning | None
) -> Any:
    """The deployment whose replicas each build the application for themselves."""
    from ray import serve

    def build() -> Any:
        import torch

        from modelpatch.serve.app import create_app
        from modelpatch.serve.service import Service

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the engine's thread alone has more
        backbone = load_backbone(spec, **arguments)
        backbone = backbone if device == "cpu" else backbone.to(device)
        app = create_app(Service(Store(url, signers=settings.signers), backbone, settings, tuning, threads=threads))

        @serve.multiplexed(max_num_models_per_replica=HINTS)  # type: ignore[untyped-decorator]
        async def known_for(reference: str) -> str:
            return reference

        @app.middleware("http")
        async def hint(request: Any, call: Callable[[Any], Awaitable[Any]]) -> Any:
            response = await call(request)
            if (reference := serve.get_multiplexed_model_id()) and response.status_code < 400:
                await known_for(reference)
            return response

        return app

    return serve.deployment(serve.ingress(build)())


def _run(application: Any, host: str, port: int, stopped: SimpleQueue[int]) -> bool:
    """Deploy, and wait until all replicas run. False if a signal that stops came first. Raises `ServeError`."""
    from ray import serve
    from ray.exceptions import RayActorError, RayError

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        for last in (False, False, True):
            try:
                serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
                break
            except RayActorError:  # on a busy machine Ray puts another proxy in the place of one that starts slowly
                if last:
                    raise
        target = serve.RunTarget(application.bind(), name=NAME, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        while not _arrived(stopped, PAUSE):
            found = serve.status().applications.get(NAME)
            if found is not None and found.status == "RUNNING":
                return True
            if found is not None and found.status == "DEPLOY_FAILED":
                raise ServeError(f"the replicas cannot start: {found.message}")
    except (RuntimeError, TimeoutError, RayError) as error:
        raise ServeError(f"Ray Serve cannot run the replicas: {first_line(error)}.") from error
    return False


def _arrived(signals: SimpleQueue[int], seconds: float) -> bool:
    """Wait for a signal for so many seconds at most."""
    try:
        signals.get(timeout=seconds)
    except Empty:
        return False
    return True


def _stop(seconds: float, last: bool) -> None:
    """Let replicas finish what runs, then end Ray if it is ours (`last`), else Serve if it is not used.

    Ray's calls may wait for processes that are gone: after `seconds` this process ends on the spot.
    """
    import ray
    from ray import serve

    def leave() -> None:
        try:
            serve.delete(NAME)
            if not last and not serve.status().applications:
                serve.shutdown()
        except Exception as error:
            print(f"Ray Serve did not stop in order: {error}", file=sys.stderr, flush=True)
        ray.shutdown()

    worker = threading.Thread(target=leave, daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        left = "it is ended as it is" if last else f"see `serve status` for what is left of {NAME}"
        if error := sys.exception():  # why it was to stop
            print(error, file=sys.stderr)
        print(f"Ray did not stop within {seconds:g} seconds; {left}", file=sys.stderr, flush=True)
        os._exit(1)
