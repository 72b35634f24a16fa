"""Every backend that is installed answers as the patched model; what it compiles is shared, checked, kept and freed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import draft_patch, make_timm, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.backends.base import BACKENDS, Backend, Compiled, choose_backend
from modelpatch.engine.compiled import ENOUGH, piece_sizes, prune
from modelpatch.engine.engine import Engine
from modelpatch.errors import EngineError
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch

CPU = torch.device("cpu")
COMPILING = [name for name in BACKENDS if BACKENDS[name].compiles]


def needs(name: str) -> str:
    """The name of a backend; the test is skipped where it cannot run, which is told."""
    if obstacle := BACKENDS[name]().obstacle(CPU):
        pytest.skip(f"{name}: {obstacle}")
    return name


@pytest.fixture(scope="module")
def networks() -> dict[str, Backbone]:
    vit = make_timm("vit_tiny_patch16_224", 32, img_size=32, embed_dim=32, depth=2, num_heads=2)
    return {"convolutions": make_tiny(), "transformer": vit}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of this file share: graphs are the same for every backend that reads them."""
    return tmp_path_factory.mktemp("compiled")


def patches_of(backbone: Backbone) -> dict[str, Patch]:
    convolves = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in backbone.module.modules())
    methods: dict[str, Method] = {"last": Subset(), "norms": ScaleBias(), "head": LinearProbe()}
    if not convolves:  # what the convolutions do not show; a graph takes a second a run
        methods = {"norms": methods["norms"], "low rank": LoRA(rank=2)}
    return {name: draft_patch(backbone, method, seed=place) for place, (name, method) in enumerate(methods.items())}


def images(backbone: Backbone, rows: int) -> Tensor:
    return torch.randn(rows, *backbone.input_size, generator=torch.Generator().manual_seed(rows))


def agrees(found: Tensor, expected: Tensor) -> bool:
    apart = (found - expected).abs().max() / expected.abs().max()
    return bool(apart <= 1e-4) and torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "network"),
    [  # Inductor calls a C++ compiler for seconds a run: one network, and one patch
        (name, network)
        for name in COMPILING
        for network in ("convolutions", "transformer")
        if (name, network) != ("inductor", "transformer")
    ],
)
def test_compiled_runs_answer_as_the_patched_model(
    name: str, network: str, networks: dict[str, Backbone], files: Path
) -> None:
    backbone = networks[network]
    patches = patches_of(backbone)
    if name == "inductor":
        patches = {"head": patches["head"]}
    engine = Engine(backbone, patches, backend=needs(name), cache=files)
    engine.compile(rows=2)
    assert engine.memory["compiled"] > 0
    assert f"{name}: " in str(engine.plan_for(2))
    assert "eager" not in str(engine.plan_for(2)), engine.plan_for(2)
    for rows in (2, 1, 5):  # compiled for two; the files are there for the others
        x = images(backbone, rows)
        engine(x)
        engine.settle()
        answers = engine(x)
        for task, patch in patches.items():
            with torch.inference_mode():
                assert agrees(answers[task], backbone.patched(patch).eval()(x)), (task, rows)
        assert agrees(answers["base"], backbone(x))
        lying = engine(x.contiguous(memory_format=torch.channels_last))
        assert agrees(lying["base"], answers["base"])
    one_each = engine(images(backbone, 4)[: len(patches)], tasks=[*patches])
    for row, patch in enumerate(patches.values()):
        with torch.inference_mode():
            expected = backbone.patched(patch).eval()(images(backbone, 4)[row : row + 1])
        assert agrees(one_each[row][None], expected)


class Recording(Backend):
    """A backend that runs the eager module, remembers what it was asked for, and adds `wrong` to every answer."""

    name = "recording"
    suffix = ".txt"
    version = "1"
    wrong = 0.0
    fails = ""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.loaded: list[tuple[tuple[int, ...], bool]] = []
        self.modules: dict[bytes, nn.Module] = MODULES
        self.released = threading.Event()
        self.released.set()

    def write(self, module: nn.Module, inputs: Sequence[Tensor], owner: str, threads: int) -> bytes:
        self.released.wait()
        if self.fails:
            raise RuntimeError(self.fails)
        self.written.append(owner)
        data = f"{len(MODULES)}".encode()
        self.modules[data] = module
        return data

    def load(self, path: Path, inputs: Sequence[Tensor], threads: int, fixed: bool) -> Compiled:
        self.loaded.append((tuple(inputs[0].shape), fixed))
        module = self.modules[path.read_bytes()]
        return lambda x: module(x) + self.wrong


MODULES: dict[bytes, nn.Module] = {}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """A backend that engines find under the name "recording"."""
    made = Recording()
    monkeypatch.setitem(BACKENDS._registered, "recording", lambda: made)
    return made


