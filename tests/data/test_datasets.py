"""Data sets of torch and `datasets`, streams and loaders as tasks: read, checked, trained on, resumed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from conftest import CLASSES, color_task, write_folder
from dense import box_task, square_task
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.preprocessing import Preprocessing, open_image
from modelpatch.data.augmentation import AUGMENTATIONS, choose_augmentation
from modelpatch.data.images import Images, ImageStore, SequentialImages, open_images
from modelpatch.data.samples import name_classes, to_image, to_label
from modelpatch.data.splits import Split
from modelpatch.data.task import Task, load_task
from modelpatch.errors import DataError, TrainingWarning
from modelpatch.methods.linear_probe import LinearProbe
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.train.evaluation import evaluate
from modelpatch.train.fitting import fit
from modelpatch.train.trainer import Callback

pytestmark = pytest.mark.slow

PLAIN = Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.8)
GENEROUS = 2**30


class Pairs(Dataset[Any]):
    """(PIL image, class index), with nothing else said."""

    def __init__(self, split: Split, transform: Callable[[Any], Any] | None = None) -> None:
        self.split, self.transform, self.reads = split, transform, 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        image = open_image(self.split.images[row])
        return image if self.transform is None else self.transform(image), int(self.split.labels[row])


class Dicts(Pairs):
    """The same as dicts with class names."""

    def __getitem__(self, row: int) -> Any:
        image, label = super().__getitem__(row)
        return {"img": np.asarray(image), "label": CLASSES[label]}


class Stream(IterableDataset[Any]):
    """The same in one order, without a length."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __iter__(self) -> Iterator[Any]:
        for image, label in zip(self.split.images, self.split.labels, strict=True):
            yield torch.from_numpy(np.asarray(image)).permute(2, 0, 1), int(label)


def tensors(split: Split) -> TensorDataset:
    images = torch.stack([torch.from_numpy(np.asarray(image)).permute(2, 0, 1) for image in split.images])
    return TensorDataset(images.float() / 255, torch.from_numpy(split.labels))


def hub(split: Split) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = [open_image(image) for image in split.images]
    return datasets.Dataset.from_dict({"image": images, "label": split.labels.tolist()}, features=features)


def odd_loader(split: Split) -> DataLoader[Any]:
    return DataLoader(
        tensors(split), batch_size=5, collate_fn=lambda rows: tuple(map(torch.stack, zip(*rows, strict=True)))
    )


MAPS: dict[str, Callable[[Split], Any]] = {
    "dataset": Pairs,
    "dicts": Dicts,
    "tensors": tensors,
    "subset": lambda split: Subset(Pairs(split), range(len(split))),
    "concatenated": lambda split: ConcatDataset(
        [Pairs(split.take(np.arange(5))), Pairs(split.take(np.arange(5, len(split))))]
    ),
    "loader": lambda split: DataLoader(Pairs(split), batch_size=4, shuffle=True),
    "list": lambda split: [(image, int(label)) for image, label in zip(split.images, split.labels, strict=True)],
    "hub": hub,
}
STREAMS: dict[str, Callable[[Split], Any]] = {
    "iterable": Stream,
    "loader of an iterable": lambda split: DataLoader(Stream(split), batch_size=4),
    "loader of its own collation": odd_loader,
    "streamed hub": lambda split: hub(split).to_iterable_dataset(num_shards=2),
}


def make_task(make: Callable[[Split], Any], **options: Any) -> Task:
    data = color_task()
    return Task.from_datasets(make(data.train), make(data.test), classes=CLASSES, name="colors", **options)


# reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAPS)
def test_a_data_set_is_the_images_and_labels_that_it_holds(kind: str) -> None:
    known, read = color_task(), make_task(MAPS[kind])
    assert (read.task.name, read.classes, len(read.train), len(read.test)) == ("colors", CLASSES, 24, 12)
    rows = torch.arange(24)
    expected = ImageStore(known.train, PLAIN, GENEROUS)
    assert torch.equal(ImageStore(read.train, PLAIN, GENEROUS).plain(rows), expected.plain(rows))
    assert torch.equal(Images(read.train, PLAIN).labels, expected.labels)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_the_images_and_labels_that_it_gives(kind: str) -> None:
    known, read = color_task(), make_task(STREAMS[kind], length=24)
    images = open_images(read.test, PLAIN, GENEROUS)
    assert isinstance(images, SequentialImages)
    batches = list(images.plain_batches(size=5))
    expected = ImageStore(known.test, PLAIN, GENEROUS)
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected.plain(torch.arange(12)))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), expected.labels)
    assert np.array_equal(read.test.labels, known.test.labels)


