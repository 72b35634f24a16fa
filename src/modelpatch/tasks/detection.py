"""Detection: the objects of an image, each with a box, a class and a probability.

    answers   boxes (B, N, 6): left, top, right, bottom in the network's pixels, score, class; rows of score 0 are none
    targets   of each image "boxes" (N, 4), "labels" (N,) and "difficult" (N,)
    loss      the detector's own: classes and places of proposals or of default boxes
    metrics   mean average precision, over IoU 0.5, 0.55, ..., 0.95 as COCO's, and at 0.5 (pycocotools, extra `dense`)

An answer is told as the boxes of at least 50 %, in the image's own pixels, and shown as frames with names.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.heads.reading import HeadInput
from modelpatch.tasks.decoding import Decoding, coarsest, fine
from modelpatch.tasks.drawing import Corners, draw_frames, fit_into, named_colors, palette
from modelpatch.tasks.kind import Facts, Kind, Meter, Result, Target, TargetFacts, View, register_kind
from modelpatch.tasks.scores import Interval, bootstrap_interval

SURE = 0.5  # the probability from which a box is told and drawn
SMALLEST = 1.0  # pixels a side that a box must have to be a target
DRAWS, MOST_DRAWN = 200, 100_000  # of the bootstrap: draws, and classes times images up to which it is made
FEW = 6  # boxes whose classes are written beside them in a small picture
EDGE = 2.0  # pixels by which a box may reach out of its image before that is told
SHOWN = 0.3  # the share of a box that a random view must show for the box to be a target
Objects = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Boxes(Target):
    """The objects of an image: `corners` (N, 4) float64, left, top, right, bottom in the image's own pixels.

    `labels` (N,) int64 are their classes. Objects that are `difficult` (N,) are not trained on, and finding them is not
    counted as wrong.
    """

    corners: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray

    def content(self) -> bytes:
        return self.corners.tobytes() + self.labels.tobytes() + self.difficult.tobytes()

    def frame(self, image: Image.Image, preprocessing: Preprocessing) -> Objects:
        left, top, width, height = preprocessing.framed_area(image.width, image.height)
        size = np.array([width, height] * 2) / preprocessing.image_size
        corners = (self.corners - np.array([left, top] * 2)) / size + preprocessing.edge
        labels, difficult = torch.from_numpy(self.labels), torch.from_numpy(self.difficult)
        boxes = torch.from_numpy(corners.astype(np.float32))
        return {"boxes": boxes, "labels": labels, "difficult": difficult}

    @staticmethod
    def batch(framed: Sequence[Objects], preprocessing: Preprocessing, matrices: Tensor | None) -> list[Objects]:
        """Objects of each image, boxes in pixels of the view."""
        whole, size = preprocessing.resize_to, preprocessing.image_size
        if matrices is None:
            return [_cut(one, one["boxes"] - preprocessing.edge, size) for one in framed]
        found = []
        for one, matrix in zip(framed, matrices, strict=True):
            places = 2 * one["boxes"].view(-1, 2, 2) / whole - 1  # corners in [-1, 1]
            places = (places - matrix[:, 2]) / matrix.diagonal()  # the matrix maps places of the view to the image
            corners = torch.cat([places.min(1).values, places.max(1).values], 1)
            found.append(_cut(one, (corners + 1) / 2 * size, size))
        return found


def _cut(framed: Objects, corners: Tensor, size: int) -> Objects:
    """Boxes cut at the edges of the view, without those of which too little is left."""
    cut = corners.clamp(0, size)
    sides, whole = cut[:, 2:] - cut[:, :2], corners[:, 2:] - corners[:, :2]
    kept = (sides >= SMALLEST).all(1) & (sides.prod(1) >= SHOWN * whole.prod(1))
    return {"boxes": cut[kept], "labels": framed["labels"][kept], "difficult": framed["difficult"][kept]}


@dataclass(frozen=True)
class DetectionResult(Result):
    """Mean average precisions in [0, 1] over classes that some image has: COCO's (`map`, `per_class`), and at IoU 0.5."""

    map: float
    map50: float
    images: int
    per_class: dict[str, float]
    interval: Interval | None = None


