"""The same server as replicas on Ray Serve: Ray places requests, every replica keeps its own cache.

A request's header `serve_multiplexed_model_id` names its patch, and Ray sends it where that patch was answered before. Only
that hint is Ray's: loading, the budget, single flight and what happens to a patch that fails stay with each replica's shelf,
so a failing load takes nothing from its neighbours. A hint that Ray forgets costs nothing either.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from modelpatch.errors import MissingExtraError, ServeError
from modelpatch.patch.store import Store
from modelpatch.serve.settings import Settings

NAME = "modelpatch"
HINTS = 1000  # patches a replica may be known for


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
    tune: bool,
    say: Callable[[str], None],
) -> None:
    """Run replicas until SIGTERM or Ctrl-C, on the Ray cluster that `RAY_ADDRESS` names or on one of this machine.

    Raises `MissingExtraError` without Ray Serve, `ServeError` where it cannot start.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("ray[serve]", "ray", "--ray") from error
    Store(url).list()
    stopped = threading.Event()
    try:
        serve.start(http_options={"host": host, "port": port})
        application = replica(url, spec, arguments, device, settings, tune)
        serve.run(
            application.options(
                name=NAME,
                num_replicas=replicas,
                max_ongoing_requests=settings.requests,
                graceful_shutdown_timeout_s=settings.deadline,
            ).bind(),
            name=NAME,
            route_prefix="/",
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        say(f"http://{host}:{port} ({replicas} replicas)")
        stopped.wait()
    except RuntimeError as error:
        raise ServeError(f"Ray Serve cannot run the replicas: {error}") from error
    finally:
        serve.shutdown()


def replica(url: str, spec: str, arguments: Mapping[str, Any], device: str, settings: Settings, tune: bool) -> Any:
    """The deployment whose replicas each build the application for themselves."""
    from ray import serve

    def build() -> Any:
        from modelpatch.backbone import load_backbone
        from modelpatch.engine import measure
        from modelpatch.serve.app import create_app
        from modelpatch.serve.service import Service

        backbone = load_backbone(spec, **arguments)
        backbone = backbone if device == "cpu" else backbone.to(device)
        app = create_app(Service(Store(url), backbone, settings, measure(backbone) if tune else None))

        @serve.multiplexed(max_num_models_per_replica=HINTS)  # type: ignore[untyped-decorator]
        async def known_for(reference: str) -> str:
            return reference

        async def hint(request: Any, call: Callable[[Any], Awaitable[Any]]) -> Any:
            response = await call(request)
            if (reference := serve.get_multiplexed_model_id()) and response.status_code < 400:
                await known_for(reference)
            return response

        app.middleware("http")(hint)
        return app

    return serve.deployment(serve.ingress(build)())
