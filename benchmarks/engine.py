"""What the engine costs beside what a user would do otherwise: every side in one run, in paired rounds.

    sharing   8 tasks over the last stage, the last block, only the head: beside the floor (every distinct module timed by
              itself), 8 separate models, and PEFT's LoRA on the same layers
    mixed     a batch with one of 8 tasks a row: beside 8 separate models on their rows, and PEFT's adapter_names
    whole     8 scale-and-bias patches and 8 masks, which share nothing but weights: beside 8 separate models, and memory
    base      the base alone beside plain eager PyTorch
    swap      swapping, from a cold file to the first answer: beside PEFT's set_adapter and load_adapter
    many      memory and time with 10, 100 and 1,000 resident scale-and-bias patches
    blocks    added time of a second task by patched block (SubTuning, figures 7 and 18), with a picture
    runtimes, sessions, start    compiled backends beside ONNX Runtime and OpenVINO, see `benchmarks/runtimes.py`

    python benchmarks/engine.py --json benchmarks/results/engine.json

MobileNetV2 has its ImageNet weights, ResNet-50 random ones; patches are untrained, which changes no time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modelpatch as mp
import runtimes
from common import compare_ways, machine, mobilenet, ratio, report, timed, untrained
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine import BoundPatch, make_plan, measure
from modelpatch.engine.plan import RunStep

TASKS, CLASSES = 8, 43
Rows = list[tuple[Any, ...]]


def load(name: str) -> mp.Backbone:
    if name == "mobilenetv2_100":
        return mp.load_backbone(mobilenet())
    return mp.load_backbone(f"timm:{name}", pretrained=False)


def images(batch: int, pixels: int) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(batch))


def separate(models: list[nn.Module], x: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def way() -> None:
        for model in models:
            model(x)

    return way


# sharing ----------------------------------------------------------------------------------------------------


def sharing(rounds: int) -> Rows:
    rows: Rows = []
    for name in ("mobilenetv2_100", "resnet50"):
        backbone = load(name)
        tuning = measure(backbone)
        methods: dict[str, Any] = {
            "last stage": mp.methods.Subset(blocks=("stage-1",)),
            "last block": mp.methods.Subset(),
            "head": mp.methods.LinearProbe(),
        }
        for what, method in methods.items():
            patches = {f"task {n}": untrained(backbone, method, CLASSES, n) for n in range(TASKS)}
            engine = mp.Engine(backbone, patches, tuning=tuning, budget=10**12, eager=True)
            models: list[nn.Module] = [backbone.patched(patch) for patch in patches.values()]
            peft = peft_model(load(name), backbone, method)
            for batch in (1, 16):
                x = images(batch, 224)
                pairs: list[float] = []
                ways: dict[str, Callable[[], object]] = {
                    "engine": partial(engine, x, only=list(patches)),
                    "floor": partial(add_floor, pairs, engine, x, list(patches)),
                    "separate": separate(models, x),
                    "peft": partial(one_after_another, peft, x),
                }
                times = compare_ways(ways, rounds)
                times["floor"] = pairs[1:]
                middle = {key: statistics.median(values) for key, values in times.items()}
                ours = times["engine"]
                others = [(middle[side], ratio(times[side], ours)) for side in ("separate", "peft")]
                first = (f"{name}, {what}, batch {batch}", middle["engine"], middle["floor"])
                rows.append((*first, ratio(ours, times["floor"]), *others[0], *others[1]))
    return rows


def add_floor(pairs: list[float], engine: mp.Engine, x: Tensor, names: list[str]) -> None:
    pairs.append(floor(engine, x, names))


@torch.inference_mode()
def floor(engine: mp.Engine, x: Tensor, names: list[str]) -> float:
    """Milliseconds of all distinct (history, module) pairs, each module timed by itself."""
    merged = engine.plan_for(len(x), names)
    plan = make_plan(merged.members, merged.rows, lambda *_: False)
    streams = {stream: x for _, stream, _ in plan.roots}
    total = 0.0
    for step in plan.steps:
        if isinstance(step, RunStep):
            y = streams[step.inputs[0].stream]
            for link in step.links:
                module = engine._module(link)
                y, seconds = timed(partial(module, y))
                total += 1000 * seconds
            streams[step.outputs[0]] = y
    return total


def peft_model(fresh: mp.Backbone, backbone: mp.Backbone, method: mp.methods.Method) -> nn.Module:
    """PEFT's LoRA on the layers that the method trains, `TASKS` adapters and a head each."""
    from peft import LoraConfig, get_peft_model

    owned = {name.rpartition(".")[0] for name in method.blueprint(backbone).owned}
    layers = [n for n, m in fresh.module.named_modules() if n in owned and can_have_lora(m)]
    if not layers:
        layers = [str(fresh.classifier)]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=layers)
    model = get_peft_model(fresh.module, config, adapter_name="task0")
    for number in range(1, TASKS):
        model.add_adapter(f"task{number}", config)
    return model.eval()


