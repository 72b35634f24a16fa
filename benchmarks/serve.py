"""What HTTP costs on the loopback: our server beside direct calls of its engine, and LitServe beside it where installed.

    overhead     one client: the median of a request beside the engine's own call on the same bytes; its floor is a request
                 that asks for nothing
    throughput   8 and 32 clients: images a second beside the engine's own at the batch sizes that formed

    python benchmarks/serve.py --json benchmarks/results/serve.json

MobileNetV2 has its ImageNet weights where they are at hand, else the bundled backbone serves; patches are untrained.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3
from PIL import Image

import modelpatch as mp
from common import SHARED, compare_ways, mobilenet, report, untrained
from modelpatch.engine import measure
from modelpatch.serve.client import Client

TURNS = 3
ENGINE_ROUNDS = 12
LITSERVE = """
import sys
import litserve, torch
import modelpatch as mp
from modelpatch.engine import Engine, measure

class Api(litserve.LitAPI):
    def setup(self, device):
        backbone = mp.load_backbone(sys.argv[1])
        store = mp.Store(sys.argv[2])
        self.names = sys.argv[4:]
        self.engine = Engine(backbone, {name: store.load(name) for name in self.names}, tuning=measure(backbone))
    def decode_request(self, request):
        return request["images"].file.read()
    def batch(self, inputs):
        return list(inputs)
    def predict(self, images):
        images = images if isinstance(images, list) else [images]
        answers = self.engine(images, only=self.names)
        best = {name: logits.softmax(1).topk(3).values.tolist() for name, logits in answers.items()}
        return [{name: values[row] for name, values in best.items()} for row in range(len(images))]
    def unbatch(self, output):
        return output
    def encode_response(self, output):
        return output

if __name__ == "__main__":  # its workers import this file
    api = Api(max_batch_size=32, batch_timeout=0.0)
    litserve.LitServer(api, accelerator="cpu").run(port=int(sys.argv[3]), host="127.0.0.1", generate_client_file=False)
"""


class Server(AbstractContextManager[str]):
    """A server's process; yields its URL once it answers."""

    def __init__(self, command: list[str], url: str | None = None) -> None:
        output = subprocess.PIPE if url is None else subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=output, text=True, start_new_session=True)
        self.url = url

    def __enter__(self) -> str:
        if self.url is None:
            assert self.process.stdout is not None
            self.url = self.process.stdout.readline().strip()
        return self.url

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            with suppress(ProcessLookupError):  # workers that a server leaves behind
                os.killpg(self.process.pid, signal.SIGKILL)