def recorded(backbone: Backbone, cache: Path, **arguments: object) -> Engine:
    patches = {"last": draft_patch(backbone, Subset()), "also": draft_patch(backbone, Subset(), seed=1)}
    return Engine(backbone, patches, backend="recording", cache=cache, **arguments)


def test_eager_modules_answer_until_a_run_has_computed_enough_rows(
    tiny: Backbone, backend: Recording, tmp_path: Path
) -> None:
    engine = recorded(tiny, tmp_path)
    few, many = images(tiny, 2), images(tiny, ENOUGH)
    engine(few)
    engine.settle()
    assert not backend.written
    assert "eager so far" in str(engine.plan)
    backend.released.clear()
    expected = Engine(tiny, tuning=Tuning())(many)["base"]
    assert agrees(engine(many)["base"], expected)  # while everything is still compiled
    backend.released.set()
    engine.settle()
    assert "eager" not in str(engine.plan_for(ENOUGH))
    assert agrees(engine(many)["base"], expected)


def test_shared_prefixes_are_compiled_once_and_tails_are_one_for_all_patches(
    tiny: Backbone, backend: Recording, tmp_path: Path
) -> None:
    engine = recorded(tiny, tmp_path)
    engine.compile()
    spans = sorted(backend.written)
    variants = [run for run in spans if run == "stage2.1"]
    assert len(variants) == 3  # the base's block and the two patches'; what pools after it has no weights
    assert spans == [*["heads"] * 3, *variants, "stem.0 ... stage2.0"]


def test_variants_all_over_a_network_are_one_run(tiny: Backbone, backend: Recording, tmp_path: Path) -> None:
    engine = Engine(tiny, {"norms": draft_patch(tiny, ScaleBias())}, backend="recording", cache=tmp_path)
    engine.compile(only=["norms"])
    assert backend.written == ["stem.0", "stem.1 ... stage2.1", "heads"]


def test_the_backbones_own_head_is_compiled_with_it_and_those_of_patches_are_not(
    tiny: Backbone, backend: Recording, tmp_path: Path
) -> None:
    engine = Engine(tiny, {"head": draft_patch(tiny), "other": draft_patch(tiny)}, backend="recording", cache=tmp_path)
    engine.compile(only=["base"])
    assert backend.written == ["stem.0 ... heads"]
    engine.compile(only=["head"])
    assert backend.written[1:] == ["stem.0 ... flatten", "heads"]
    engine.compile()  # the backbone's features are there
    assert backend.written[3:] == ["heads"]


def test_a_second_start_compiles_nothing(tiny: Backbone, backend: Recording, tmp_path: Path) -> None:
    recorded(tiny, tmp_path).compile()
    count = len(backend.written)
    again = recorded(tiny, tmp_path)
    again(images(tiny, 1))
    again.settle()
    assert len(backend.written) == count
    assert "eager" not in str(again.plan)


def test_files_of_other_weights_or_another_computation_are_others(backend: Recording, tmp_path: Path) -> None:
    for backbone in (make_tiny(), make_tiny(seed=1), other_epsilon()):
        before = len(backend.written)
        Engine(backbone, backend="recording", cache=tmp_path).compile()
        assert len(backend.written) == before + 1


def other_epsilon() -> Backbone:
    """A network with the tensors of another, and normalisation by another epsilon."""
    backbone = make_tiny()
    for module in backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    return Backbone(backbone.module, backbone.preprocessing, backbone.spec)


@pytest.mark.parametrize(("wrong", "fails"), [(0.1, ""), (float("nan"), ""), (0.0, "no such operator")])
def test_a_run_that_differs_or_fails_is_refused_with_a_reason(
    wrong: float, fails: str, tiny: Backbone, backend: Recording, tmp_path: Path
) -> None:
    backend.wrong, backend.fails = wrong, fails
    engine = recorded(tiny, tmp_path)
    engine.compile()
    assert (fails or "differs by") in str(engine.plan)
    assert engine.memory["compiled"] == 0
    x = images(tiny, 3)
    assert agrees(engine(x)["base"], tiny(x))


def test_a_damaged_file_is_made_anew(tiny: Backbone, backend: Recording, tmp_path: Path) -> None:
    recorded(tiny, tmp_path).compile()
    for file in tmp_path.glob("*.txt"):
        file.write_bytes(b"damaged")
    refused = recorded(tiny, tmp_path)
    refused.compile()
    assert "recording fails" in str(refused.plan)
    mended = recorded(tiny, tmp_path)
    mended.compile()
    assert "eager" not in str(mended.plan)


