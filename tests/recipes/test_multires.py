"""One network at several resolutions: what is shared is one, what is private is each one's own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import color_task, make_timm, make_tiny, small_preprocessing
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.data.task import Task
from modelpatch.errors import (
    BackboneError,
    CheckpointMismatchError,
    DataError,
    MethodNotApplicableError,
    ModelpatchError,
    TrainingError,
)
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.contents import Patch
from modelpatch.recipes.multires import METHOD, Files, MultiResolution, ResolutionRun, fit_multires
from modelpatch.report.recipes import SharingRow
from modelpatch.train import callbacks, evaluate, fit
from modelpatch.train.batches import Minibatch
from modelpatch.train.evaluation import Mean
from modelpatch.train.fitting import PatchTrainer
from modelpatch.train.settings import FitSettings
from modelpatch.train.trainer import Callback, Trainer
from tolerance import close

pytestmark = pytest.mark.slow

SIZES = (16, 24)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_tiny()


@pytest.fixture(scope="module")
def named() -> Backbone:
    """A network that timm can build again, so that its trained copy can be a file."""
    return make_timm("test_resnet", 32)


@pytest.fixture(scope="module")
def private(backbone: Backbone) -> MultiResolution:
    return fit_multires(backbone, color_task(), SIZES, epochs=2, batch_size=8)


def is_norm(name: str) -> bool:
    return ".bn" in name or "stem.1." in name


def run_of(backbone: Backbone, data: Task, sharing: str, sizes: Sequence[int] = SIZES, **settings: Any) -> Any:
    chosen = FitSettings(augment="none", batch_size=8, **settings)
    return ResolutionRun(backbone, data, METHOD, chosen, sizes, sharing)


def equal(first: Patch, second: Patch) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items()
    )


# what is shared ---------------------------------------------------------------------------------------------


def test_patches_hold_normalisation_layers_of_their_own_and_one_head(private: MultiResolution) -> None:
    small, large = (private.patches[pixels].tensors for pixels in SIZES)
    assert small.keys() == large.keys()
    assert {name for name in small if not name.startswith("head.")} == {
        f"replace/{name}"
        for name, tensor in private.backbone.module.state_dict().items()
        if is_norm(name) and tensor.is_floating_point()
    }
    for name in small:
        assert torch.equal(small[name], large[name]) == name.startswith("head."), name


def test_a_patch_carries_its_resolution_and_scales_bilinearly(private: MultiResolution) -> None:
    kinds = {pixels: patch.preprocessing for pixels, patch in private.patches.items()}
    assert {pixels: (kind.image_size, kind.interpolation) for pixels, kind in kinds.items()} == {
        pixels: (pixels, "bilinear") for pixels in SIZES
    }


def test_the_patches_compute_what_was_trained(private: MultiResolution, backbone: Backbone, colors: Task) -> None:
    for patch in private.patches.values():
        assert evaluate(private.backbone, patch, colors).top1 == patch.metrics["test_top1"]
    images = torch.randn(3, 3, *[max(SIZES)] * 2)
    whole = private.backbone.patched(private.patches[max(SIZES)])
    assert close(private.backbone(images), whole(images))  # the new base is the model of the largest
    assert private.backbone.classes == colors.classes
    backbone.verify()


def test_shared_keeps_nothing_private(backbone: Backbone, colors: Task) -> None:
    result = fit_multires(backbone, colors, SIZES, sharing="shared", epochs=1, batch_size=8)
    small, large = result.patches.values()
    assert set(small.tensors) == {"head.weight", "head.bias"}
    assert equal(small, large)


def test_independent_models_are_those_of_fits_of_their_own(backbone: Backbone, colors: Task) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "seed": 3}
    result = fit_multires(backbone, colors, SIZES, sharing="independent", **settings)
    for pixels, patch in result.patches.items():
        assert equal(patch, fit(backbone, colors, METHOD, image_size=pixels, **settings))
    assert result.backbone is backbone


class Gradients(Callback):
    """The gradients of the first step."""

    def on_gradients(self, trainer: Trainer) -> None:
        self.kept = {id(parameter): parameter.grad.clone() for parameter in trainer.trained}


def test_shared_gradients_are_averaged_and_private_ones_are_not(backbone: Backbone, colors: Task) -> None:
    gradients = {}
    for sharing in ("private", "independent"):
        run = run_of(backbone, colors, sharing)
        model, gradient = run.build(), Gradients()
        next(run.make_trainer(model, [gradient]).steps())
        gradients[sharing] = [{name: gradient.kept[id(p)] for name, p in one.trainable()} for one in model.models]
    own, tied = gradients["independent"], gradients["private"]
    for name, grad in own[0].items():
        mean = (grad + own[1][name]) / 2
        for number in range(2):
            expected = own[number][name] if is_norm(name) else mean
            torch.testing.assert_close(tied[number][name], expected, msg=name)
    assert any(is_norm(name) for name in own[0])


def test_what_is_trained_is_counted_once(backbone: Backbone, colors: Task) -> None:
    weights = FullFinetune().count_parameters(backbone)
    head, scales = 3 * backbone.chain.feature_dim + 3, ScaleBias().count_parameters(backbone)
    counted = {
        sharing: fit_multires(backbone, colors, SIZES, sharing=sharing, epochs=1).parameters
        for sharing in ("private", "shared", "independent")
    }
    assert counted == {
        "private": weights + head + scales,
        "shared": weights + head,
        "independent": 2 * (weights + head),
    }


def test_a_private_scale_is_learned_for_every_resolution(backbone: Backbone) -> None:
    result = fit_multires(backbone, color_task(60), SIZES, epochs=15, batch_size=12)
    assert min(result.top1.values()) > 0.9


def test_early_stopping_judges_by_the_mean_of_all_resolutions(backbone: Backbone, colors: Task) -> None:
    run = run_of(backbone, colors, "private", epochs=1, validation=0.25)
    model = run.build()
    history = run.make_trainer(model).train()
    labels = torch.from_numpy(run.data.validation.labels)
    logits = [fit.logits(one, "validation") for fit, one in zip(run.fits.values(), model.models, strict=True)]
    own = [float((answers.argmax(1) == labels).double().mean()) for answers in logits]
    assert history[0]["validation_top1"] == pytest.approx(statistics.fmean(own))


def test_patches_are_stored_as_asked_and_measured_so(backbone: Backbone, colors: Task) -> None:
    result = fit_multires(backbone, colors, SIZES, epochs=1, dtype="float16")
    for patch in result.patches.values():
        assert {tensor.dtype for tensor in patch.tensors.values()} == {torch.float16}
        assert evaluate(result.backbone, patch, colors).top1 == patch.metrics["test_top1"]
        assert "float32_top1" in patch.metrics
    assert all(p.dtype == torch.float32 for p in result.backbone.module.parameters())


# files ------------------------------------------------------------------------------------------------------


def test_results_are_files_that_are_read_again(named: Backbone, colors: Task, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 12, "out": tmp_path}
    made = fit_multires(named, colors, (32, 48), **settings)
    files = Files(tmp_path, colors, "private", 0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "colors-private-seed0.safetensors",
        "colors-private-seed0-32px.safetensors",
        "colors-private-seed0-48px.safetensors",
    }
    opened = load_backbone(f"file:{files.backbone}")
    assert opened.fingerprint == made.backbone.fingerprint
    patch = Patch.load(files.patch(32))
    assert patch.backbone.spec == f"file:{files.backbone.name}"
    assert evaluate(opened, patch, colors).top1 == made.top1[32]
    again = fit_multires(named, colors, (32, 48), reuse=True, **settings)
    assert all(equal(patch, made.patches[pixels]) for pixels, patch in again.patches.items())
    assert (again.parameters, again.top1) == (made.parameters, made.top1)
    with pytest.raises(CheckpointMismatchError, match="is of a run with another"):
        fit_multires(named, colors, (32, 48), reuse=True, **{**settings, "epochs": 2})


def test_an_interrupted_run_goes_on_to_the_very_same_patches(
    named: Backbone, colors: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 12}
    straight = fit_multires(named, colors, (32, 48), **settings)
    with monkeypatch.context() as patched:
        patched.setattr(callbacks, "EVERY_SECONDS", 0)
        step = PatchTrainer.train_step

        def interrupted(self: PatchTrainer, batch: Minibatch) -> torch.Tensor:
            if self.step == 3:
                raise KeyboardInterrupt
            return step(self, batch)

        patched.setattr(PatchTrainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit_multires(named, colors, (32, 48), out=tmp_path, **settings)
    resumed = fit_multires(named, colors, (32, 48), out=tmp_path, **settings)
    assert all(equal(patch, straight.patches[pixels]) for pixels, patch in resumed.patches.items())
    assert resumed.backbone.fingerprint == straight.backbone.fingerprint


# comparisons ------------------------------------------------------------------------------------------------


def test_a_row_of_a_sharing_has_means_over_its_seeds(backbone: Backbone, colors: Task) -> None:
    runs = [fit_multires(backbone, colors, SIZES, seed=seed, epochs=1, batch_size=8) for seed in (0, 1)]
    row = SharingRow.of(runs)
    assert (row.sharing, row.parameters) == ("private", runs[0].parameters)
    assert tuple(row.top1) == SIZES
    for pixels, mean in row.top1.items():
        values = [run.top1[pixels] for run in runs]
        assert mean.value == pytest.approx(statistics.fmean(values))
        assert mean.error == pytest.approx(statistics.stdev(values) / 2**0.5)


def test_one_seed_has_no_error() -> None:
    assert Mean.of([0.5]) == Mean(0.5, None)


# what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolutions", "options", "problem"),
    [
        ((16,), {}, "the resolutions are 16; expected at least two"),
        ((16, 16), {}, "the resolutions are 16, 16; expected"),
        ((16, 24.0), {}, "the resolutions are 16, 24.0; expected"),
        (SIZES, {"image_size": 16}, "image_size=16 is given beside resolutions"),
        (SIZES, {"sharing": "some"}, "sharing is 'some'; expected one of: private, shared, independent"),
        (SIZES, {"method": ScaleBias()}, "does not train all weights"),
        (SIZES, {"epoch": 3}, "fit has no setting 'epoch'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    backbone: Backbone, colors: Task, resolutions: Any, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TrainingError, match=problem):
        fit_multires(backbone, colors, resolutions, **options)
    with pytest.raises(BackboneError, match="module:TinyNet cannot be written as a backbone file"):
        fit_multires(backbone, colors, SIZES, out=".")


def test_names_in_place_of_a_backbone_or_data_are_refused(backbone: Backbone, colors: Task) -> None:
    with pytest.raises(TrainingError, match="'bundled:tiny' is not a backbone"):
        fit_multires("bundled:tiny", colors)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'signs/' is not a task's data"):
        fit_multires(backbone, "signs/")  # type: ignore[arg-type]


def test_a_network_without_normalisation_has_nothing_private(colors: Task) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plain = load_backbone(module, preprocessing=small_preprocessing())
    with pytest.raises(MethodNotApplicableError, match="no normalisation layers to keep private"):
        fit_multires(plain, colors, SIZES, epochs=1)


def test_a_network_without_a_classifier_of_its_own_is_trained_too(colors: Task) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features = load_backbone(body, preprocessing=small_preprocessing())
    result = fit_multires(features, colors, SIZES, epochs=2, batch_size=8)
    assert not torch.equal(result.backbone.module.state_dict()["0.weight"], body.state_dict()["0.weight"])
    for patch in result.patches.values():
        assert evaluate(result.backbone, patch, colors).top1 == patch.metrics["test_top1"]
    assert result.backbone.classes == ()
    features.verify()


def test_a_resolution_that_the_network_refuses_is_named(colors: Task) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    fixed = load_backbone(module, preprocessing=small_preprocessing())
    with pytest.raises(ModelpatchError, match="takes no images of 24 x 24"):
        fit_multires(fixed, colors, SIZES)


def test_the_loss_is_the_mean_of_all_resolutions(backbone: Backbone, colors: Task) -> None:
    chosen = FitSettings(augment="none", batch_size=len(colors.train), epochs=1)
    run = ResolutionRun(backbone, colors, FullFinetune(statistics="frozen"), chosen, SIZES, "private")
    model, labels = run.build(), torch.from_numpy(colors.train.labels)
    with torch.no_grad():
        images = [fit.source.images("train").plain(torch.arange(24)) for fit in run.fits.values()]
        expected = statistics.fmean(float(F.cross_entropy(model(x), labels)) for x in images)
    assert run.make_trainer(model).train()[0]["loss"] == pytest.approx(expected, rel=1e-5)
