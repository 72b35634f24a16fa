"""The engine's compiled backends beside ONNX Runtime and OpenVINO on whole networks; parts of `benchmarks/engine.py`.

    runtimes  the base alone: the engine, one ONNX Runtime session and one OpenVINO model of the whole network
    sessions  8 tasks over the last stage, the last block, only the head: the engine, its floor (every compiled run timed by
              itself), and 8 sessions or models of whole networks
    start     from `Engine(...)` to the first answer and to full speed, with an empty cache and with a warm one

One session of ONNX Runtime has its defaults (its threads spin; those of eight do not), and OpenVINO a model for each number
of rows, both in float32 on as many threads as PyTorch. Sides run in blocks, one after another in every round; the first run of
a block does not count.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modelpatch as mp
from common import ratio, timed, untrained
from modelpatch.backbone.graphs import write_graph

NETWORKS = ("mobilenetv2_100", "efficientnet_lite0", "resnet50", "vit_small_patch16_224")
BATCHES = (1, 16)
TASKS, CLASSES = 8, 43
FILES = Path(tempfile.gettempdir()) / "modelpatch-benchmark-runtimes"  # graphs, which take minutes to write
Rows = list[tuple[Any, ...]]
Ways = Mapping[str, Callable[[], object]]


def load(name: str) -> mp.Backbone:
    torch.manual_seed(0)
    return mp.load_backbone(f"timm:{name}", pretrained=False)


def images(backbone: mp.Backbone, rows: int) -> Tensor:
    return torch.randn(rows, *backbone.input_size, generator=torch.Generator().manual_seed(rows))


def graph(module: nn.Module, backbone: mp.Backbone, name: str) -> Path:
    """The ONNX file of a whole network, written once."""
    key = hashlib.sha256(f"{name} {backbone.fingerprint} {torch.__version__}".encode()).hexdigest()[:16]
    path = FILES / f"{key}.onnx"
    if not path.exists():
        FILES.mkdir(exist_ok=True)
        path.write_bytes(write_graph(module.eval(), {"x": images(backbone, 2)}, ["y"], {}, "onnx", name))
    return path


def session(path: Path, spins: bool = True) -> Callable[[Tensor], object]:
    """A session of ONNX Runtime; where several are used in turn, threads that spin would take the cores from one another."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not spins:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: made.run(None, {"x": x.numpy()})


def openvino_model(path: Path, x: Tensor) -> Callable[[Tensor], object]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)


