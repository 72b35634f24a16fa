"""Kinds of tasks: one class a kind says how heads are trained and measured, and the meaning of their answers.

A new kind is one file of this folder, or an entry point of the group `modelpatch.kinds` in another distribution. Nothing
outside its file asks for a kind by name; other parts of the library read its attributes.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.framing import Framing
from modelpatch.backbone.preprocessing import ImageSource, Preprocessing, open_image
from modelpatch.errors import DataError, MissingExtraError, TrainingError
from modelpatch.heads.base import Decoder
from modelpatch.heads.reading import HeadInput
from modelpatch.registry import Registry
from modelpatch.tasks.decoding import Decoding, make_decoder
from modelpatch.tasks.drawing import fit_into
from modelpatch.tasks.scores import Interval

Facts = dict[str, Any]
ElementLoss = Callable[..., Tensor]  # of outputs and targets (B, K), and hyperparameters, to losses (B, K)
EXTRA = "dense"  # installs the libraries of `Kind.libraries`


class Target(ABC):
    """The target of one image that is more than the index of a class.

    `moves` says that it belongs to places in the image: it is framed and augmented with its image, so that nothing is cached.
    """

    moves: ClassVar[bool] = True

    @abstractmethod
    def content(self) -> bytes:
        """Bytes that identify the target."""

    @abstractmethod
    def frame(self, image: Image.Image, preprocessing: Preprocessing) -> Any:
        """The target in pixels of the framed image, `resize_to` a side. `image` is upright and in its own size.

        Threads call it: whatever is computed is left to NumPy, as torch would give each of them OpenMP helpers.
        """

    @staticmethod
    @abstractmethod
    def batch(framed: Sequence[Any], preprocessing: Any, matrices: Tensor | None) -> Any:
        """Framed targets as a batch: of centre crops, or of the views that `Augmentation.matrices` (B, 2, 3) give."""


@dataclass(frozen=True)
class TargetFacts:
    """Facts of one image's target: the number of times that each class occurs in it, and what is wrong with it.

    `counts` is None for a kind whose classes are not counted. `numbers` are those of a kind whose targets are numbers, NaN
    where one is unknown.
    """

    counts: Mapping[int, int] | None = None
    problems: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()

    @property
    def empty(self) -> bool:
        """True for a target without fault in which no class occurs."""
        return self.counts == {} and not self.problems


class Result(ABC):
    """Measured figures of one patch on one split: a dataclass whose first field is the task's metric: more is better."""

    images: int
    per_class: Mapping[str, float]
    confusion: list[list[int]] | None = None
    interval: Interval | None = None  # of the score, 95 %

    @property
    def figures(self) -> dict[str, float]:
        """Figures that a patch keeps among its metrics: the numbers among the fields, the score first."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int | float)}

    @property
    def score(self) -> float:
        """The task's metric."""
        return next(iter(self.figures.values()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), **self.figures}  # type: ignore[call-overload]


class Meter(ABC):
    """Collects answers and targets batch by batch. `options` are those of the task, such as thresholds."""

    options: Mapping[str, Any] = {}

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes

    @abstractmethod
    def update(self, answers: Tensor, targets: Any) -> None:
        """Add a batch of a head's answers on the CPU and its targets."""

    @abstractmethod
    def result(self) -> Result:
        """Figures of everything added so far."""

    def interval(self) -> Interval | None:
        """The 95 % interval of the score of everything added so far; None for a kind that has none."""
        return None