def test_compiled_runs_stay_within_the_budget_and_are_freed_with_their_patch(
    tiny: Backbone, backend: Recording, tmp_path: Path
) -> None:
    engine = recorded(tiny, tmp_path, budget=0)
    engine.compile()
    assert not backend.written
    assert "no room in the budget" in str(engine.plan)
    engine = recorded(tiny, tmp_path)
    engine.compile()
    before = engine.memory["compiled"]
    assert 0 < before <= engine.residency.budget
    engine.remove("also")
    assert 0 < engine.memory["compiled"] < before


@pytest.mark.parametrize("threads", [1, 2, 8, 16])
def test_pieces_make_up_the_rows_with_few_sizes(threads: int) -> None:
    sizes = {rows: piece_sizes(rows, threads) for rows in range(1, 100)}
    assert all(sum(pieces) == rows for rows, pieces in sizes.items())
    assert {size for pieces in sizes.values() for size in pieces} == {1, 4} | ({16} if threads >= 8 else set())


def test_a_backend_of_fixed_numbers_of_rows_answers_any_batch_in_pieces(
    tiny: Backbone, backend: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "fixed_rows", True)
    engine = Engine(tiny, backend="recording", cache=tmp_path, budget=10**9)
    for rows in (1, 2, 3, 5, 8):
        engine.compile(rows)
        assert agrees(engine(images(tiny, rows))["base"], tiny(images(tiny, rows)))
    assert len(backend.written) == 1
    assert len(backend.loaded) == len(
        {size for rows in (1, 2, 3, 5, 8) for size in piece_sizes(rows, torch.get_num_threads())}
    )
    assert all(fixed for _, fixed in backend.loaded)


def test_an_evicted_run_takes_no_place_before_it_has_paid_for_it(
    tiny: Backbone, backend: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpatch.engine.compiled.ENOUGH", 1)
    whole = recorded(tiny, tmp_path)
    whole.compile(only=["last", "also"])
    engine, room = recorded(tiny, tmp_path), whole.memory["compiled"] - 1
    monkeypatch.setattr(engine.compiled, "_room", lambda: room)

    def loads() -> int:
        before = len(backend.loaded)
        for name in ("last", "last", "also", "also") * 3:  # which have no room together
            engine(images(tiny, 1), only=[name])
            engine.settle()
        return len(backend.loaded) - before

    assert loads() > 0
    assert loads() == 0
    monkeypatch.setattr("modelpatch.engine.compiled.PAID", 1)
    assert loads() > 0


def test_auto_is_a_rule_and_names_are_checked(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", torch.device("meta")).name == "eager"
    assert choose_backend("auto", CPU, settled=True).name == "eager"
    monkeypatch.setattr("modelpatch.engine.backends.base.find_spec", lambda name: None)
    assert choose_backend("auto", CPU).name == "eager"
    with pytest.raises(EngineError, match=r"onnxruntime and onnx and onnxscript cannot be imported. Install: pip"):
        Engine(tiny, backend="onnxruntime")
    monkeypatch.setattr("modelpatch.engine.backends.base.find_spec", lambda name: name != "openvino" or None)
    assert choose_backend("auto", CPU).name == "onnxruntime"
    with pytest.raises(EngineError, match=r"there is no backend 'openvin'.* Known: eager, inductor"):
        Engine(tiny, backend="openvin")
    with pytest.raises(EngineError, match="runs on cpu"):
        choose_backend("openvino", torch.device("cuda"))
    with pytest.raises(EngineError, match="computes in float32"):
        Engine(tiny, backend="onnxruntime", tuning=Tuning(bfloat16=True))


def test_a_busy_neighbour_changes_neither_settings_nor_plans_nor_answers(
    networks: dict[str, Backbone], files: Path
) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            torch.randn(200, 200) @ torch.randn(200, 200)

    for backbone in networks.values():
        patches = patches_of(backbone)
        x = images(backbone, 3)
        rest = Engine(backbone, patches, cache=files)
        neighbours = [threading.Thread(target=work) for _ in range(4)]
        for one in neighbours:
            one.start()
        try:
            busy = Engine(backbone, patches, cache=files)
            answers = busy(x)
            busy.settle()  # what an earlier test compiled answers from now on
            settled, later = str(busy.plan_for(3)), busy(x)
        finally:
            stop.set()
            for one in neighbours:
                one.join()
            stop.clear()
        assert (busy.tuning, busy.compiled.backend.name) == (rest.tuning, rest.compiled.backend.name)
        for task, expected in rest(x).items():
            assert (answers[task] - expected).abs().max() <= 1e-6 * expected.abs().max()
        rest.settle()
        assert settled == str(rest.plan_for(3))
        for task, expected in rest(x).items():
            assert (later[task] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_cache_on_disk_loses_what_was_used_longest_ago(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "older")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    prune(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