def test_an_image_folder_brings_its_classes_labels_and_transform(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "colors")
    folders = [ImageFolder(str(root / split), transform=v2.Grayscale(3)) for split in ("train", "test")]
    task = Task.from_datasets(*folders)
    assert (task.classes, task.task.name) == (tuple(sorted(CLASSES)), "colors")
    assert task.train.labels_known
    assert np.array_equal(task.train.labels, load_task(root).train.labels)
    pixels = np.asarray(open_image(task.train.images[0]))
    assert (pixels[..., 0] == pixels[..., 1]).all()


def test_class_indices_of_a_smaller_test_folder_mean_the_names_that_they_count(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "colors")
    first = sorted(CLASSES)[0]
    for file in (root / "test" / first).iterdir():
        file.unlink()
    (root / "test" / first).rmdir()
    task = Task.from_datasets(ImageFolder(str(root / "train")), ImageFolder(str(root / "test")))
    assert set(task.test.labels.tolist()) == {1, 2}


def test_labels_are_not_read_before_they_are_needed() -> None:
    data = Pairs(color_task(600).train)
    task = Task.from_datasets(data, Pairs(color_task().test), classes=3)
    assert data.reads < 60
    assert not task.train.labels_known
    assert np.array_equal(task.train.labels, data.split.labels)


def test_classes_that_are_not_named_are_found_and_told() -> None:
    with pytest.warns(TrainingWarning, match=r"Pairs names no classes; its labels make 3 of them: 0, 1, 2"):
        assert Task.from_datasets(Pairs(color_task().train), Pairs(color_task().test)).classes == ("0", "1", "2")
    with pytest.warns(TrainingWarning, match="Dicts names no classes"):
        assert Task.from_datasets(Dicts(color_task().train), Dicts(color_task().test)).classes == tuple(sorted(CLASSES))


def test_samples_that_are_listed_without_a_label_are_left_out_and_told() -> None:
    data = color_task()
    data.train.labels[[2, 5]] = -1
    with pytest.warns(
        TrainingWarning, match="2 samples have the label -1, which stands for no label, and are left out"
    ):
        task = Task.from_datasets(tensors(data.train), tensors(data.test), classes=CLASSES)
    assert task.passed_over == {"row without a label": ("train, row 2", "train, row 5")}
    assert task.train.labels.tolist() == [label for label in data.train.labels if label >= 0]


def test_minus_one_beside_one_class_or_of_another_meaning_is_refused() -> None:
    data = color_task()
    data.train.labels[:] = np.where(data.train.labels > 0, 1, -1)
    with pytest.raises(DataError, match=r"the label is -1; expected 0 to 2 .* Leave samples without a label out"):
        Task.from_datasets(tensors(data.train), classes=CLASSES)


def test_a_data_set_without_a_test_split_is_split_by_the_seed() -> None:
    one, other = (Task.from_datasets(Pairs(color_task().train), classes=CLASSES, seed=seed) for seed in (0, 1))
    assert len(one.train) + len(one.test) == 24
    assert one.test.digest != other.test.digest


def test_load_task_takes_data_sets_and_mappings_of_them() -> None:
    data = color_task()
    task = load_task({"train": hub(data.train), "val": hub(data.test), "test": hub(data.test)}, name="colors")
    assert (len(task.train), task.validation is not None, task.classes) == (24, True, CLASSES)
    assert len(load_task(tensors(data.train)).test) > 0


def test_a_digest_follows_images_labels_and_number() -> None:
    data = color_task()
    first = make_task(Pairs).train.digest
    assert first == make_task(Pairs).train.digest
    rows = np.arange(24)
    assert (
        first != Task.from_datasets(Pairs(data.train.take(rows[::-1])), Pairs(data.test), classes=CLASSES).train.digest
    )
    assert first != Task.from_datasets(Pairs(data.train.take(rows[1:])), Pairs(data.test), classes=CLASSES).train.digest
    assert make_task(Stream).train.digest == make_task(Stream).train.digest


# refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "unsupported data set 3 of type int; expected a torch Dataset"),
        (Pairs, "Pairs is a class; expected an instance"),
        ([1, 2], r"sample 0: it is a int; expected \(image, label\)"),
        ([{"a": 1}], "it has the keys a; expected"),
        (
            [("x" * 9, [0.1, 0.9])] * 2,
            "its label is a vector of 2 numbers. Say what it is: .*; for classes give an index",
        ),
        ([(torch.randn(3, 8, 8) * 3, 0)] * 2, "Leave Normalize out of the transform"),
        ([(torch.zeros(5, 8, 8), 0)] * 2, r"has the shape \(5, 8, 8\)"),
        ([(np.zeros((8, 8, 3), np.int32), 0)] * 2, "is of int32; expected uint8"),
        ([(np.zeros((8, 8, 3), np.uint8), 7)] * 2, "the label is 7; expected 0 to 2 for 3 classes"),
        ([(np.zeros((8, 8, 3), np.uint8), "pink")] * 2, "the label is 'pink'; expected one of: red"),
        ([(object(), 0)] * 2, "its image is a object"),
        ([], "holds no samples"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_expected(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task.from_datasets(given, given, classes=CLASSES)


def test_an_error_in_a_data_set_names_the_sample() -> None:
    class Broken(Pairs):
        def __getitem__(self, row: int) -> Any:
            if row == 17:
                raise RuntimeError("no such file")
            return super().__getitem__(row)

    task = Task.from_datasets(Broken(color_task().train), Pairs(color_task().test), classes=CLASSES)
    for workers in (0, 2):
        task.train.workers = workers
        with pytest.raises(DataError, match=r"^Broken, sample 17 cannot be read: RuntimeError\('no such file'\)"):
            list(Images(task.train, PLAIN).plain_batches(8))


def test_a_stream_has_no_rows() -> None:
    task = make_task(Stream, length=24)
    for wish in (lambda: task.with_validation(0.2, 0), lambda: task.train.images[0], lambda: task.subsample(5)):
        with pytest.raises(DataError, match="Stream is a stream, and this needs"):
            wish()


def test_the_old_call_makes_a_record_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="TaskRecord"):
        record: Any = Task(name="flowers", classes=("a", "b"))  # type: ignore[call-arg]
    assert (record.name, record.classes, record.kind) == ("flowers", ("a", "b"), "classification")


# views ------------------------------------------------------------------------------------------------------


def batches_of(images: Any, epoch: int, first: int = 0) -> list[torch.Tensor]:
    rows = list(torch.arange(24).split(5))
    return [batch.images for batch in images.batches(rows, AUGMENTATIONS["standard"], 3, epoch, first)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_rows_gives_the_batches_of_a_store(workers: int) -> None:
    data = color_task().train
    data.workers = workers
    stored, streamed = batches_of(ImageStore(data, PLAIN, GENEROUS), 1), batches_of(Images(data, PLAIN), 1)
    assert all(torch.equal(a, b) for a, b in zip(stored, streamed, strict=True))


@pytest.mark.parametrize("make", [Pairs, Stream])
def test_batches_follow_seed_epoch_and_step(make: Any) -> None:
    task = make_task(make, length=24, transform=v2.RandomHorizontalFlip())
    images = open_images(task.train, PLAIN, GENEROUS)
    whole = batches_of(images, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, batches_of(images, 1), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], batches_of(images, 1, first=2), strict=True))
    assert not torch.equal(whole[0], batches_of(images, 2)[0])


def test_a_stream_is_shuffled_where_it_is_trained_on_and_begins_anew_where_it_ends() -> None:
    task = make_task(Stream, length=30)
    rows = list(torch.arange(30).split(30))
    ordered, drawn, other = (
        next(
            open_images(task.train, PLAIN, GENEROUS, shuffle=shuffle).batches(rows, AUGMENTATIONS["none"], 0, epoch)
        ).images
        for shuffle, epoch in ((False, 0), (True, 0), (True, 1))
    )
    assert torch.equal(ordered[:6], ordered[24:])
    assert not torch.equal(ordered, drawn)
    assert not torch.equal(drawn, other)
    assert torch.equal(ordered.sum((1, 2, 3)).sort().values, drawn.sum((1, 2, 3)).sort().values)


