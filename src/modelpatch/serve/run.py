"""Start a server: everything is checked and loaded once, then workers serve, and a parent replaces those that end.

The workers are forked from a parent that has everything loaded: a new one serves at once, and all share one socket and the
backbone's memory. The parent starts no thread, which makes forking safe, and holds the writing end of a pipe: when it dies,
workers read its end.
"""

import importlib.util
import logging
import mmap
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.backends.base import choose_backend
from modelpatch.engine.cascade import Cascade
from modelpatch.errors import MissingExtraError, ModelpatchError, ServeError
from modelpatch.serve.settings import Settings
from modelpatch.store.store import Store

T = TypeVar("T")
BACKLOG = 2048
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where the workers of one server add up their counts
STOPPING = (signal.SIGTERM, signal.SIGINT)
TRIES = 5  # workers in a row that end before they serve, until the server gives up
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
    store = Store(url, signers=settings.signers)
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
    tuning: Tuning | None = None,
    say: Callable[[str], None],
    cascades: Mapping[str, Cascade] | None = None,
) -> None:
    """Serve the store at `url` until SIGTERM or Ctrl-C. `load` gives the backbone on the CPU; workers move it to the `device`.

    `tuning` is that of the engine, by default its rule. `say` is told once where the server listens. `cascades` are served
    beside the store's patches, by their names. Raises `StoreError`, `ServeError` and `WrongBackboneError` before anything is
    served.
    """
    listening = bind(host, port)
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(1)  # no thread in this process, so that it may fork; workers have the engine's thread alone
    backbone = load()
    for cascade in (cascades or {}).values():
        for patch in cascade.patches:
            patch.check_backbone(backbone)

    rehearse(partial(check_store, url, settings))
    name, bound = listening.getsockname()[:2]
    say(f"http://[{name}]:{bound}" if ":" in name else f"http://{name}:{bound}")
    say(str(tuning or Tuning.of(backbone, device=device)))
    say(f"backend: {choose_backend(settings.backend, device, settled=tuning is not None).name}")
    with tempfile.TemporaryDirectory(prefix="modelpatch-metrics-") as folder:
        if workers > 1:
            os.environ[FOLDER] = folder
        import uvicorn  # here, and after that, so that a new worker finds all imports done

        from modelpatch.serve.app import create_app
        from modelpatch.serve.protocol import GuardedProtocol
        from modelpatch.serve.service import Service

        def work(opened: socket.socket, ready: Callable[[], object]) -> None:
            """Serve in this process until SIGTERM; requests that run are finished."""
            logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
            logging.getLogger("modelpatch.audit").setLevel(logging.INFO)  # who asked for what with the token
            sys.setswitchinterval(SWITCH)
            service = Service(
                Store(url, signers=settings.signers), backbone.to(device), settings, tuning, cascades, threads
            )
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
            uvicorn.Server(config).run(sockets=[opened])

        orphaned = partial(shutil.rmtree, folder, ignore_errors=True)
        Supervisor(work, listening, workers, settings.deadline + 2 * DRAIN, orphaned).run()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ServeError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        said = f"cannot listen on {host} port {port}: {error}."
        raise ServeError(said, "Choose another with --host and --port.") from error
    opened.set_inheritable(True)
    return opened


def rehearse(work: Callable[[], T]) -> T:
    """Run `work` in a child, so that this process stays without threads, and return its result. Raises its errors."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send((True, work()))
        except ModelpatchError as error:
            sender.send((False, str(error)))

    child = fork.Process(target=run)
    child.start()
    sender.close()
    try:
        fine, result = receiver.recv()
    except EOFError:
        raise ServeError("the server cannot start: the first process ended without a word.") from None
    finally:
        child.join()
    if not fine:
        raise ServeError(result)
    return result


@dataclass(eq=False)
class Supervisor:
    """Keeps `workers` processes alive that run `serve(listening, ready)` until SIGTERM, and call `ready` once they serve."""

    serve: Callable[[socket.socket, Callable[[], object]], None]
    listening: socket.socket
    workers: int
    grace: float  # seconds that they may take to finish their work after SIGTERM; then they are killed
    orphaned: Callable[[], object] = lambda: None  # called by workers that end after this process, which was killed
    _children: dict[int, mmap.mmap] = field(default_factory=dict, init=False)  # each sets a byte once it serves
    _stopping: bool = field(default=False, init=False)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises `ServeError` if workers end before they serve."""
        from prometheus_client.multiprocess import mark_process_dead

        self._lifeline, self._held = os.pipe()
        for number in STOPPING:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGALRM, lambda *_: self._signal_all(signal.SIGKILL))
        failed = 0
        for _ in range(self.workers):
            self._start()
        while self._children:
            child, status = os.waitpid(-1, 0)
            serving = self._children.pop(child, None)
            if FOLDER in os.environ:
                mark_process_dead(child)  # removes its gauges; its counters stay
            if serving is None or self._stopping:
                continue
            failed = 0 if serving[0] else failed + 1
            code = os.waitstatus_to_exitcode(status)
            end = f"signal {-code}" if code < 0 else f"status {code}"
            if failed >= TRIES * self.workers:
                self._stop()
                raise ServeError(f"workers end before they serve ({end}). The log above says why.")
            print(f"worker {child} ended ({end}); another takes its place", file=sys.stderr, flush=True)
            self._start()

    def _start(self) -> None:
        masked, serving = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING), mmap.mmap(-1, 1)
        parent, child = os.getpid(), os.fork()
        if child == 0:
            self._work(parent, masked, serving)
        self._children[child] = serving
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        if self._stopping:  # the signal came while it was blocked
            os.kill(child, signal.SIGTERM)

    def _work(self, parent: int, masked: Any, serving: mmap.mmap) -> None:
        """In the child: serve, and never return."""

        def leave(status: int) -> None:
            if os.getppid() != parent:
                self.orphaned()
            os._exit(status)

        status = 1
        try:
            os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
            os.close(self._held)
            # The server takes these signals while it serves. Before and after it they end the worker on the spot: an exception
            # would be lost where one comes in a callback or in `__del__`.
            for number in STOPPING:
                signal.signal(number, lambda *_: leave(0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            threading.Thread(target=self._watch, daemon=True).start()
            self.serve(self.listening, lambda: serving.write(b"1"))
            status = 0
        except BaseException as error:
            print(f"worker {os.getpid()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            leave(status)

    def _watch(self) -> None:
        os.read(self._lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)  # as if the parent, which is gone, had said so

    def _stop(self, *signalled: object) -> None:
        if not self._stopping:
            self._stopping = True
            self.listening.close()
            signal.alarm(max(1, round(self.grace)))
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for child in list(self._children):
            with suppress(ProcessLookupError):
                os.kill(child, number)
