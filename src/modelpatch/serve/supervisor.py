"""One listening socket, worker processes that share it, and a parent that replaces workers that end.

    parent: imports, loads the backbone, binds and listens ── fork ── worker 1: engine, event loop, requests
            waits for children                             └─ fork ── worker 2: ...

A worker is forked from a parent that has everything loaded, so a new one serves at once and all share the backbone's memory.
The parent starts no thread, which makes forking safe, and holds the writing end of a pipe: when it dies, workers read its end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from modelpatch.errors import ModelpatchError, ServeError

T = TypeVar("T")
BACKLOG = 2048
STOPPING = (signal.SIGTERM, signal.SIGINT)
TRIES = 5  # workers in a row that end before they serve, until the server gives up


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ServeError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ServeError(
            f"cannot listen on {host} port {port}: {error}. Choose another with --host and --port."
        ) from error
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


class Supervisor:
    """Keeps `workers` processes alive that each run `serve(socket, ready)` until SIGTERM, which they answer by finishing their
    work. They call `ready` once they serve.

    `grace` is how long they may take to finish, in seconds; then they are killed.
    """

    def __init__(
        self,
        serve: Callable[[socket.socket, Callable[[], None]], None],
        listening: socket.socket,
        workers: int,
        grace: float,
        ended: Callable[[int], None],
    ) -> None:
        self.serve, self.listening, self.workers, self.grace, self.ended = serve, listening, workers, grace, ended
        self._children: set[int] = set()
        self._serving: set[int] = set()
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises `ServeError` if workers end before they serve."""
        self._lifeline, self._held = os.pipe()
        self._told, self._telling = os.pipe()
        os.set_blocking(self._told, False)
        for number in STOPPING:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGALRM, lambda *_: self._signal_all(signal.SIGKILL))
        failed = 0
        for _ in range(self.workers):
            self._start()
        while self._children:
            child, status = os.waitpid(-1, 0)
            known, served = child in self._children, self._served(child)
            self._children.discard(child)
            self.ended(child)
            if not known or self._stopping:
                continue
            failed = 0 if served else failed + 1
            if failed >= TRIES * self.workers:
                self._stop(signal.SIGTERM, None)
                raise ServeError(f"workers end before they serve ({_ended(status)}). The log above says why.")
            print(f"worker {child} ended ({_ended(status)}); another takes its place", file=sys.stderr, flush=True)
            self._start()

    def _served(self, child: int) -> bool:
        with suppress(BlockingIOError):
            while said := os.read(self._told, 4 * 1024):
                self._serving |= {number for (number,) in struct.iter_unpack("<i", said)}
        served = child in self._serving
        self._serving.discard(child)
        return served

    def _start(self) -> None:
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        child = os.fork()
        if child == 0:
            self._work(masked)
        self._children.add(child)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        if self._stopping:  # the signal came while it was blocked
            os.kill(child, signal.SIGTERM)

    def _work(self, masked: Any) -> None:
        """In the child: serve, and never return."""
        status = 1
        try:
            os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
            os.close(self._held)
            for number in STOPPING:  # the server takes them; before and after it they end the worker
                signal.signal(number, lambda *_: sys.exit())
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            threading.Thread(target=self._watch, daemon=True).start()
            self.serve(self.listening, self._tell)
            status = 0
        except SystemExit:
            status = 0
        except BaseException as error:
            print(f"worker {os.getpid()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _tell(self) -> None:
        os.write(self._telling, struct.pack("<i", os.getpid()))

    def _watch(self) -> None:
        os.read(self._lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)  # as if the parent, which is gone, had said so

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping:
            self._stopping = True
            self.listening.close()
            signal.alarm(max(1, round(self.grace)))
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for child in list(self._children):
            with suppress(ProcessLookupError):
                os.kill(child, number)


def _ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"status {code}"