class BoxMeter(Meter):
    """Collects boxes (B, N, 6) and targets in the network's square, in which they overlap as much as in the image."""

    def __init__(self, classes: Sequence[str]) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        super().__init__(classes)
        self.images = 0
        self._precision = MeanAveragePrecision(class_metrics=True)
        self._precision.warn_on_many_detections = False
        self._pairs: list[tuple[Objects, Objects]] = []

    def update(self, answers: Tensor, targets: list[Objects]) -> None:
        from modelpatch.heads.detector import unpack

        wanted = [{**one, "iscrowd": one["difficult"].long()} for one in targets]
        found = [unpack(answer) for answer in answers]
        self._precision.update(found, wanted)
        self._pairs += zip(found, wanted, strict=True)
        self.images += len(answers)

    def interval(self) -> Interval | None:
        """The bootstrap's, over images; None for more than 100,000 classes times images, which would take minutes."""
        if self.images * len(self.classes) > MOST_DRAWN:
            return None
        measure = draw_precision(self._pairs, len(self.classes))
        return None if measure is None else bootstrap_interval(self.images, measure, DRAWS)

    def result(self) -> DetectionResult:
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            found = self._precision.compute()
        classes, own = found["classes"].reshape(-1).tolist(), found["map_per_class"].reshape(-1).tolist()
        return DetectionResult(
            map=max(float(found["map"]), 0.0),
            map50=max(float(found["map_50"]), 0.0),
            images=self.images,
            per_class={self.classes[index]: value for index, value in zip(classes, own, strict=True) if value >= 0},
        )


def draw_precision(pairs: Sequence[tuple[Objects, Objects]], classes: int) -> Callable[[np.ndarray], float] | None:
    """The mean average precision of images that are drawn so often (N,), from found and wanted objects; None without any.

    Boxes are matched once; an image that is drawn twice counts as two.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sides: list[COCO] = []
    for side in (1, 0):
        made = COCO()
        entries = [entry for number, pair in enumerate(pairs) for entry in _annotate(pair[side], number)]
        made.dataset = {
            "images": [{"id": number} for number in range(len(pairs))],
            "categories": [{"id": label} for label in range(classes)],
            "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, 1)],
        }
        sides.append(made)
    if not sides[0].dataset["annotations"]:
        return None
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        for made in sides:
            made.createIndex()
        judge = COCOeval(*sides, iouType="bbox")
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], judge.params.areaRngLbl[:1]
        judge.params.maxDets = judge.params.maxDets[-1:]
        judge.evaluate()
    matched = np.array(judge.evalImgs, dtype=object).reshape(classes, len(pairs))

    def measure(times: np.ndarray) -> float:
        judge.evalImgs = matched[:, np.repeat(np.arange(len(pairs)), times)].ravel().tolist()
        with redirect_stdout(io.StringIO()):
            judge.accumulate()
        precision = judge.eval["precision"]
        return float(precision[precision > -1].mean()) if (precision > -1).any() else 0.0

    return measure


def _annotate(objects: Objects, image: int) -> Iterator[Facts]:
    """The objects of an image as annotations of COCO."""
    boxes, labels = objects["boxes"].double().tolist(), objects["labels"].tolist()
    crowds = objects["iscrowd"].tolist() if "iscrowd" in objects else [0] * len(labels)
    scores = objects["scores"].tolist() if "scores" in objects else [1.0] * len(labels)
    for (left, top, right, bottom), label, crowd, score in zip(boxes, labels, crowds, scores, strict=True):
        box = [left, top, right - left, bottom - top]
        facts = {"image_id": image, "category_id": label, "iscrowd": crowd, "score": score}
        yield {**facts, "bbox": box, "area": box[2] * box[3]}


@dataclass(frozen=True)
class FoundBox:
    """An object: its class, its probability, and left, top, right, bottom in the image's own pixels."""

    index: int
    probability: float
    corners: Corners