def can_have_lora(module: nn.Module) -> bool:
    """PEFT takes grouped convolutions only for ranks that their groups divide."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


@torch.inference_mode()
def one_after_another(model: Any, x: Tensor) -> None:
    for number in range(TASKS):
        model.set_adapter(f"task{number}")
        model(x)


# mixed ------------------------------------------------------------------------------------------------------


def mixed(rounds: int) -> Rows:
    rows: Rows = []
    for name in ("mobilenetv2_100", "resnet50"):
        backbone = load(name)
        tuning = measure(backbone)
        x, tasks = images(2 * TASKS, 224), [f"task {n % TASKS}" for n in range(2 * TASKS)]
        for what, method in {"last block": mp.methods.Subset(), "head": mp.methods.LinearProbe()}.items():
            patches = {f"task {n}": untrained(backbone, method, CLASSES, n) for n in range(TASKS)}
            engine = mp.Engine(backbone, patches, tuning=tuning, budget=10**12, eager=True)
            models: list[nn.Module] = [backbone.patched(patch) for patch in patches.values()]
            peft = peft_model(load(name), backbone, method)
            adapters = [f"task{n % TASKS}" for n in range(2 * TASKS)]
            ways: dict[str, Callable[[], object]] = {
                "engine": partial(engine, x, tasks=tasks),
                "separate": partial(each_its_rows, models, x),
                "peft": torch.inference_mode()(partial(peft, x, adapter_names=adapters)),
            }
            times = compare_ways(ways, rounds)
            middle = {key: statistics.median(values) for key, values in times.items()}
            others = [(middle[side], ratio(times[side], times["engine"])) for side in ("separate", "peft")]
            rows.append((f"{name}, {what}", middle["engine"], *others[0], *others[1]))
    return rows


@torch.inference_mode()
def each_its_rows(models: list[nn.Module], x: Tensor) -> None:
    for number, model in enumerate(models):
        model(x[number::TASKS])


# whole ------------------------------------------------------------------------------------------------------


def whole(rounds: int) -> Rows:
    rows: Rows = []
    backbone = load("mobilenetv2_100")
    tuning = measure(backbone)
    for method in (mp.methods.ScaleBias(), mp.methods.Piggyback()):
        patches = {f"task {n}": untrained(backbone, method, CLASSES, n) for n in range(TASKS)}
        models: list[nn.Module] = [backbone.patched(patch) for patch in patches.values()]
        base_bytes = mp.Engine(backbone, tuning=Tuning()).memory["backbone"]
        for budget in (0, 2 * base_bytes):
            engine = mp.Engine(backbone, patches, tuning=tuning, budget=budget, eager=True)
            for batch in (1, 16):
                x = images(batch, 128)
                ways: dict[str, Callable[[], object]] = {
                    "engine": partial(engine, x, only=list(patches)),
                    "separate": separate(models, x),
                }
                times = compare_ways(ways, rounds)
                memory = engine.memory
                extra = memory["frozen"] + memory["patches"] + memory["variants"]
                middle = [statistics.median(times[side]) for side in ("engine", "separate")]
                name = f"{method.name}, budget {budget / base_bytes:.0f}x, batch {batch}"
                faster = ratio(times["separate"], times["engine"])
                rows.append((name, *middle, faster, extra / 1e6, base_bytes / 1e6))
    return rows


# base -------------------------------------------------------------------------------------------------------


def base(rounds: int) -> Rows:
    rows: Rows = []
    backbone = load("mobilenetv2_100")
    small = mp.load_backbone(mobilenet(), preprocessing=backbone.preprocessing.with_image_size(128))
    settings = {"float32": measure(small), "16 bits": measure(small, bfloat16=True)}
    for name, tuning in settings.items():
        if name == "16 bits" and not tuning.bfloat16:
            print("16 bits are not faster here, or this processor has none: left out")
            continue
        engine = mp.Engine(small, tuning=tuning)
        for batch in (1, 32):
            x = images(batch, 128)
            times = compare_ways({"engine": partial(engine, x), "eager": partial(small, x)}, rounds)
            answer, eager = engine(x)["base"], small(x)
            difference = float((answer - eager).abs().max())
            agree = float((answer.argmax(1) == eager.argmax(1)).float().mean())
            middle = [statistics.median(times[side]) for side in ("engine", "eager")]
            faster = ratio(times["eager"], times["engine"])
            rows.append((f"{name}, batch {batch}", *middle, faster, difference, agree))
    return rows


# swap -------------------------------------------------------------------------------------------------------


def swap(rounds: int) -> Rows:
    backbone = load("mobilenetv2_100")
    patches = [untrained(backbone, mp.methods.ScaleBias(), CLASSES, n) for n in range(2)]
    engine = mp.Engine(backbone, {"task": patches[0]}, tuning=Tuning())
    x = images(1, 128)
    engine(x)
    bound = [BoundPatch(backbone, patch) for patch in patches]
    plain = mp.Engine(backbone, {"task": bound[0]}, tuning=Tuning())
    plain(x, only=["task"])
    peft = peft_model(load("mobilenetv2_100"), backbone, mp.methods.FullFinetune())
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = patches[1].save(Path(folder) / "patch.safetensors")
        peft.save_pretrained(folder, selected_adapters=["task1"])  # type: ignore[operator]
        turns = iter(range(10**6))

        def cold() -> None:
            engine.add(name := f"cold {next(turns)}", file)
            engine(x, only=[name])
            engine.remove(name)

        def load_adapter() -> None:
            peft.load_adapter(f"{folder}/task1", name := f"cold{next(turns)}")  # type: ignore[operator]
            peft.set_adapter(name)  # type: ignore[operator]
            with torch.inference_mode():
                peft(x)
            peft.delete_adapter(name)  # type: ignore[operator]

        ways: dict[str, Callable[[], object]] = {
            "swap a resident patch": lambda: plain.swap("task", bound[next(turns) % 2]),
            "PEFT set_adapter": lambda: peft.set_adapter(f"task{next(turns) % TASKS}"),  # type: ignore[operator]
            "one forward pass of the patch": lambda: plain(x, only=["task"]),
            "cold file to first answer": cold,
            "PEFT load_adapter to first answer": load_adapter,
        }
        for name, values in compare_ways(ways, rounds * 3).items():
            rows.append((name, statistics.median(values)))
    return rows


# many -------------------------------------------------------------------------------------------------------


def many(rounds: int) -> Rows:
    backbone = load("mobilenetv2_100")
    engine = mp.Engine(backbone, tuning=Tuning(channels_last=True), budget=0)
    x, rows, start = images(1, 128), [], resident()
    patches = [untrained(backbone, mp.methods.ScaleBias(), CLASSES, n) for n in range(4)]
    for count in (10, 100, 1000):
        added = []
        for number in range(len(engine.tasks) - 1, count):
            noise = torch.Generator().manual_seed(number)
            patch = patches[number % 4]
            tensors = {n: t + 0.01 * torch.rand(t.shape, generator=noise) for n, t in patch.tensors.items()}
            _, seconds = timed(partial(engine.add, f"task {number}", replace(patch, tensors=tensors)))
            added.append(1000 * seconds)
        times = compare_ways({"one": partial(engine, x, only=["task 7"])}, rounds * 3)["one"]
        grown = (resident() - start) / 1e6
        rows.append((count, statistics.median(added), statistics.median(times), grown, engine.memory["patches"] / 1e6))
    return rows


def resident() -> int:
    """Bytes of this process that lie in memory, after freed heap was given back: it would hide what is taken next."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# blocks -----------------------------------------------------------------------------------------------------


