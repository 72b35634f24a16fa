"""Start a server: everything is checked and loaded once, then workers serve."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping

import torch

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.cascade import Cascade
from modelpatch.engine.measuring import measure
from modelpatch.errors import MissingExtraError, ServeError
from modelpatch.serve.settings import Settings
from modelpatch.serve.supervisor import Supervisor, bind, rehearse
from modelpatch.store.store import Store

CONNECTIONS = 1024  # open at once, a worker; more are told 503 at once
SWITCH = 0.0005  # seconds until a thread that waits for the interpreter gets it: the engine asks between any two layers
DRAIN = 5.0  # seconds beside the deadline that stopping may take


def check_libraries() -> None:
    """Raises `MissingExtraError` where the extra `serve` is not installed."""
    for library in ("fastapi", "uvicorn", "httptools", "python-multipart", "prometheus-client"):
        if importlib.util.find_spec(library.replace("-", "_")) is None:
            raise MissingExtraError(library, "serve", "serving")


def check_store(url: str, settings: Settings) -> None:
    """Raises `StoreError` where the store cannot be listed, `ServeError` where there is none and no token to publish with."""
    store = Store(url)
    if settings.token is None and not store.exists():
        raise ServeError(
            f"there is no store at {url}, and without a token no patch can be published to it here.",
            f"`modelpatch store add {url} NAME FILE` makes one.",
        )
    store.list()


def serve_forever(
    url: str,
    load: Callable[[], Backbone],
    device: torch.device,
    settings: Settings,
    *,
    host: str,
    port: int,
    workers: int,
    tune: bool,
    say: Callable[[str], None],
    cascades: Mapping[str, Cascade] | None = None,
) -> None:
    """Serve the store at `url` until SIGTERM or Ctrl-C. `load` gives the backbone on the CPU; workers move it to the `device`.

    `say` is told once where the server listens. `cascades` are served beside the store's patches, by their names. Raises
    `StoreError`, `ServeError` and `WrongBackboneError` before anything is served.
    """
    listening = bind(host, port)
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(1)  # no thread in this process, so that it may fork; workers have the engine's thread alone
    backbone = load()
    for cascade in (cascades or {}).values():
        for patch in cascade.patches:
            patch.check_backbone(backbone)

    def try_all() -> Tuning:
        torch.set_num_threads(threads)
        check_store(url, settings)
        return measure(backbone.to(device)) if tune else Tuning()

    tuning = rehearse(try_all)
    name, bound = listening.getsockname()[:2]
    say(f"http://[{name}]:{bound}" if ":" in name else f"http://{name}:{bound}")
    if tune:
        say(str(tuning))
    with tempfile.TemporaryDirectory(prefix="modelpatch-metrics-") as folder:
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        import uvicorn  # here, and after that, so that a new worker finds all imports done

        from modelpatch.serve.app import create_app
        from modelpatch.serve.metrics import forget
        from modelpatch.serve.protocol import GuardedProtocol
        from modelpatch.serve.service import Service

        parent = os.getpid()

        def work(opened: socket.socket, ready: Callable[[], None]) -> None:
            """Serve in this process until SIGTERM; requests that run are finished."""
            logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
            sys.setswitchinterval(SWITCH)
            service = Service(Store(url), backbone.to(device), settings, tuning, cascades, threads)
            config = uvicorn.Config(
                create_app(service, ready),
                http=GuardedProtocol,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=round(settings.deadline + DRAIN),
            )
            try:
                uvicorn.Server(config).run(sockets=[opened])
            finally:
                if os.getppid() != parent:  # it was killed, so the folder is still there
                    shutil.rmtree(folder, ignore_errors=True)

        Supervisor(work, listening, workers, settings.deadline + 2 * DRAIN, forget).run()
