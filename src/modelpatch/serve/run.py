"""Start a server: everything is checked and loaded once, then workers serve."""

from __future__ import annotations

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
    import importlib.util

    for module, library in (
        ("fastapi", "fastapi"),
        ("uvicorn", "uvicorn"),
        ("httptools", "httptools"),
        ("python_multipart", "python-multipart"),
        ("prometheus_client", "prometheus-client"),
    ):
        if importlib.util.find_spec(module) is None:
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
    say(f"http://{_shown(listening)}")
    if tune:
        say(str(tuning))
    with tempfile.TemporaryDirectory(prefix="modelpatch-metrics-") as folder:
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        import uvicorn  # noqa: F401 (here, and after that, so that a new worker finds all imports done)

        import modelpatch.serve.app
        import modelpatch.serve.protocol  # noqa: F401
        from modelpatch.serve.metrics import forget

        parent = os.getpid()

        def work(opened: socket.socket, ready: Callable[[], None]) -> None:
            try:
                run_worker(url, backbone.to(device), settings, tuning, opened, threads, ready, cascades)
            finally:
                if os.getppid() != parent:  # it was killed, so the folder is still there
                    shutil.rmtree(folder, ignore_errors=True)

        Supervisor(work, listening, workers, settings.deadline + 2 * DRAIN, forget).run()


def run_worker(
    url: str,
    backbone: Backbone,
    settings: Settings,
    tuning: Tuning,
    listening: socket.socket,
    threads: int,
    ready: Callable[[], None],
    cascades: Mapping[str, Cascade] | None = None,
) -> None:
    """Serve on a listening socket in this process until SIGTERM; requests that run are finished.

    The engine computes with `threads`; nothing else of this process has more than PyTorch's number, which is 1 here.
    """
    import uvicorn

    from modelpatch.serve.app import create_app
    from modelpatch.serve.protocol import GuardedProtocol
    from modelpatch.serve.service import Service

    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    sys.setswitchinterval(SWITCH)
    app = create_app(Service(Store(url), backbone, settings, tuning, cascades, threads), ready)
    config = uvicorn.Config(
        app,
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
    uvicorn.Server(config).run(sockets=[listening])


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