def blocks(rounds: int, picture: Path | None) -> Rows:
    backbone = load("resnet50")
    tuning = measure(backbone)
    x = images(1, 224)
    alone = mp.Engine(backbone, tuning=tuning)
    rows: Rows = []
    for block in backbone.chain.blocks:
        patch = untrained(backbone, mp.methods.Subset(blocks=(block.name,)), CLASSES)
        engine = mp.Engine(backbone, {"task": patch}, tuning=tuning, budget=10**12, eager=True)
        times = compare_ways({"base": partial(alone, x), "both": partial(engine, x)}, rounds * 3)
        added = ratio(times["both"], times["base"]) - 1
        rows.append((block.name, statistics.median(times["base"]), statistics.median(times["both"]), 100 * added))
    if picture is not None:
        draw_blocks(rows, picture)
    return rows


def draw_blocks(rows: Rows, path: Path) -> None:
    from modelpatch.report.plots import figure

    with figure(path, 8, 4) as axes:
        axes.bar([row[0] for row in rows], [row[3] for row in rows], color="C0")
        axes.axhline(100, color="0.5", linestyle="--", linewidth=1)
        axes.text(0, 101, "a second network", color="0.4", fontsize=9)
        axes.set(
            ylabel="added time (%)", title="A second task in one pass, by the block it patches (ResNet-50, 224 px)"
        )
        axes.tick_params(axis="x", rotation=60)


