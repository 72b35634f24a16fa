"""Does patching on one task help, or harm, others? The experiments of PAINT's sections 5 and 6, with data that are made here.

    class split       patch on half of the classes, test on the other half       `split_classes`
    cross-dataset     patch on one data set, test on another                     `transfer_accuracy`
    typographic       photos with the wrong word written across them             `write_words`
    counting          pictures of n drawn objects, some counts held back         `counting_task`
    multiple choice   questions about drawn objects as prompts                    `multiple_choice`

All need answers that were never trained: heads made of words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modelpatch import Backbone, Patch, Task, evaluate
from modelpatch.backbone import open_image
from modelpatch.data import Split
from modelpatch.errors import DataError
from modelpatch.methods import Vocabulary
from modelpatch.tasks import TaskRecord

COLORS = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (48, 96, 200), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIDE = 128  # pixels of a drawn picture


def split_classes(data: Task, seed: int = 0) -> tuple[Task, Task]:
    """Two tasks of half of the classes each, drawn at random, with their own images. Raises `DataError` below four classes."""
    count = len(data.classes)
    if count < 4:
        raise DataError(f"{data.task.name} has {count} classes; a split into two tasks needs at least four.")
    order = np.random.default_rng(seed).permutation(count)
    halves = (np.sort(order[: count // 2]), np.sort(order[count // 2 :]))
    first, second = (
        take_classes(data, half, f"{data.task.name} {letter}") for half, letter in zip(halves, "AB", strict=True)
    )
    return first, second


def take_classes(data: Task, classes: Sequence[int] | np.ndarray, name: str) -> Task:
    """The task of some of the classes, by their numbers."""
    numbers = [int(number) for number in classes]
    new = np.full(len(data.classes), -1)
    new[numbers] = np.arange(len(numbers))

    def part(split: Split) -> Split:
        taken = split.take(np.flatnonzero(new[split.labels] >= 0))
        return Split(taken.images, new[taken.labels])

    task = TaskRecord(name=name, classes=tuple(data.classes[number] for number in numbers))
    validation = None if data.validation is None else part(data.validation)
    return replace(data, task=task, train=part(data.train), test=part(data.test), validation=validation)


def transfer_accuracy(backbone: Backbone, patch: Patch, vocabulary: Vocabulary, data: Task) -> float:
    """Top-1 in [0, 1] of a patched body on the test images of a task it was not patched on, answered by words."""
    return evaluate(backbone, vocabulary.relabel(patch, data.classes), data).score


# typographic attacks ------------------------------------------------------------------------------------------------


def write_words(data: Task, words: Mapping[str, str] | None = None, seed: int = 0) -> Task:
    """Every image with the name of another class of the task written across it; the labels stay what is seen.

    `words` are what is written for a class, by default its name. Place, colour and class follow `seed`.
    """
    names = [(words or {}).get(name, name) for name in data.classes]

    def attack(split: Split, number: int) -> Split:
        generator = np.random.default_rng((seed, number))
        images: list[Any] = []
        for image, label in zip(split.images, split.labels, strict=True):
            wrong = int(generator.integers(len(names) - 1))
            images.append(_written(open_image(image), names[wrong + (wrong >= label)], generator))
        return Split(images, split.labels)

    splits: dict[str, Any] = {name: attack(getattr(data, name), n) for n, name in enumerate(("train", "test"))}
    validation = None if data.validation is None else attack(data.validation, 2)
    task = TaskRecord(name=f"{data.task.name} with words", classes=data.classes)
    return replace(data, task=task, **splits, validation=validation)


def _written(image: Image.Image, word: str, generator: np.random.Generator) -> np.ndarray:
    """The word in a bright colour with a dark edge, across most of the width."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    size = max(image.height // 6, 8)
    font = ImageFont.load_default(size)
    while size > 6 and draw.textlength(word, font=font) > 0.95 * image.width:
        size -= 1
        font = ImageFont.load_default(size)
    left = generator.uniform(0, max(image.width - draw.textlength(word, font=font), 0))
    top = generator.uniform(0.1, 0.8) * image.height
    color = tuple(int(part) for part in generator.integers(160, 256, 3))
    draw.text((left, top), word, fill=color, font=font, stroke_width=max(size // 12, 1), stroke_fill="black")
    return np.asarray(image)


# drawn pictures -----------------------------------------------------------------------------------------------------


def counting_task(counts: Sequence[int], images: int = 40, seed: int = 0, name: str = "counting") -> Task:
    """Pictures of as many objects as the class says, `images` of each count to train on and half as many to test.

    Counts are from 0 to 10. Patch on some counts and test on others, as PAINT does on CLEVR (section 6).
    """
    if len(set(counts)) < 2 or not all(0 <= count <= 10 for count in counts):
        raise DataError(f"counts {list(counts)}: expected at least two different ones from 0 to 10.")
    classes = tuple(f"{NUMBERS[count]} objects" if count != 1 else "one object" for count in counts)

    def split(number: int, each: int) -> Split:
        generator = np.random.default_rng((seed, number))
        labels = np.repeat(np.arange(len(counts)), each)
        return Split([_drawn(generator, counts[int(label)])[0] for label in labels], labels)

    return Task(TaskRecord(name=name, classes=classes), split(0, images), split(1, max(images // 2, 1)))


def multiple_choice(images: int = 40, seed: int = 0, shapes: Sequence[str] = SHAPES) -> Task:
    """One drawn object a picture; the classes are whole prompts, "Question: what is it? Answer: a red circle"."""
    choices = [(color, shape) for color in COLORS for shape in shapes]
    classes = tuple(f"Question: what is it? Answer: a {color} {shape}" for color, shape in choices)

    def split(number: int, each: int) -> Split:
        generator = np.random.default_rng((seed, number))
        labels = np.repeat(np.arange(len(choices)), each)
        return Split([_drawn(generator, 1, choices[label])[0] for label in labels], labels)

    return Task(TaskRecord(name="multiple choice", classes=classes), split(0, images), split(1, max(images // 2, 1)))


def _drawn(
    generator: np.random.Generator, count: int, kind: tuple[str, str] | None = None
) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
    """`count` objects that do not overlap on a grey ground, and their (x, y, radius)."""
    ground = int(generator.integers(170, 230))
    image = Image.new("RGB", (SIDE, SIDE), (ground,) * 3)
    draw = ImageDraw.Draw(image)
    placed: list[tuple[float, float, float]] = []
    radius = 13.0 if kind is None else float(generator.uniform(18, 34))
    while len(placed) < count:
        x, y = generator.uniform(radius, SIDE - radius, 2)
        if all((x - a) ** 2 + (y - b) ** 2 > (radius + r) ** 2 for a, b, r in placed):
            color, shape = kind or (str(generator.choice(list(COLORS))), str(generator.choice(SHAPES)))
            _draw_object(draw, COLORS[color], shape, float(x), float(y), radius - 1)
            placed.append((float(x), float(y), radius))
        elif generator.random() < 0.002:  # a crowded picture: start anew, smaller
            placed, radius = [], radius * 0.9
            draw.rectangle((0, 0, SIDE, SIDE), fill=(ground,) * 3)
    return np.asarray(image), placed


def _draw_object(
    draw: ImageDraw.ImageDraw, color: tuple[int, int, int], shape: str, x: float, y: float, r: float
) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=color, outline="black")
    elif shape == "square":
        draw.rectangle(box, fill=color, outline="black")
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color, outline="black")