def test_a_stream_without_test_images_is_told_to_bring_some() -> None:
    with pytest.raises(DataError, match=r"Stream is a stream, from which no test images can be cut\. Give some: test="):
        Task.from_datasets(Stream(color_task().train), classes=CLASSES)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(len(data)))])
def test_a_task_is_not_named_as_a_split(wrap: Callable[[Any], Any], image_folder: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    train = wrap(datasets.ImageFolder(str(image_folder / "train")))
    assert Task.from_datasets(train, train).task.name == image_folder.name
    assert load_task(train).task.name == load_task(image_folder / "train").task.name == image_folder.name


def test_a_stream_of_unknown_length_is_counted_when_that_is_asked_for() -> None:
    task = make_task(Stream)
    assert repr(task) == "Task('colors', 3 classes, ? train, ? test)"
    before = task.train.digest
    with pytest.warns(TrainingWarning, match="read once to count its images. Give length=N") as told:
        assert len(task.train) == 24
    assert told[0].filename == __file__  # the user's line, not one of the library
    assert make_task(Stream).train.digest == before


def test_random_transforms_of_a_data_set_are_drawn_anew_in_every_epoch() -> None:
    def noisy(image: Image.Image) -> torch.Tensor:
        return (v2.functional.to_image(image).float() / 255 * torch.rand(1)).clamp(0, 1)

    plain, random = make_task(Pairs).train, make_task(lambda split: Pairs(split, noisy)).train
    assert (plain.changes, random.changes) == (False, True)
    assert choose_augmentation("auto", plain).name == "light"
    assert choose_augmentation("auto", random).name == "none"
    images = open_images(random, PLAIN, GENEROUS)
    assert type(images) is Images
    first, second = (images.batch(torch.arange(4), AUGMENTATIONS["none"], (0, epoch, 0)).images for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(images.plain(torch.arange(4)), images.plain(torch.arange(4)))


@pytest.mark.parametrize("make", [square_task, box_task])
def test_a_transform_moves_masks_and_boxes_with_the_image(make: Callable[[int], Task]) -> None:
    """A flip of everything is the flip of the batch."""
    data = make(6)
    whole = PLAIN.model_copy(update={"crop_pct": 1.0})
    flipped = open_images(data.with_transform(v2.RandomHorizontalFlip(p=1.0)).train, whole, GENEROUS)
    plain = open_images(data.train, whole, GENEROUS)
    rows = torch.arange(6)
    (image, target), (own, known) = (next(one.batches([rows], AUGMENTATIONS["none"], 0, 0)) for one in (flipped, plain))
    assert torch.equal(image, own.flip(3))
    if isinstance(target, torch.Tensor):
        assert torch.equal(target, known.flip(2))
    else:
        for moved, one in zip(target, known, strict=True):
            boxes = one["boxes"].clone()
            boxes[:, [0, 2]] = 16 - boxes[:, [2, 0]]
            assert torch.allclose(moved["boxes"], boxes, atol=1e-4)
            assert torch.equal(moved["labels"], one["labels"])


def test_a_transform_that_fails_is_named() -> None:
    task = color_task().with_transform(lambda image: 1 / 0)
    with pytest.raises(DataError, match=r"the transform failed on an image of \(.*ZeroDivisionError"):
        open_images(task.train, PLAIN, GENEROUS).batch(torch.arange(2), AUGMENTATIONS["none"], (0, 0, 0))


# training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LinearProbe(), ScaleBias()], ids=["cached", "plain"])
@pytest.mark.parametrize("kind", MAPS)
def test_a_fit_on_a_data_set_is_the_fit_on_its_images(kind: str, method: Any, tiny: Backbone) -> None:
    known = fit(tiny, color_task(), method, epochs=2, batch_size=8)
    read = fit(tiny, make_task(MAPS[kind]), method, epochs=2, batch_size=8)
    assert all(torch.allclose(known.tensors[name], tensor, atol=1e-5) for name, tensor in read.tensors.items())
    assert read.metrics == known.metrics
    assert evaluate(tiny, read, make_task(MAPS[kind])).score == read.metrics["test_top1"]


@pytest.mark.parametrize("method", [LinearProbe(), ScaleBias(lr=0.01)], ids=["cached", "plain"])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_fit_on_a_stream_follows_its_seed_and_is_measured(kind: str, method: Any, tiny: Backbone) -> None:
    first, again = (
        fit(
            tiny,
            make_task(STREAMS[kind], length=24, validation=Pairs(color_task().test)),
            method,
            epochs=2,
            early_stopping=2,
        )
        for _ in range(2)
    )
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in again.tensors.items())
    assert first.metrics == again.metrics
    assert evaluate(tiny, first, color_task()).score == first.metrics["test_top1"]


def test_a_stream_is_learned(tiny: Backbone) -> None:
    data = color_task(96)
    task = Task.from_datasets(Stream(data.train), Pairs(data.test), classes=CLASSES, length=96)
    assert fit(tiny, task, LinearProbe(head_lr=0.1), epochs=10, batch_size=16).metrics["test_top1"] > 0.8


@pytest.mark.parametrize("method", [LinearProbe(), ScaleBias()], ids=["cached", "plain"])
def test_images_beyond_the_memory_are_streamed_to_the_same_patch(method: Any, tiny: Backbone) -> None:
    kept, streamed = (fit(tiny, color_task(), method, epochs=2, batch_size=8, memory=memory) for memory in (2**30, 1))
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in streamed.tensors.items())


