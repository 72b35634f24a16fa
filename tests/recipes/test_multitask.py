"""Several tasks train shared weights and keep private patches; what comes of it is an ordinary backbone with patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import color_task, make_tiny
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.tuning import Tuning
from modelpatch.data.images import ImageStore
from modelpatch.data.task import Task
from modelpatch.engine.engine import Engine
from modelpatch.errors import BackboneError, DataError, DivergedError, MethodError, TrainingError, WrongBackboneError
from modelpatch.methods.delta import DeltaNetwork
from modelpatch.methods.depthwise import Depthwise
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.lora import LoRA
from modelpatch.methods.method import Method
from modelpatch.methods.packnet import PackNet
from modelpatch.methods.paint import Paint
from modelpatch.methods.piggyback import Piggyback
from modelpatch.methods.pruned import Pruned
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.methods.widened import Widened
from modelpatch.patch.contents import Patch
from modelpatch.patch.model import PatchedModel
from modelpatch.recipes.multitask import Multitask, batch_sizes, fit_multitask, shares
from modelpatch.store.store import Store
from modelpatch.tasks.record import TaskRecord
from modelpatch.train import callbacks, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.callbacks import Checkpoint
from modelpatch.train.evaluation import logits_of
from modelpatch.train.fitting import Fit, PatchTrainer

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 6, "augment": "none"}
PRIVATE: tuple[Method, ...] = (
    LinearProbe(),
    Head2Toe(),
    ScaleBias(),
    ScaleBias(statistics="learned"),
    ScaleBias(statistics="recomputed"),
    ScaleBias(head="random"),
    ScaleBias(layers="channel"),
    Depthwise(),
    ScaleBias() + Depthwise(),
    Subset(),
    Subset(statistics="learned"),
    LoRA(),
    Widened(),
    DeltaNetwork(),
    Piggyback(lr=2e-3),
    Piggyback(lr=2e-3, norms="trained"),
)


def named(name: str, count: int = 24, seed: int = 0) -> Task:
    data = color_task(count, seed=seed)
    return replace(data, task=TaskRecord(name=name, classes=data.classes))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


@pytest.fixture
def tasks() -> list[Task]:
    return [named("first"), named("second", 12, seed=1)]


def small_timm() -> Backbone:
    return load_backbone("timm:resnet10t", pretrained=False, num_classes=7)


def assert_equal(first: Multitask, second: Multitask, tolerance: float = 0.0) -> None:
    assert first.patches.keys() == second.patches.keys()
    for name, patch in first.patches.items():
        for key, tensor in patch.tensors.items():
            other = second.patches[name].tensors[key]
            assert torch.allclose(tensor.float(), other.float(), rtol=tolerance, atol=tolerance), (name, key)
    state = second.backbone.module.state_dict()
    for key, tensor in first.backbone.module.state_dict().items():
        assert torch.allclose(tensor, state[key], rtol=tolerance, atol=tolerance), key


# what is trained --------------------------------------------------------------------------------------------


def test_one_task_with_a_private_head_is_full_fine_tuning(backbone: Backbone) -> None:
    sgd: dict[str, Any] = {"optimizer": "sgd", "head_lr": 0.1, "weight_decay": 0.01}
    tuning = FullFinetune(lr=0.02, **sgd)
    alone = fit_multitask(backbone, [named("first")], LinearProbe(**sgd), shared=tuning, **SETTINGS)
    patch = fit(backbone, named("first"), tuning, **SETTINGS)
    state = {f"replace/{name}": tensor for name, tensor in alone.backbone.module.state_dict().items()}
    for name, tensor in patch.tensors.items():
        assert torch.allclose(tensor, {**state, **alone.patches["first"].tensors}[name], atol=1e-6), name
    assert patch.metrics["test_top1"] == alone.top1


def test_shared_weights_take_the_weighted_sum_of_all_gradients(backbone: Backbone, tasks: list[Task]) -> None:
    lr = 0.05
    shared = FullFinetune(optimizer="sgd", lr=lr, weight_decay=0)
    own = {"batch_size": 24, "augment": "none", "epochs": 1, "schedule": "constant", "warmup": 0}
    result = fit_multitask(backbone, tasks, LinearProbe(), shared=shared, weights={"second": 3}, **own)
    copy = make_tiny()
    weights = [weight.requires_grad_() for segment in copy.chain for weight in segment.module.parameters()]
    total = torch.zeros(())
    for data, share in zip(tasks, (1 / 4, 3 / 4), strict=True):
        torch.manual_seed(0)
        head = LinearProbe().draft(copy, 3).head
        images = ImageStore(data.train, copy.preprocessing, 2**30).plain(torch.arange(len(data.train)))
        total = total + share * F.cross_entropy(head(copy.chain(images)), torch.from_numpy(data.train.labels))
    total.backward()
    after = dict(result.backbone.module.named_parameters())
    for (name, before), weight in zip(dict(backbone.module.named_parameters()).items(), weights, strict=False):
        expected = before - 1.9 * lr * weight.grad  # Nesterov's first step: lr (g + 0.9 g)
        assert torch.allclose(after[name], expected, atol=1e-6), name
        assert not torch.equal(after[name], before), name


def test_private_tensors_and_statistics_are_every_tasks_own(backbone: Backbone, tasks: list[Task]) -> None:
    result = fit_multitask(backbone, tasks, ScaleBias(statistics="learned"), **SETTINGS)
    first, second = (patch.tensors for patch in result.patches.values())
    for name, tensor in first.items():
        assert not torch.equal(tensor, second[name]), name
    before = backbone.module.state_dict()
    for name, tensor in result.backbone.module.state_dict().items():
        private = f"replace/{name}" in first
        frozen = private or name.startswith("fc.") or "num_batches_tracked" in name
        assert torch.equal(tensor, before[name]) == frozen, name
    assert any("running_mean" in name for name in first)


def test_statistics_that_no_patch_owns_stay_the_bases(backbone: Backbone, tasks: list[Task]) -> None:
    result = fit_multitask(backbone, tasks, LinearProbe(), **SETTINGS)
    before = dict(backbone.module.named_buffers())
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.backbone.module.named_buffers())


def test_the_shared_method_says_which_weights_move(backbone: Backbone, tasks: list[Task]) -> None:
    result = fit_multitask(backbone, tasks, LinearProbe(), shared=Subset("stage2.1"), **SETTINGS)
    before = backbone.module.state_dict()
    moved = {
        name for name, tensor in result.backbone.module.state_dict().items() if not torch.equal(tensor, before[name])
    }
    block = {name for name, _ in backbone.module.named_parameters() if name.startswith("stage2.1.")}
    assert moved == block
    assert result.shared_parameters == sum(before[name].numel() for name in block)


@pytest.mark.parametrize("private", PRIVATE, ids=lambda method: f"{method.name}-{method.hyperparameters()}"[:48])
def test_patches_of_every_method_compute_what_was_trained(
    backbone: Backbone, tasks: list[Task], private: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_patches(backbone, tasks, private, monkeypatch, **SETTINGS)


def test_patches_with_pruned_blocks_compute_what_was_trained(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_patches(small_timm(), tasks, Pruned(), monkeypatch, epochs=1, image_size=32)


def check_patches(
    backbone: Backbone, tasks: list[Task], private: Method, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> None:
    trained: dict[str, Tensor] = {}
    make = Fit.make_patch

    def watch(self: Fit, model: PatchedModel, *rest: Any) -> Patch:
        trained[self.data.task.name] = self.logits(model, "test")
        return make(self, model, *rest)

    monkeypatch.setattr(Fit, "make_patch", watch)
    result = fit_multitask(backbone, tasks, private, **settings)
    for data in tasks:
        patch = result.patches[data.task.name]
        answers = logits_of(result.backbone.patched(patch), data.test, patch.preprocessing)
        assert torch.allclose(answers, trained[data.task.name], atol=1e-4)
    before = backbone.module.state_dict()
    weights = [name for name in before if name.endswith("conv2.weight")]
    assert any(not torch.equal(result.backbone.module.state_dict()[name], before[name]) for name in weights)


def test_tasks_are_learned_together(backbone: Backbone, tasks: list[Task]) -> None:
    result = fit_multitask(backbone, tasks, ScaleBias(lr=0.01), epochs=15, batch_size=8)
    assert result.top1 > 0.9


# what comes of it -------------------------------------------------------------------------------------------


def test_the_result_is_a_backbone_file_with_patches_that_engine_and_store_take(
    tmp_path: Path, tasks: list[Task]
) -> None:
    base = small_timm()
    result = fit_multitask(
        base, tasks, ScaleBias(), out=tmp_path / "out", epochs=1, image_size=32, log=tmp_path / "log"
    )
    base.verify()
    loaded = load_backbone(f"file:{tmp_path}/out/backbone.safetensors")
    assert loaded.fingerprint == result.backbone.fingerprint != base.fingerprint
    assert loaded.spec == result.backbone.spec == result.patches["first"].backbone.spec
    assert loaded.about["multitask"]["base_fingerprint"] == base.fingerprint
    files = {name: tmp_path / "out" / f"{name}.safetensors" for name in ("first", "second")}
    engine = Engine(loaded, files, tuning=Tuning())
    images = torch.rand(2, 3, 32, 32)
    for name, path in files.items():
        patch = Patch.load(path)
        assert torch.allclose(engine(images, only=[name])[name], loaded.patched(patch)(images), atol=1e-5)
        with pytest.raises(WrongBackboneError):
            base.patched(patch)
        Store(tmp_path / "store").publish(name, patch)
        assert (tmp_path / "log" / name / "metrics.csv").exists()


def test_figures_are_those_of_the_stored_numbers(backbone: Backbone, tasks: list[Task]) -> None:
    result = fit_multitask(backbone, tasks, ScaleBias(), dtype="float16", **SETTINGS)
    figures = result.as_dict()
    for data in tasks:
        patch = result.patches[data.task.name]
        assert {tensor.dtype for tensor in patch.tensors.values()} == {torch.float16}
        answers = logits_of(result.backbone.patched(patch), data.test, patch.preprocessing).argmax(1)
        right = float((answers == torch.from_numpy(data.test.labels)).double().mean())
        assert figures["tasks"][data.task.name]["test_top1"] == right
        assert figures["tasks"][data.task.name]["private_numbers"] == ScaleBias().count_parameters(backbone)
        assert figures["tasks"][data.task.name]["head_numbers"] == 3 * (backbone.chain.feature_dim + 1)


def test_what_every_task_has_for_itself_is_counted_once_a_task(backbone: Backbone, tasks: list[Task]) -> None:
    heads = 2 * 3 * (backbone.chain.feature_dim + 1)
    norms = ScaleBias().count_parameters(backbone)
    probe, private, learned = (
        fit_multitask(backbone, tasks, method, **SETTINGS)
        for method in (LinearProbe(), ScaleBias(), ScaleBias(statistics="learned"))
    )
    body = probe.backbone_parameters + norms  # as many running means and variances as scales and biases
    assert probe.numbers == body + heads
    assert private.numbers == body + heads + norms
    assert learned.numbers == body + heads + 2 * norms


def test_a_later_fit_of_one_task_does_not_take_the_file_for_its_own(tmp_path: Path, tasks: list[Task]) -> None:
    base = small_timm()
    fit_multitask(base, tasks, LinearProbe(), out=tmp_path, epochs=1, image_size=32)
    with pytest.raises(TrainingError, match="is of a run with another"):
        fit(base, tasks[0], LinearProbe(), out=tmp_path / "first.safetensors", reuse=True, epochs=1, image_size=32)


# rounds, rates and seeds ------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """(task, images, learning rate) of every step."""
    steps: list[tuple[str, int, float]] = []
    original, trainers = PatchTrainer.train_step, []  # type: ignore[var-annotated]

    def record(self: PatchTrainer, batch: Minibatch) -> Tensor:
        if self not in trainers:
            trainers.append(self)
        name = ("first", "second")[trainers.index(self)]
        steps.append((name, len(batch), self.optimizer.param_groups[0]["lr"]))
        return original(self, batch)

    monkeypatch.setattr(PatchTrainer, "train_step", record)
    return steps


@pytest.mark.parametrize(("sampling", "sizes"), [("equal", (6, 6)), ("proportional", (8, 4))])
def test_a_round_has_a_batch_of_every_task_and_one_learning_rate(
    backbone: Backbone, tasks: list[Task], seen: list[tuple[str, int, float]], sampling: Any, sizes: tuple[int, int]
) -> None:
    result = fit_multitask(backbone, tasks, LinearProbe(), sampling=sampling, **{**SETTINGS, "epochs": 3})
    rounds = [seen[at : at + 2] for at in range(0, len(seen), 2)]
    epochs = {name: patch.created["multitask"]["epochs"] for name, patch in result.patches.items()}
    images = dict.fromkeys(epochs, 0)
    for (first, count, rate), (second, other, same) in rounds:
        assert (first, second, rate) == ("first", "second", same)
        assert (count, other) == sizes
        images[first] += count
        images[second] += other
    rates = [rate for (_, _, rate), _ in rounds]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 2 * rates[-1]
    assert sum(images.values()) == 3 * 36  # as many as three passes over the 24 and 12
    assert epochs == {"first": images["first"] / 24, "second": images["second"] / 12}
    assert (epochs["first"] == epochs["second"]) == (sampling == "proportional")


def test_batches_share_out_by_images_and_shares_add_up_to_one(tasks: list[Task]) -> None:
    tasks = [*tasks, named("third", 12)]
    assert batch_sizes(tasks, 16, "equal") == [16] * 3
    assert batch_sizes(tasks, 16, "proportional") == [24, 12, 12]
    assert batch_sizes([named("a", 240), named("b", 3)], 16, "proportional")[1] == 2
    assert shares(["a", "b"], {}, [24, 8]) == {"a": 0.75, "b": 0.25}
    assert shares(["a", "b"], {"b": 4}, [1, 1]) == {"a": 0.2, "b": 0.8}


def test_the_same_seed_gives_the_same_result(backbone: Backbone, tasks: list[Task]) -> None:
    first, again, other = (
        fit_multitask(backbone, tasks, ScaleBias(), epochs=1, batch_size=8, seed=seed) for seed in (1, 1, 2)
    )
    assert_equal(first, again)
    with pytest.raises(AssertionError):
        assert_equal(first, other)


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize(
    "private", [ScaleBias(statistics="learned"), ScaleBias(statistics="recomputed"), Piggyback(lr=2e-3)]
)
def test_an_interrupted_run_goes_on_exactly(
    backbone: Backbone, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, private: Any
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 6}
    monkeypatch.setattr(callbacks, "EVERY_SECONDS", 0)
    save, saves = Checkpoint.save, []

    def stop(self: Checkpoint, state: dict[str, Any]) -> None:
        save(self, state)
        saves.append(state["done"])
        if state["done"] == after:
            raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", stop)
        with pytest.raises(InterruptedError):
            fit_multitask(backbone, tasks, private, checkpoint=tmp_path / "run", **settings)
    assert saves == list(range(1, after + 1))
    resumed = fit_multitask(backbone, tasks, private, checkpoint=tmp_path / "run", **settings)
    assert_equal(resumed, fit_multitask(backbone, tasks, private, **settings))
    assert not (tmp_path / "run").exists()


def test_the_state_of_another_run_is_refused(
    backbone: Backbone, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(Fit, "make_patch", full)
        with pytest.raises(InterruptedError):
            fit_multitask(backbone, tasks, LinearProbe(), checkpoint=tmp_path, **SETTINGS)
    other: list[tuple[str, dict[str, Any]]] = [
        ("sampling = 'equal' instead of 'proportional'", {"sampling": "proportional"}),
        ("lr = 0.0003 instead of 0.001", {"shared": FullFinetune(lr=1e-3)}),
        ("first = None instead of 2|other first", {"weights": {"first": 2}}),
    ]
    for words, changed in other:
        with pytest.raises(TrainingError, match=words):
            fit_multitask(backbone, tasks, LinearProbe(), checkpoint=tmp_path, **SETTINGS, **changed)
    with pytest.raises(TrainingError, match="unfinished run with other"):
        fit_multitask(backbone, [tasks[0], named("second", 15)], LinearProbe(), checkpoint=tmp_path, **SETTINGS)


# what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("private", "words"),
    [
        (FullFinetune(), "makes everything private that full-finetune would share"),
        (Paint(), "makes everything private"),
        (PackNet(), "packnet holds weights at the base's values, which move here"),
        (Subset(head="siamese"), "a siamese head reads the base's own features, which move here"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_methods_that_cannot_follow_are_refused(
    backbone: Backbone, tasks: list[Task], private: Method, words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        fit_multitask(backbone, tasks, private, **SETTINGS)


@pytest.mark.parametrize(
    "shared",
    [LoRA(), Piggyback(), FullFinetune(statistics="learned"), Subset(reinitialize=True), LinearProbe(), Paint()],
    ids=lambda method: method.name,
)
def test_only_plain_weights_are_shared(backbone: Backbone, tasks: list[Task], shared: Method) -> None:
    with pytest.raises(MethodError, match="Name as shared bitfit, depthwise, full-finetune, scale-bias, subset"):
        fit_multitask(backbone, tasks, LinearProbe(), shared=shared, **SETTINGS)


Call = Callable[[Backbone, list[Task]], Any]
WRONG: dict[str, tuple[Call, type[Exception], str]] = {
    "no backbone": (lambda b, t: fit_multitask("bundled:tiny", t), TrainingError, "is not a backbone"),  # type: ignore[arg-type]
    "one task": (lambda b, t: fit_multitask(b, t[0]), DataError, r"Expected a list: \[mp.load_task"),  # type: ignore[arg-type]
    "no task": (lambda b, t: fit_multitask(b, []), DataError, "Expected a list"),
    "twice": (lambda b, t: fit_multitask(b, [t[0], t[0]]), DataError, "two tasks are called 'first'"),
    "method": (lambda b, t: fit_multitask(b, t, ScaleBias), MethodError, "is not a method"),  # type: ignore[arg-type]
    "sampling": (
        lambda b, t: fit_multitask(b, t, sampling="all"),
        TrainingError,
        "'all'; expected one of: equal, prop",
    ),  # type: ignore[arg-type]
    "weight of": (lambda b, t: fit_multitask(b, t, weights={"third": 1}), TrainingError, "no task 'third' to weigh"),
    "weight": (lambda b, t: fit_multitask(b, t, weights={"first": 0}), TrainingError, "expected a number above 0"),
    "cache": (lambda b, t: fit_multitask(b, t, cache=True), TrainingError, "no setting 'cache': what lies before"),
    "stopping": (lambda b, t: fit_multitask(b, t, early_stopping=2), TrainingError, "all tasks end together"),
    "decay": (lambda b, t: fit_multitask(b, t, layer_decay=0.9), TrainingError, "share have the method.s rate"),
    "swa": (lambda b, t: fit_multitask(b, t, swa=1), TrainingError, "average of a patch"),
    "float16": (lambda b, t: fit_multitask(b, t, precision="float16"), TrainingError, "Use precision='bfloat16'"),
    "epochs": (lambda b, t: fit_multitask(b, t, epochs=0), TrainingError, "epochs = 0 is not valid"),
    "out": (lambda b, t: fit_multitask(b, t, out="there"), BackboneError, "names an architecture of timm"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(
    backbone: Backbone, tasks: list[Task], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, kind, words = WRONG[name]
    monkeypatch.setattr(PatchTrainer, "begin", lambda *_: pytest.fail("it began"))
    with pytest.raises(kind, match=words):
        call(backbone, tasks)


def test_a_task_may_not_take_the_name_of_the_backbones_file(tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"called backbone\.safetensors"):
        fit_multitask(small_timm(), [named("backbone"), tasks[0]], out=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(backbone: Backbone, tasks: list[Task]) -> None:
    with pytest.raises(DivergedError):
        fit_multitask(backbone, tasks, ScaleBias(), shared=FullFinetune(lr=1e30), **SETTINGS)
