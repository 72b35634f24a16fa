"""One run on a Ray cluster: its processes are actors, which train as those that torchrun starts do.

    driver -- work --> actor 0, 1, ... -- torch.distributed --> one team -- what actor 0 returns --> driver

If an actor dies all of them are started again, and the work goes on from its checkpoint.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from modelpatch.errors import ModelpatchError, TrainingError, require
from modelpatch.text import first_line
from modelpatch.train.distributed import process_group

T = TypeVar("T")
LOCAL = "local"
STARTS = 4


@contextmanager
def connected(address: str, cores: int) -> Iterator[None]:
    """A connection to the cluster at `address`: `local` starts one here with so many cores, `auto` finds a running one.

    Raises `TrainingError` where there is none.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if address == LOCAL else {}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:  # not ray://...: Ray would wait minutes where nobody listens
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise TrainingError(f"there is no Ray cluster at {address!r}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(work: Callable[[], T], count: int, *, threads: int = 1, address: str = LOCAL) -> T:
    """Call `work` as one team in `count` actors, each with `threads` cores, and return the first one's result.

    `work`, such as `partial(fit, backbone, data, ...)`, travels to them; files that it names must be readable, and its
    folders writable, under the same paths on all machines. Raises what it raises, `MissingExtraError` without Ray, and
    `TrainingError` for actors that die in each of several starts.
    """
    ray = require("ray", "ray", "Training on a cluster")
    with connected(address, count * threads):
        stored = ray.put(work)
        kind: Any = ray.remote(num_cpus=threads)(RayProcess)
        for _ in range(STARTS):
            actors = [kind.remote(threads, Path.cwd()) for _ in range(count)]
            try:
                return _result(actors, stored)
            except ray.exceptions.RayActorError as error:
                died = str(error).strip().splitlines()[-1]
            finally:
                for actor in actors:
                    ray.kill(actor)
    raise TrainingError(f"actors died in each of {STARTS} starts: {died}")


def _result(actors: list[Any], work: Any) -> Any:
    """Return the first actor's result. Raises what the work raised, and Ray's own error as soon as any actor has died."""
    import ray
    from ray.exceptions import RayActorError

    place = ray.get(actors[0].place.remote())
    runs = [actor.run.remote(work, rank, len(actors), place) for rank, actor in enumerate(actors)]
    waiting, answers = list(runs), dict[Any, Any]()
    while waiting:
        (done,), waiting = ray.wait(waiting)
        try:
            answers[done] = ray.get(done)
        except RayActorError:
            raise
        except Exception as error:  # of the work, or of a peer that lost its connection to one that failed or died
            answers[done] = error
    failed = [answer for answer in answers.values() if isinstance(answer, Exception)]
    if failed:
        raise next((error for error in failed if isinstance(error, ModelpatchError)), failed[0])
    return answers[runs[0]]


class RayProcess:
    """One process of the team, on the cluster."""

    def __init__(self, threads: int, folder: Path) -> None:
        torch.set_num_threads(threads)
        os.chdir(folder)

    def place(self) -> str:
        """Return an address for the team to meet at: HOST:PORT of this machine."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, work: Callable[[], Any], rank: int, count: int, place: str) -> Any:
        """The work's result in the first process, None in others; or the error that it raised on purpose."""
        try:
            with process_group(init_method=f"tcp://{place}", rank=rank, world_size=count):
                result = work()
            return result if rank == 0 else None
        except ModelpatchError as error:
            return error