@register_kind
class Detection(Kind):
    """Boxes with classes; answers are (B, N, 6)."""

    name: ClassVar[str] = "detection"
    metrics: ClassVar[Mapping[str, str]] = {"map": "mAP 0.5:0.95", "map50": "mAP 0.5"}
    meter_type = BoxMeter
    per_class = "AP 0.5:0.95"
    target = Boxes
    draws = True
    framing = "stretch"
    decoders: ClassVar[Mapping[str, Decoding]] = {
        "faster-rcnn": Decoding("faster-rcnn", fine),  # FPN, section 4
        "ssdlite": Decoding("ssdlite", coarsest(2)),  # MobileNetV2, section 6.2
    }
    head_rate = 0.003
    libraries = ("torchmetrics", "pycocotools")
    counted = "objects"
    weighs_classes = False
    smooths_labels = False

    def examine(self, target: Boxes, size: tuple[int, int] | None = None) -> TargetFacts:
        if size is None:
            return TargetFacts(Counter(target.labels.tolist()))
        corners, limits = target.corners, np.array(size * 2, dtype=np.float64)
        sides = corners[:, 2:] - corners[:, :2]
        places = {tuple(row) for row in np.column_stack([corners, target.labels]).tolist()}
        wrong = {
            "boxes that reach out of their image": (corners < -EDGE) | (corners > limits + EDGE),
            "boxes under 1 % of their image's width or height": sides < limits[:2] / 100,
            "two boxes of one class in one place": np.array([len(places) < len(corners)]),
        }
        return TargetFacts(Counter(target.labels.tolist()), tuple(text for text, found in wrong.items() if found.any()))

    def caption(self, target: Boxes, classes: Sequence[str]) -> str:
        counts = Counter(target.labels.tolist()).most_common()
        return ", ".join(f"{count} {classes[label]}" for label, count in counts) or "no object"

    def illustrate(self, image: Image.Image, target: Boxes, classes: Sequence[str], side: int) -> Image.Image:
        small, colors = fit_into(image, side), palette(len(classes)).tolist()
        scale = np.array([small.width / image.width, small.height / image.height] * 2)
        named = len(target.labels) <= FEW
        frames = [
            (tuple(corners), tuple(colors[label]), classes[label] if named else "")
            for corners, label in zip((target.corners * scale).tolist(), target.labels.tolist(), strict=True)
        ]
        return draw_frames(small, frames)

    def move(self, targets: list[Objects], device: torch.device) -> list[Objects]:
        """The targets that are not difficult on a device."""
        kept = [(target, ~target["difficult"]) for target in targets]
        return [{name: target[name][easy].to(device) for name in ("boxes", "labels")} for target, easy in kept]

    def run_head(self, head: nn.Module, read: HeadInput, targets: list[Objects]) -> Tensor:
        """The detector's loss."""
        from modelpatch.heads.detector import Detector

        assert isinstance(head, Detector) and isinstance(read, tuple)  # noqa: PT018
        return head.losses(read, targets)

    def loss(
        self, output: Tensor, targets: Any, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        return output.float()

    def reduce(self, answers: Tensor, top: int = 5) -> list[Tensor]:
        """The boxes (N, 6) of each image."""
        return list(answers.cpu())

    def describe(self, answer: Tensor, view: View, top: int = 5) -> list[Facts]:
        """All boxes that are sure, the surest first."""
        return [
            {"label": view.name(box.index), "probability": box.probability, "box": list(box.corners)}
            for box in find_boxes(answer, view)
        ]

    def to_json(self, answer: Tensor, view: View, top: int = 5) -> Facts:
        named, boxes = named_colors(view.classes), []
        for box in find_boxes(answer, view):
            corners = [round(corner, 2) for corner in box.corners]
            boxes.append({**named[box.index], "probability": round(box.probability, 6), "box": corners})
        return {"boxes": boxes, "size": list(view.size)}

    def summarize(self, facts: Sequence[Facts]) -> list[str]:
        """A line a class: its surest box, and the number of others."""
        counts = Counter(one["label"] for one in facts)
        surest = {one["label"]: one for one in reversed(facts)}
        lines = super().summarize([surest[label] for label in counts])
        others = [f" and {count - 1} more" if count > 1 else "" for count in counts.values()]
        return [line + more for line, more in zip(lines, others, strict=True)] or [f"no box from {100 * SURE:.0f} % on"]

    def draw(self, answer: Tensor, view: View) -> Image.Image:
        colors = [tuple(color) for color in palette(len(view.classes)).tolist()]
        frames = [
            (box.corners, colors[box.index], f"{view.name(box.index)} {100 * box.probability:.0f} %")
            for box in find_boxes(answer, view)
        ]
        return draw_frames(view.image, frames)


def find_boxes(answer: Tensor, view: View) -> list[FoundBox]:
    """The sure boxes of an answer (N, 6), the surest first, in the image's own pixels."""
    left, top, width, height = view.area
    across, down = width / view.preprocessing.image_size, height / view.preprocessing.image_size
    found = []
    for x0, y0, x1, y1, probability, index in answer[answer[:, 4] >= SURE].tolist():
        corners = (left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down)
        found.append(FoundBox(int(index), probability, corners))
    return found