def photo(pixels: int = 128) -> bytes:
    """A JPEG of smooth noise, of a photograph's size on the wire."""
    import io

    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).resize((pixels, pixels), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def images_a_second(ask: Callable[[], object], clients: int, seconds: float) -> float:
    """All clients ask over and over for that long; images answered a second."""
    counts = [0] * clients
    until = time.perf_counter() + seconds

    def one(place: int) -> None:
        while time.perf_counter() < until:
            ask()
            counts[place] += 1

    threads = [threading.Thread(target=one, args=(place,)) for place in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def batch_count(url: str) -> tuple[float, float]:
    """Batches so far, and their images, as the server counts them."""
    lines = urllib3.request("GET", f"{url}/metrics").data.decode().splitlines()
    counts = dict(line.rpartition(" ")[::2] for line in lines if line.startswith("modelpatch_batch_images"))
    return float(counts["modelpatch_batch_images_count"]), float(counts["modelpatch_batch_images_sum"])


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int, block: int = 10) -> dict[str, list[float]]:
    """Median milliseconds of every way, block by block, so that neighbours in time can be compared. There is a pause before
    each: helpers of a call here spin on for a while on a core that the server needs."""
    medians: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(1, rounds // block)):
        for name, way in ways.items():
            time.sleep(0.3)
            medians[name].append(statistics.median(compare_ways({name: way}, block)[name]))
    return medians


def measure_ours(url: str, engine: mp.Engine, names: list[str], image: bytes, rounds: int, seconds: float) -> list[Any]:
    with Client(url) as client:

        def ask() -> object:
            return client.predict([image], names)

        wait_for(client.ready)
        compare_ways({"http": ask}, 20)  # until the server has made what these tasks run on
        times = in_turns({"http": ask, "engine": lambda: engine([image], only=names)}, rounds)
        both = list(zip(times["http"], times["engine"], strict=True))
        middle = {name: statistics.median(values) for name, values in times.items()}
        added = statistics.median(http - own for http, own in both)
        rows: list[Any] = [("overhead, ms, 1 client", middle["http"], middle["engine"], added)]
        nothing = compare_ways({"healthz": client.ready}, 200)["healthz"]
        rows.append(("floor: readiness, ms, 1 client", statistics.median(nothing), "", ""))
        rows += [throughput(url, ask, engine, names, image, clients, seconds) for clients in (8, 32)]
    return rows


def throughput(
    url: str, ask: Callable[[], object], engine: mp.Engine, names: list[str], image: bytes, clients: int, seconds: float
) -> tuple[str, float, float, float]:
    """Images a second of the server and of the engine at the batch size that formed, in turns; their median ratio."""
    images_a_second(ask, clients, seconds / 2)  # until it has made what these batches run on
    speeds, own, sizes = [], [], []
    for _ in range(TURNS):
        before = batch_count(url)
        speeds.append(images_a_second(ask, clients, seconds))
        after = batch_count(url)
        sizes.append(max(1, round((after[1] - before[1]) / max(after[0] - before[0], 1))))
        time.sleep(0.3)
        call = partial(engine, [image] * sizes[-1], only=names)  # in this thread alone, as the engine asks
        own.append(1000 * sizes[-1] / statistics.median(compare_ways({"engine": call}, ENGINE_ROUNDS)["engine"]))
    what = f"images a second, {clients} clients, batches of {statistics.median_low(sizes)}"
    ratios = [speed / alone for speed, alone in zip(speeds, own, strict=True)]
    return what, statistics.median(speeds), statistics.median(own), statistics.median(ratios)


def wait_for(ready: Callable[[], bool], seconds: float = 120) -> None:
    """Ask until it is. Raises SystemExit where it never is."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if ready():
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"a server did not start within {seconds:g} s")


def measure_litserve(spec: str, store: Path, names: list[str], image: bytes, rounds: int, seconds: float) -> list[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = store / "litserve_app.py"
    script.write_text(LITSERVE)
    command = [sys.executable, str(script), spec, str(store), str(port), *names]
    rows: list[Any] = []
    with Server(command, f"http://127.0.0.1:{port}") as url:
        http = urllib3.PoolManager(maxsize=64, timeout=60, retries=False)

        def ask() -> object:
            answer = http.request("POST", f"{url}/predict", fields={"images": ("image", image)})
            assert answer.status == 200, answer.data
            return answer

        wait_for(lambda: http.request("GET", f"{url}/health").status == 200)
        middle = statistics.median(compare_ways({"http": ask}, rounds)["http"])
        rows.append(("LitServe: ms, 1 client", middle, "", ""))
        rows += [(f"LitServe: images a second, {n} clients", images_a_second(ask, n, seconds), "", "") for n in (8, 32)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spec = mobilenet() if (SHARED / "weights").is_dir() else "bundled:tiny"
    backbone = mp.load_backbone(spec)
    patches = {
        "flowers": untrained(backbone, mp.methods.ScaleBias(), 43, 0),
        "birds": untrained(backbone, mp.methods.Subset(), 43, 1),
        "signs": untrained(backbone, mp.methods.LinearProbe(), 43, 2),
    }
    image = photo()
    with tempfile.TemporaryDirectory() as folder:
        store = mp.Store(folder)
        for name, patch in patches.items():
            store.publish(name, patch)
        engine = mp.Engine(backbone, patches, tuning=measure(backbone))
        command = [sys.executable, "-m", "modelpatch", "serve", folder, "-b", spec, "--port", "0"]
        with Server(command) as url, torch.inference_mode():
            rows = measure_ours(url, engine, list(patches), image, options.rounds, options.seconds)
        if importlib.util.find_spec("litserve"):
            rows += measure_litserve(spec, Path(folder), list(patches), image, options.rounds, options.seconds)
    report("HTTP beside the engine", ("what", "server", "engine", "difference or ratio"), rows, options.json)


if __name__ == "__main__":
    main()