@pytest.mark.parametrize("make", [Pairs, Stream])
def test_an_interrupted_fit_with_random_transforms_goes_on_to_the_same_patch(
    make: Any, tiny: Backbone, tmp_path: Path
) -> None:
    class Interruption(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.step == 4:
                raise KeyboardInterrupt

    def train(callbacks: list[Callback], **options: Any) -> Any:
        task = make_task(make, length=24, transform=v2.RandomAffine(20, (0.1, 0.1)))
        return fit(tiny, task, ScaleBias(lr=0.01), epochs=2, batch_size=8, callbacks=callbacks, **options)

    whole = train([])
    with pytest.raises(KeyboardInterrupt):
        train([Interruption()], checkpoint=tmp_path / "state")
    resumed = train([], checkpoint=tmp_path / "state")
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in resumed.tensors.items())


def test_dense_targets_come_from_data_sets(tiny: Backbone) -> None:
    pytest.importorskip("torchmetrics")
    data = square_task(8)

    class Masked(Dataset[Any]):
        def __init__(self, split: Split) -> None:
            self.split = split

        def __len__(self) -> int:
            return len(self.split)

        def __getitem__(self, row: int) -> Any:
            image, target = self.split[row]
            return image, torch.from_numpy(np.asarray(target.source))  # type: ignore[union-attr]

    task = Task.from_datasets(Masked(data.train), Masked(data.test), classes=data.classes)
    assert task.task.kind == "segmentation"
    known, read = (fit(tiny, one, LinearProbe(), epochs=1) for one in (data, task))
    assert all(torch.allclose(known.tensors[name], tensor, atol=1e-5) for name, tensor in read.tensors.items())


# formats ----------------------------------------------------------------------------------------------------

sizes = st.integers(1, 6)


@given(height=sizes, width=sizes, channels=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
def test_every_form_of_an_image_is_the_same_picture(height: int, width: int, channels: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    picture = open_image(Image.fromarray(pixels if channels > 1 else pixels[:, :, 0]))
    for form in (chw, chw.float() / 255, *([] if height in (1, 3, 4) else [pixels])):
        assert np.array_equal(np.asarray(open_image(to_image(form))), np.asarray(picture))


@given(st.one_of(st.integers(-5, 5), st.text(max_size=3), st.booleans()))
def test_every_form_of_a_label_is_the_same_label(value: Any) -> None:
    assert to_label(value) == value
    if not isinstance(value, str):
        assert to_label(np.int32(value)) == to_label(torch.tensor(int(value))) == int(value)


@given(st.lists(st.sampled_from(["1", "10", "2", "b", "a"]), min_size=1))
def test_names_are_ordered_as_numbers_first(labels: list[str]) -> None:
    order = ["1", "2", "10", "a", "b"]
    assert name_classes(labels) == tuple(name for name in order if name in labels)


def test_values_of_other_kinds_are_no_labels() -> None:
    for value in (0.5, None, [0, 1], torch.zeros(3)):
        with pytest.raises(DataError, match="expected a class index or class name"):
            to_label(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_label(2.0) == 2
