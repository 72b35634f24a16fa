"""The cached prefix equals the prefix computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import color_task
from modelpatch.backbone.backbone import Backbone
from modelpatch.data.augmentation import AUGMENTATIONS
from modelpatch.data.images import ImageStore
from modelpatch.methods.full_finetune import FullFinetune
from modelpatch.methods.head2toe import Head2Toe
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.patch.model import PatchedModel
from modelpatch.train.fitting import Fit
from modelpatch.train.inputs import (
    FOLDING,
    CachedInputs,
    PlainInputs,
    Prefix,
    cache_prefix,
    cache_worthwhile,
    make_prefix,
    prefix_share,
    run_prefix,
)
from modelpatch.train.settings import FitSettings
from tolerance import close

GENEROUS = 2**30


@pytest.fixture
def store(tiny: Backbone) -> ImageStore:
    return ImageStore(color_task(70).train, tiny.preprocessing, GENEROUS)  # more than one batch of the cache


def model(backbone: Backbone) -> PatchedModel:
    return FullFinetune().draft(backbone, 3)


def batch(cached: CachedInputs, rows: torch.Tensor, epoch: int) -> torch.Tensor:
    return next(cached.batches([rows], epoch)).images


def prefix(backbone: Backbone) -> Prefix:
    return make_prefix(backbone, model(backbone), FOLDING - 1)


def test_many_images_go_through_folded_copies_that_agree_to_rounding(tiny: Backbone, store: ImageStore) -> None:
    images = store.plain(torch.arange(70))
    for end in (1, len(tiny.chain)):
        direct = prefix(tiny)(images, end)
        folded = make_prefix(tiny, model(tiny), FOLDING)(images, end)
        assert close(direct, run_prefix(model(tiny), images, end))
        assert (folded - direct).abs().max() <= 1e-5 * direct.abs().max()


def test_the_inner_segments_that_a_head_reads_are_in_the_prefix_of_many_images_too(
    tiny: Backbone, store: ImageStore
) -> None:
    reader, images = Head2Toe().draft(tiny, 3), store.plain(torch.arange(70))
    features = make_prefix(tiny, reader, FOLDING)(images, reader.first)
    assert torch.allclose(reader.run_from(features, reader.first), reader(images), atol=1e-5)


@pytest.mark.parametrize("memory", [GENEROUS, 1], ids=["memory", "disk"])
@pytest.mark.parametrize("start", [1, 3, -1])
def test_cached_outputs_are_the_prefix_of_every_image(
    tiny: Backbone, store: ImageStore, start: int, memory: int
) -> None:
    start = start % (len(tiny.chain) + 1)
    cached = cache_prefix(prefix(tiny), store, start, AUGMENTATIONS["none"], 1, 0, memory)
    rows = torch.tensor([69, 3, 3, 0])
    direct = run_prefix(model(tiny), store.plain(rows), start)
    assert cached.start == start
    assert torch.allclose(batch(cached, rows, 5), direct, atol=1e-6)


def test_epochs_take_turns_through_the_cached_views(tiny: Backbone, store: ImageStore) -> None:
    counts: list[int] = []
    cached = cache_prefix(prefix(tiny), store, 2, AUGMENTATIONS["light"], 3, 0, GENEROUS, counts.append)
    rows = torch.arange(8)
    views = [batch(cached, rows, epoch) for epoch in range(6)]
    for epoch in range(3):
        assert torch.equal(views[epoch], views[epoch + 3])
        assert not torch.equal(views[epoch], views[(epoch + 1) % 3])
    assert sum(counts) == 3 * len(store)


@pytest.mark.parametrize(("augment", "views"), [("none", 1), ("light", 4)])
def test_without_augmentation_one_view_is_enough(tiny: Backbone, augment: Any, views: int) -> None:
    run = Fit(tiny, color_task(6), LinearProbe(), FitSettings(augment=augment))
    for split, expected in (("train", views), ("test", 1)):
        inputs = run.batches(run.build(), split).inputs
        assert isinstance(inputs, CachedInputs)
        assert len(inputs.values) == expected


def test_without_a_cache_every_epoch_sees_new_views(store: ImageStore) -> None:
    plain = PlainInputs(store, AUGMENTATIONS["light"], seed=0)
    first, again, other = (next(plain.batches([torch.arange(8)], epoch)).images for epoch in (1, 1, 2))
    assert plain.start == 0
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_of_cached_outputs_come_with_their_labels(tiny: Backbone, store: ImageStore) -> None:
    cached = cache_prefix(prefix(tiny), store, 2, AUGMENTATIONS["none"], 1, 0, GENEROUS)
    rows = list(torch.arange(70).flip(0).split(32))
    for number, (inputs, labels) in enumerate(cached.batches(rows, 0, first=1), 1):
        assert torch.equal(inputs, batch(cached, rows[number], 0))
        assert torch.equal(labels, store.labels[rows[number]])


def test_the_share_of_the_prefix_grows_from_nothing_to_all(tiny: Backbone) -> None:
    shares = [prefix_share(tiny, start) for start in range(len(tiny.chain) + 1)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert not cache_worthwhile(tiny, 0)
    assert cache_worthwhile(tiny, len(tiny.chain))