class TensorMeter(Meter):
    """A meter that keeps answers (B, ...) and targets (B, ...) as they are."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def update(self, answers: Tensor, targets: Tensor) -> None:
        self._batches.append((answers, targets))

    @property
    def answers(self) -> Tensor:
        """Answers (N, ...)."""
        return torch.cat([answers for answers, _ in self._batches])

    @property
    def targets(self) -> Tensor:
        """Targets (N, ...)."""
        return torch.cat([targets for _, targets in self._batches])


@dataclass(frozen=True)
class View:
    """An image as a task sees it: classes (none for a backbone's own head), preprocessing, the image or its size, and the
    `options` of the task, such as thresholds."""

    classes: Sequence[str]
    preprocessing: Preprocessing
    source: ImageSource | None = None
    known_size: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def image(self) -> Image.Image:
        """The image, RGB. Raises `DataError` for a source that is no image."""
        assert self.source is not None, "the view has a size alone"
        return open_image(self.source)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.known_size or self.image.size

    @property
    def area(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the part that the network sees, in the image's own pixels."""
        return self.preprocessing.framed_area(*self.size)

    def name(self, index: int) -> str:
        """The name of a class."""
        return self.classes[index] if self.classes else str(index)


class Kind(ABC):
    """A kind of task. Instances have no state; `kind_of` returns the one of a name.

    `metrics` are the names of figures with their titles, the one that decides which of two patches is better first.
    `monitored` are figures of all answers and targets that are measured only where a run is told to choose its epoch by them.
    `in_percent` says that it is a share. `meter_type` is the class that measures them. `target` is the type of targets, None
    where they are class indices. `noun` and `nouns` are words for what `classes` names. `draws` says that answers are shown
    as pictures. `framing` is how images become squares where no setting says so, None as the backbone's own. `classifies`
    says that answers are logits (B, K) of classes that exclude each other, which cascades, selection, PAINT and distillation
    need. `decoders` are the heads that a setting may choose, the default first; without any, the method makes the head.
    `head_rate` is the largest learning rate at which the kind's heads learn. `libraries` are needed to measure an answer
    (extra `dense`). `counted` names the things that classes are counted in. `weighs_classes` and `smooths_labels` say which
    options its loss takes. `losses` are those that a setting may name, the default first; without any, the kind has one.
    `held_out` is the share of the training images by which a patch is finished after training, where there are no validation
    images. `exact` names tensors that files store as float32 always.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, str]]
    monitored: ClassVar[Mapping[str, Callable[[Tensor, Tensor], float]]] = {}
    meter_type: ClassVar[type[Meter]]
    per_class: ClassVar[str] = ""  # title of the figure that each class has
    fewest_classes: ClassVar[int] = 1
    target: ClassVar[type[Target] | None] = None
    draws: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
    framing: ClassVar[Framing | None] = None
    decoders: ClassVar[Mapping[str, Decoding]] = {}
    head_rate: ClassVar[float] = float("inf")
    libraries: ClassVar[Sequence[str]] = ()
    counted: ClassVar[str] = "images"
    weighs_classes: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True
    in_percent: ClassVar[bool] = True
    noun: ClassVar[str] = "class"
    nouns: ClassVar[str] = "classes"
    losses: ClassVar[Mapping[str, ElementLoss]] = {}
    held_out: ClassVar[float] = 0.0
    exact: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        """Raises TypeError for a kind that could not be measured once it is trained."""
        if not hasattr(self, "meter_type") or hasattr(self, "make_meter"):
            raise TypeError(
                f"{type(self).__name__} needs `meter_type`, the class of its Meter, in place of `make_meter`."
            )

    @property
    def metric(self) -> str:
        """The figure that decides which of two patches is better."""
        return next(iter(self.metrics))

    @property
    def dense(self) -> bool:
        """True where targets belong to places in the image: they move with each augmented view, so that nothing is cached."""
        return self.target is not None and self.target.moves

    # data ---------------------------------------------------------------------------------------------------

    def read_target(self, value: Any, classes: Sequence[str]) -> Target:
        """The target that a label of a data set stands for, for a kind whose targets are no class indices."""
        raise DataError(f"labels of {self.name} tasks are not read from data sets. Register a source of data for them.")

    def name_classes(self, values: Iterable[Any]) -> tuple[str, ...] | None:
        """The names of classes that all labels of a data set make; None where they must be given."""
        return None

    def list_strata(self, targets: Sequence[Any]) -> Sequence[int]:
        """A number for each target: images of one number are spread evenly over the splits that are cut from them."""
        return [0] * len(targets)

    def check_options(self, classes: Sequence[str], options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that a patch file cannot have for a task of this kind."""
        if options:
            raise ValueError(f"a {self.name} task has no options; the record has {', '.join(options)[:80]}")

    def examine(self, target: Any, size: tuple[int, int] | None = None) -> TargetFacts:
        """Facts of a target, beside its upright image of this width and height if that is known.

        Raises `DataError` for a target that cannot be read.
        """
        return TargetFacts({target: 1}) if isinstance(target, int) else TargetFacts()

    def caption(self, target: Any, classes: Sequence[str]) -> str:
        """A few words that say what the target is."""
        return classes[target] if isinstance(target, int) else ""

    def illustrate(self, image: Image.Image, target: Any, classes: Sequence[str], side: int) -> Image.Image:
        """The image (RGB), at most `side` pixels wide and high, with its target drawn over it where it belongs to places."""
        return fit_into(image, side)

    def join_options(self, records: Sequence[Any]) -> dict[str, Any]:
        """The options of one task that has the outputs of several `TaskRecord`s side by side."""
        return {}

    # training -----------------------------------------------------------------------------------------------

    def make_head(
        self, backbone: Backbone, classes: int, pixels: int, name: str | None = None, taps: Sequence[str] = ()
    ) -> Decoder | None:
        """A fresh decoder for images of `pixels` x `pixels`, or None where the method makes the head.

        `name` is one of `decoders`; `taps` name the segments whose outputs it reads. Raises `TrainingError` for the decoder of
        another kind, and for segments that give no maps.
        """
        if not self.decoders:
            if name is not None or taps:
                raise TrainingError(f"decoder={name!r} and taps are for dense tasks; this is a {self.name} task.")
            return None
        if name is not None and name not in self.decoders:
            raise TrainingError(
                f"decoder={name!r} is none for {self.name}. Expected one of: {', '.join(self.decoders)}."
            )
        return make_decoder(backbone, classes, pixels, self.decoders[name or next(iter(self.decoders))], taps)

    def prepare(self, targets: Any, classes: Sequence[str]) -> dict[str, Any]:
        """Options of the task from the batch of all training targets, before the first step.

        `targets` are None for a kind whose targets move. Raises `DataError` for targets that nothing could be learned from.
        """
        return {}

    def check_head(self, head: nn.Module, dtype: str, options: Mapping[str, Any]) -> None:
        """Raise `TrainingError` for a head that could not be finished, or a type that could not store it."""
        return

    def start_head(self, head: nn.Module) -> None:
        """Set the values that a head to be trained starts from, if not those as built."""
        return

    def make_loss(
        self,
        name: str,
        options: Mapping[str, Any],
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Callable[[Any, Any], Tensor]:
        """The loss of that name (`auto`: the kind's first) as a function of what `run_head` returned and of targets."""
        if name != "auto":
            raise TrainingError(f"loss={name!r} is none for {self.name}, which has one loss. Leave it out.")
        return partial(self.loss, class_weights=class_weights, label_smoothing=label_smoothing)

    def to_answers(self, outputs: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The answers of the finished patch for the outputs of a model that is trained."""
        return outputs

    def calibrate(
        self, classes: Sequence[str], options: Mapping[str, Any], held_out: Iterable[tuple[Tensor, Any]] | None
    ) -> dict[str, Any]:
        """Options of the finished patch, from answers to held-out images and their targets; None without such images."""
        return dict(options)

    def finish_head(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The tensors of a trained head, by their names in it, as the patch stores them."""
        return tensors

    def check_loss(self, class_weights: bool, label_smoothing: float) -> None:
        """Raise `TrainingError` for options that the loss of this kind does not take."""
        given = {"class_weights": class_weights, "label_smoothing": label_smoothing}
        taken = {"class_weights": self.weighs_classes, "label_smoothing": self.smooths_labels}
        for option, value in given.items():
            if value and not taken[option]:
                raise TrainingError(f"the loss of {self.name} tasks does not take {option}. Leave it out.")

    def count_classes(self, targets: Any, classes: int) -> Tensor:
        """The number of times (K,) that each class occurs in a batch of targets, for a kind that weighs classes."""
        raise TrainingError(f"classes of {self.name} tasks are not counted. Leave out class_weights.")

    def weigh_images(self, targets: Any, class_weights: Tensor | None = None) -> Tensor:
        """The weight (B,) of each image in the batch's mean loss."""
        return torch.ones(len(targets))

    def move(self, targets: Any, device: torch.device) -> Any:
        """The targets to learn from on a device."""
        return targets.to(device)

    def run_head(self, head: nn.Module, read: HeadInput, targets: Any) -> Any:
        """The training output of a head: its answers to what it reads, unless it computes a loss by itself."""
        return head(read)

    @abstractmethod
    def loss(
        self, output: Any, targets: Any, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """The mean loss of a batch from what `run_head` returned."""

    # metrics ------------------------------------------------------------------------------------------------

    def check_libraries(self) -> None:
        """Raise `MissingExtraError` where a library that measures this kind is not installed."""
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                raise MissingExtraError(library, EXTRA, f"Measuring {self.name}")

    def meter(self, classes: Sequence[str], options: Mapping[str, Any] | None = None) -> Meter:
        """A meter for answers about these classes. Raises `MissingExtraError`."""
        self.check_libraries()
        meter = self.meter_type(classes)
        meter.options = options or {}
        return meter

    def measure(
        self,
        classes: Sequence[str],
        batches: Iterable[tuple[Tensor, Any]],
        options: Mapping[str, Any] | None = None,
        with_interval: bool = False,
    ) -> Result:
        """Figures for batches of answers and targets; with the interval of the score where that is asked for."""
        meter = self.meter(classes, options)
        for answers, targets in batches:
            meter.update(answers, targets)
        result = meter.result()
        interval = meter.interval() if with_interval else None
        return result if interval is None else replace(result, interval=interval)  # type: ignore[type-var]

    def watch(
        self,
        classes: Sequence[str],
        batches: Iterable[tuple[Tensor, Any]],
        options: Mapping[str, Any] | None,
        name: str,
    ) -> dict[str, float]:
        """The figures of `metrics` for batches of answers and targets, and that of `monitored` of this name, if any."""
        meter = self.meter(classes, options)
        for answers, targets in batches:
            meter.update(answers, targets)
        figures = {name: value for name, value in meter.result().figures.items() if name in self.metrics}
        if name in self.monitored and isinstance(meter, TensorMeter):
            figures[name] = self.monitored[name](meter.answers, meter.targets)
        return figures

    def show_figure(self, name: str, value: float) -> str:
        """A figure of `metrics`, or of a class, as text without its name: a share in percent."""
        return f"{100 * value:.1f} %"

    # meaning ------------------------------------------------------------------------------------------------

    @abstractmethod
    def reduce(self, answers: Tensor, top: int = 5) -> list[Any]:
        """The content of each image's answer, small and on the CPU, of which `top` classes will be told."""

    @abstractmethod
    def describe(self, answer: Any, view: View, top: int = 5) -> list[Facts]:
        """Plain facts of one reduced answer, the most important first: each has a `label` and a value."""

    @abstractmethod
    def to_json(self, answer: Any, view: View, top: int = 5) -> Facts:
        """One reduced answer as the server's JSON."""

    def summarize(self, facts: Sequence[Facts]) -> list[str]:
        """Lines of text for what `describe` returned: a percentage and a label each."""
        values = [one["probability"] if "probability" in one else one["share"] for one in facts]
        return [f"{100 * value:5.1f} %  {one['label']}" for value, one in zip(values, facts, strict=True)]

    def draw(self, answer: Any, view: View) -> Image.Image:
        """A picture of one reduced answer over its image, where the kind `draws`."""
        raise DataError(f"answers of {self.name} tasks are not drawn.")


KINDS = Registry[Kind]("kind of task", "modelpatch.kinds", folder="modelpatch.tasks", error=DataError)
K = TypeVar("K", bound=type[Kind])


def register_kind(kind: K) -> K:
    """Register a kind under its name."""
    KINDS.register(kind.name)(kind())
    return kind


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises `DataError` with the known ones for another."""
    found: Any = KINDS.find(name)
    return found() if isinstance(found, type) else found  # an entry point may name the class


def balance(counts: Tensor) -> Tensor:
    """Weights (K,) that give every class the same sum, from the number of times it occurs."""
    return counts.sum() / (len(counts) * counts.clamp(min=1).float())