def in_blocks(ways: Ways, rounds: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds of every way: the median of a block of `runs`, after one that does not count, in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            block = [timed(way)[1] for _ in range(runs + 1)][1:]
            times[name].append(1000 * statistics.median(block))
    return times


def each(models: list[Callable[[Tensor], object]], x: Tensor) -> None:
    for model in models:
        model(x)


def runtimes(rounds: int, networks: tuple[str, ...] = NETWORKS) -> Rows:
    rows: Rows = []
    for name in networks:
        backbone = load(name)
        engine = mp.Engine(backbone, budget=10**12)
        path = graph(backbone.module, backbone, name)
        onnx = session(path)
        for batch in BATCHES:
            x = images(backbone, batch)
            engine.compile(rows=batch)
            ways: Ways = {
                "engine": partial(engine, x),
                "onnx": partial(onnx, x),
                "openvino": partial(openvino_model(path, x), x),
                "eager": partial(backbone, x),
            }
            times = in_blocks(ways, rounds, 8 if batch == 1 else 2)
            middle = [statistics.median(times[side]) for side in ways]
            faster = [min(pair) for pair in zip(times["onnx"], times["openvino"], strict=True)]
            backend = engine.compiled.backend.name
            rows.append((f"{name}, batch {batch}", backend, *middle, ratio(faster, times["engine"])))
    return rows


def sessions(rounds: int, networks: tuple[str, ...] = NETWORKS) -> Rows:
    rows: Rows = []
    methods: dict[str, Any] = {
        "last stage": mp.methods.Subset(blocks=("stage-1",)),
        "last block": mp.methods.Subset(),
        "head": mp.methods.LinearProbe(),
    }
    for name in networks:
        backbone = load(name)
        for what, method in methods.items():
            patches = {f"task {n}": untrained(backbone, method, CLASSES, n) for n in range(TASKS)}
            engine = mp.Engine(backbone, patches, budget=10**12)
            path = graph(backbone.patched(patches["task 0"]), backbone, f"{name} {what}")
            onnx = [session(path, spins=False) for _ in range(TASKS)]
            for batch in BATCHES:
                x = images(backbone, batch)
                engine.compile(rows=batch, only=list(patches))
                found: list[float] = []
                models = [openvino_model(path, x) for _ in range(TASKS)]
                ways: Ways = {
                    "engine": partial(engine, x, only=list(patches)),
                    "floor": partial(floor, engine, x, list(patches), found),
                    "onnx": partial(each, onnx, x),
                    "openvino": partial(each, models, x),
                }
                runs = 3 if batch == 1 else 1
                times = in_blocks(ways, rounds, runs)
                times["floor"] = [
                    1000 * statistics.median(found[n * (runs + 1) + 1 : (n + 1) * (runs + 1)]) for n in range(rounds)
                ]
                middle = {side: statistics.median(values) for side, values in times.items()}
                ours = times["engine"]
                others = [(middle[side], ratio(times[side], ours)) for side in ("onnx", "openvino")]
                first = (f"{name}, {what}, batch {batch}", middle["engine"], middle["floor"])
                rows.append((*first, ratio(ours, times["floor"]), *others[0], *others[1]))
    return rows


@torch.inference_mode()
def floor(engine: mp.Engine, x: Tensor, names: list[str], found: list[float]) -> None:
    """Append the seconds of a plan's steps, each by itself: nothing is checked, looked up or put together around them."""
    _, timings = engine.explain(x, names)
    found.append(sum(timing.seconds for timing in timings))


def start(rounds: int, networks: tuple[str, ...] = NETWORKS[:1]) -> Rows:
    rows: Rows = []
    for name in networks:
        for batch in BATCHES:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("empty", "warm"):
                    figures = [_start(name, batch, folder) for _ in range(1 if state == "empty" else rounds)]
                    middle = map(statistics.median, zip(*figures, strict=True))
                    rows.append((f"{name}, batch {batch}, {state} cache", *middle))
    return rows


def _start(name: str, batch: int, folder: str) -> tuple[float, float, float, float, float]:
    """Milliseconds of loading, an eager pass, an engine's first answer, until it is compiled, and of an answer then."""
    backbone, loading = timed(partial(load, name))
    x = images(backbone, batch)
    _, eager = timed(partial(backbone, x))
    begin = time.perf_counter()
    engine = mp.Engine(backbone, cache=folder)
    engine(x)
    first = time.perf_counter() - begin
    engine.settle()
    engine.compile(rows=batch)
    whole = time.perf_counter() - begin
    answers = [timed(partial(engine, x))[1] for _ in range(5)]
    return (*(1000 * seconds for seconds in (loading, eager, first, whole, statistics.median(answers))),)  # type: ignore[return-value]


PARTS: dict[str, tuple[Callable[..., Rows], str, tuple[str, ...]]] = {
    "runtimes": (
        runtimes,
        "The base alone beside whole networks in other runtimes, 224 px",
        (
            "network",
            "backend",
            "engine ms",
            "ONNX Runtime ms",
            "OpenVINO ms",
            "eager ms",
            "faster runtime / engine",
        ),
    ),
    "sessions": (
        sessions,
        f"{TASKS} tasks in one pass beside {TASKS} sessions, 224 px",
        (
            "tasks over",
            "engine ms",
            "floor ms",
            "engine / floor",
            "ONNX Runtime ms",
            "x faster",
            "OpenVINO ms",
            "x faster than OpenVINO",
        ),
    ),
    "start": (
        start,
        "From Engine(...) to full speed",
        ("start", "load ms", "eager pass ms", "first answer ms", "compiled after ms", "answer then ms"),
    ),
}