PARTS: dict[str, tuple[Callable[..., Rows], str, tuple[str, ...]]] = {
    "sharing": (
        sharing,
        f"{TASKS} tasks in one pass, 224 px",
        (
            "tasks over",
            "engine ms",
            "floor ms",
            "engine / floor",
            "separate ms",
            "x faster",
            "PEFT ms",
            "x faster than PEFT",
        ),
    ),
    "mixed": (
        mixed,
        f"{2 * TASKS} images of 224 px, each for one of {TASKS} tasks",
        ("tasks over", "engine ms", "separate ms", "x faster", "PEFT adapter_names ms", "x faster than PEFT"),
    ),
    "whole": (
        whole,
        f"{TASKS} patches that share only weights, MobileNetV2 at 128 px",
        ("patches", "engine ms", "separate ms", "x faster", "MB beyond the base", "base MB"),
    ),
    "base": (
        base,
        "The base alone, MobileNetV2 at 128 px",
        ("arithmetic", "engine ms", "eager ms", "x faster", "largest difference", "same answer"),
    ),
    "swap": (swap, "Swapping and loading a scale-and-bias patch, MobileNetV2 at 128 px", ("what", "ms")),
    "many": (
        many,
        "Resident scale-and-bias patches, MobileNetV2 at 128 px, batch 1",
        ("patches", "add ms", "answer ms", "memory grown MB", "their numbers MB"),
    ),
    "blocks": (
        blocks,
        "A second task by the block it patches, ResNet-50 at 224 px",
        ("block", "base ms", "both ms", "added %"),
    ),
    **runtimes.PARTS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--networks", help="of the parts runtimes, sessions and start, comma-separated")
    parser.add_argument("--plot", type=Path, help="where to draw the blocks")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    for part in arguments.parts.split(","):
        work, title, columns = PARTS[part]
        own = [arguments.plot] if part == "blocks" else []
        if part in runtimes.PARTS and arguments.networks:
            own = [tuple(arguments.networks.split(","))]
        rows = work(arguments.rounds, *own)
        report(title, columns, rows, None)
        described = [dict(zip(columns, row, strict=True)) for row in rows]
        results[part] = {"title": title, "machine": machine(), "rows": described}
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
