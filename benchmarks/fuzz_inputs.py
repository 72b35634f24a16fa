"""The data sets that `fuzz_data.py` damages: one writer for each layout, of a few tiny pictures, and changes of documents.

Every writer fills a folder with a set that is read as it is, apart from what `Draw` changes in its names, values and bytes.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

SPLITS = ["train", "Testing", "valid", "my-test", "dev", "test", "TRAIN", "val2017"]
NAMES = [
    *SPLITS,
    "cat",
    "dog",
    "cat ",
    "Cat",
    "images",
    "masks",
    "labels",
    ".hidden",
    "__MACOSX",
    "ä",
    "a" * 80,
    "data",
    "0",
]
FILES = [
    *("0.png", "1.JPG", "2.jfif", "._0.png", "Thumbs.db", "x", "y.txt", "labels.csv", "train.csv", "metadata.jsonl"),
    *("a.json", "train.tar", "data.yaml", "a.xml", "t.parquet", "_annotations.coco.json", "test.tsv", "labels.json"),
    *(
        "classes.txt",
        "class_dict.csv",
        "annotations.xml",
        "0.json",
        "0.txt",
        "0.npy",
        "0.npz",
        "0.mat",
        "a.xlsx",
        "obj.data",
    ),
]
CELLS = [
    *(
        "0.png",
        "cat",
        "dog",
        "",
        "nan",
        "-1",
        "1.5",
        "train",
        "cat|dog",
        '"',
        "\0",
        "C:\\a\\0.png",
        "/x/0.png",
        "image",
    ),
    *("label", "id", "split", "1e400", "٣", "²", "[1, 2]", "https://a/0.png", "..", "{}", "0", "1", "2", "a" * 300),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2**70,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "cat",
        "\0",
        "..",
        "²",
        "1e400",
    ),
    *(
        [],
        {},
        [1],
        [[0, 0, 1, 1]],
        {"a": 1},
        [None],
        {"counts": "x", "size": [4, 4]},
        {"counts": [1, 2], "size": [4, 4]},
    ),
]
SEPARATORS = [",", ";", "\t", "|", " ", "\n"]


@cache
def picture(form: str = "PNG", mode: str = "RGB", value: int = 3) -> bytes:
    """The bytes of a picture of 6 x 4 pixels."""
    image = Image.new(mode, (6, 4), value)
    if mode in ("L", "P"):
        image.putpixel((0, 0), 0)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


class Draw(random.Random):
    """A source of random choices, with the changes that it makes to documents; `rate` is how often it makes one."""

    rate: float = 0.5

    def some(self, *counts: int) -> int:
        """One of these numbers."""
        return self.choice(counts)

    def damage(self, content: bytes) -> bytes:
        """Bytes with a few of them changed, mostly none."""
        changed = bytearray(content)
        for _ in range(self.some(0, 0, 0, 0, 0, 1, 5) if self.rate else 0):
            if changed:
                at = self.randrange(len(changed))
                way = self.randrange(4)
                if way == 0:
                    changed[at] = self.randrange(256)
                elif way == 1:
                    del changed[at : at + self.some(1, 8, 10**6)]
                elif way == 2:
                    changed[at:at] = changed[at : at + self.some(1, 8, 64)]
                else:
                    changed[at : at + 1] = self.choice([b'"', b"\0", b",", b"{", b"<", b"&", b"\n", b"\xff", b"9" * 40])
        return bytes(changed)

    def encode(self, text: str) -> bytes:
        """A text in some encoding."""
        return text.encode(self.choice(["utf-8"] * 5 + ["utf-16", "latin-1", "utf-8-sig"]), "replace")

    def json(self, document: Any) -> bytes:
        """A document as JSON, with values, keys and bytes changed."""
        for _ in range(self.some(0, 1, 1, 2, 4) if self.random() < self.rate else 0):
            document = self._alter(document)
        try:
            return self.damage(self.encode(json.dumps(document)))
        except (ValueError, RecursionError):
            return b"{}"

    def _alter(self, node: Any) -> Any:
        """The node with one part of it, found by chance, changed."""
        if isinstance(node, dict | list) and node and self.random() < 0.85:
            places = list(node) if isinstance(node, dict) else list(range(len(node)))
            place = self.choice(places)
            made = dict(node) if isinstance(node, dict) else list(node)
            way = self.random()
            if way < 0.12:
                del made[place]
            elif way < 0.2 and isinstance(made, dict):
                made[self.choice(["x", "", str(place).upper(), "id", "name", "images", "label"])] = made.pop(place)
            elif way < 0.28 and isinstance(made, list):
                made.append(made[place])
            else:
                made[place] = self._alter(made[place])
            return made
        return self.choice(VALUES)

    def xml(self, root: ElementTree.Element) -> bytes:
        """A document as XML, with texts, tags, attributes and bytes changed."""
        for _ in range(self.some(0, 1, 1, 2, 4) if self.random() < self.rate else 0):
            element = self.choice(list(root.iter()))
            way = self.randrange(5)
            if way == 0 and len(element):
                element.remove(self.choice(list(element)))
            elif way == 1:
                element.tag = self.choice(["x", "object", "bndbox", "name", "image", "box", "annotation"])
            elif way == 2 and element.attrib:
                element.attrib[self.choice(list(element.attrib))] = self.choice(
                    ["", "x", "-1", "nan", "1e400", "²", "0;0"]
                )
            elif way == 3 and len(element):
                element.append(self.choice(list(element)))
                break
            else:
                element.text = self.choice(["", "x", "-1", "nan", "1e400", "²", "0", "9" * 30])
        return self.damage(ElementTree.tostring(root, self.choice(["unicode", "unicode"])).encode())

    def lines(self, rows: list[list[Any]], separator: str = " ") -> bytes:
        """Lines of cells, with cells, lines and bytes changed."""
        made = [[str(cell) for cell in row] for row in rows]
        for _ in range(self.some(0, 1, 1, 2, 4) if self.random() < self.rate and made else 0):
            row = self.choice(made)
            if row and self.random() < 0.7:
                row[self.randrange(len(row))] = self.choice(CELLS)
            elif self.random() < 0.5:
                row.append(self.choice(CELLS))
            else:
                made.append(list(row))
        return self.damage(self.encode("\n".join(separator.join(row) for row in made)))


# layouts ------------------------------------------------------------------------------------------------------


def put(file: Path, content: bytes) -> Path:
    """Write a file, with the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def write_classes(root: Path, draw: Draw) -> None:
    """Class folders, in splits or not."""
    for split in ["train", *draw.sample(SPLITS, 1)] if draw.random() < 0.6 else ["."]:
        for name in draw.sample(NAMES[8:], 2) if draw.random() < draw.rate else ["cat", "dog"]:
            for number in range(draw.some(1, 3, 3)):
                put(root / split / name / f"{number}.png", picture())


def write_table(root: Path, draw: Draw) -> None:
    """Pictures in class folders or not, with a table of labels, numbers or several labels in some format."""
    nested, separator = draw.random() < 0.5, draw.choice(SEPARATORS[:4])
    labels = draw.choice(
        [
            ["cat", "dog"],
            ["cat|dog", "cat"],
            ["0", "1"],
            ["0.5", "1.25"],
            ["cat", ""],
            ["[1,0]", "[0,1]"],
            ["cat dog", "cat"],
        ]
    )
    header = [
        draw.choice(["image", "file_name", "Path", "id", "slide"]),
        draw.choice(["label", "class", "breed", "tags", "x", "bbox"]),
    ]
    rows: list[list[Any]] = []
    for number in range(4):
        name = f"{labels[number % 2]}/{number}.png" if nested and labels == ["cat", "dog"] else f"{number}.png"
        put(root / name, picture())
        rows.append([name, labels[number % 2]])
    if draw.random() < 0.3:
        header.append(draw.choice(["split", "fold", "set", "x"]))
        for number, row in enumerate(rows):
            row.append(draw.choice(["train", "test", "val", str(number % 2), ""]))
    stem = draw.choice(["labels", "metadata", "train", "x"])
    form = draw.choice([".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"])
    if form in (".csv", ".tsv", ".txt"):
        content = draw.lines([header, *rows], separator)
    elif form == ".parquet":
        content = parquet(header, rows, draw)
    else:
        records = [dict(zip(header, row, strict=False)) for row in rows]
        split = [draw.json(record) for record in records]
        content = b"\n".join(split) if form == ".jsonl" else draw.json({"data": records} if len(rows) % 2 else records)
    put(root / f"{stem}{form}", content)


def parquet(header: list[str], rows: list[list[Any]], draw: Draw) -> bytes:
    """A Parquet file of the columns, maybe of odd types."""
    columns: dict[str, Any] = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    if draw.random() < 0.5:
        columns[header[0]] = [{"bytes": draw.choice([picture(), picture(), b"", None]), "path": None} for _ in rows]
    if draw.random() < 0.3:
        odd: list[Any] = [[1, 2], b"a", {"a": 1}, None]
        columns[header[1]] = draw.choice([*([one] * 4 for one in odd), [1.5, None, float("nan"), 2.0]])
    stream = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    except (pyarrow.ArrowException, ValueError):
        return b"PAR1"
    return draw.damage(stream.getvalue())


def write_coco(root: Path, draw: Draw) -> None:
    """COCO's boxes, as one of the tools writes them."""
    for split in ["train", "valid"][: draw.some(1, 2)]:
        document = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 6, "height": 4} for n in range(2)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [
                {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 3, 2], "area": 6, "iscrowd": 0},
                {"id": 2, "image_id": 1, "category_id": 2, "segmentation": [[0, 0, 3, 0, 3, 3]], "iscrowd": 0},
                {"id": 3, "image_id": 1, "category_id": 2, "segmentation": {"size": [4, 6], "counts": [3, 4, 17]}},
            ],
        }
        file, place = draw.choice(
            [
                (root / split / "_annotations.coco.json", root / split),
                (root / "annotations" / f"instances_{split}.json", root / split),
                (root / f"{split}.json", root / "images"),
            ]
        )
        put(file, draw.json(document))
        for number in range(2):
            put(place / f"{number}.png", picture())


def element(tag: str, text: Any = None, *inner: ElementTree.Element, **attributes: Any) -> ElementTree.Element:
    """An XML element."""
    made = ElementTree.Element(tag, {name: str(value) for name, value in attributes.items()})
    made.text = None if text is None else str(text)
    made.extend(inner)
    return made


def write_voc(root: Path, draw: Draw) -> None:
    """VOC's boxes, officially or beside the pictures."""
    official = draw.random() < 0.5
    for number in range(2):
        sides = [
            element(side, value) for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (1, 1, 4, 3), strict=True)
        ]
        thing = element(
            "object", None, element("name", "cat"), element("difficult", 0), element("bndbox", None, *sides)
        )
        size = element("size", None, element("width", 6), element("height", 4), element("depth", 3))
        document = element("annotation", None, element("filename", f"{number}.png"), size, thing)
        put(root / ("Annotations" if official else ".") / f"{number}.xml", draw.xml(document))
        put(root / ("JPEGImages" if official else ".") / f"{number}.png", picture())
    if official and draw.random() < 0.7:
        for split, number in (("train", 0), ("val", 1)):
            put(root / "ImageSets" / "Main" / f"{split}.txt", draw.lines([[str(number)]]))


def write_yolo(root: Path, draw: Draw) -> None:
    """YOLO's boxes, with a description or names."""
    for split in ("train", "val"):
        rows: list[list[Any]] = draw.choice([[[0, 0.5, 0.5, 0.2, 0.2]], [[1, 0.1, 0.1, 0.5, 0.1, 0.5, 0.5]], []])
        put(root / "labels" / split / "0.txt", draw.lines(rows))
        put(root / "images" / split / "0.png", picture())
    way = draw.randrange(4)
    if way == 0:
        put(root / "classes.txt", draw.lines([["cat"], ["dog"]]))
    elif way == 1:
        put(root / "obj.data", draw.damage(b"classes = 2\ntrain = train.txt\nnames = obj.names\n"))
        put(root / "obj.names", draw.lines([["cat"], ["dog"]]))
        put(root / "train.txt", draw.lines([["images/train/0.png"], ["images/val/0.png"]]))
    else:
        odd = ["&a [cat, *a]", "2", "{cat: 0}", "[1, null]"]
        names = draw.choice(["[cat, dog]", "{0: cat, 1: dog}", "\n  - cat\n  - dog", *odd])
        text = f"path: {draw.choice(['.', '/x', '../y', ''])}\ntrain: images/train\nval: images/val\nnc: 2\nnames: {names}\n"
        put(root / "data.yaml", draw.damage(draw.encode(text)))


def write_fiftyone(root: Path, draw: Draw) -> None:
    """FiftyOne's exports of classes or boxes."""
    box = {"label": 0, "bounding_box": [0.1, 0.1, 0.5, 0.5]}
    dog = {"label": "dog"}
    labels = draw.choice(
        [{"0": 0, "1": 1, "2": 0, "3": 1}, {"0": [box], "1": []}, {"0": "cat", "1": dog, "2": "cat", "3": dog}]
    )
    put(root / "labels.json", draw.json({"classes": ["cat", "dog"], "labels": labels}))
    for number in range(4):
        put(root / "data" / f"{number}.png", picture())


def write_masks(root: Path, draw: Draw) -> None:
    """Pictures with masks, with or without a legend."""
    mode = draw.choice(["L", "P", "RGB", "1", "I;16", "RGBA", "LA"])
    if draw.random() < 0.5:
        places = draw.choice(
            [
                ("images/{}.png", "masks/{}.png"),
                ("x/{}.jpg", "y/{}_mask.png"),
                ("train/img/{}.jpg", "train/organs/{}.png"),
            ]
        )
    else:
        places = ("{}.jpg", "{}.png") if draw.random() < 0.5 else ("train/{}.png", "train_labels/{}.png")
    for number in range(2):
        put(root / places[0].format(number), picture("JPEG", value=120) if "jpg" in places[0] else picture())
        mask = np.zeros((4, 6), dtype=np.uint16 if mode == "I;16" else np.uint8)
        mask[:2] = draw.choice([1, 255, 2, 0])
        stream = io.BytesIO()
        image = Image.fromarray(mask) if mode == "I;16" else Image.fromarray(mask).convert(mode)
        image.save(stream, "PNG")
        put(root / places[1].format(number), draw.damage(stream.getvalue()))
    legends: dict[str, list[list[Any]]] = {
        "class_dict.csv": [["name", "r", "g", "b"], ["bg", 0, 0, 0], ["cat", 255, 255, 255]],
        "labelmap.txt": [["bg:0,0,0::"], ["cat:255,255,255::"]],
        "label_colors.txt": [["0 0 0", "bg"], ["255 255 255", "cat"]],
        "_classes.csv": [["Pixel Value", " Class"], [0, "bg"], [1, "cat"]],
        "classes.txt": [["bg"], ["cat"]],
    }
    if draw.random() < 0.6:
        name = draw.choice(list(legends))
        put(root / name, draw.lines(legends[name], "," if name.endswith(".csv") else " "))


def write_shards(root: Path, draw: Draw) -> None:
    """Tar files of samples."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(2):
            label = draw.choice(
                [("cls", draw.lines([[str(number)]])), ("json", draw.json({"label": "cat"})), ("txt", b"dog")]
            )
            for suffix, content in (("png", picture()), label):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    put(root / draw.choice(["train-0000.tar", "x.tar", "train/0.tar"]), draw.damage(stream.getvalue()))
    if draw.random() < 0.3:
        put(root / "classes.txt", draw.lines([["cat"], ["dog"]]))


def write_text(draw: Draw) -> bytes:
    """A table of random cells, or something like a document, with random bytes changed."""
    separator = draw.choice(SEPARATORS)
    lines = [separator.join(draw.choices(CELLS, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 6))]
    if draw.random() < 0.5:
        lines.insert(0, separator.join(draw.sample(["image", "label", "split", "id", "x"], draw.randint(1, 4))))
    text = "\n".join(lines)
    if draw.random() < 0.3:
        begin = ['[{"image": "0.png", "label": %s}]', '{"images": [%s]}', '{"annotations": %s', "[%s", "<annotation>%s"]
        text = draw.choice([*begin, "names: %s"]) % text
    return draw.damage(draw.encode(text))


LAYOUTS: dict[str, Callable[[Path, Draw], None]] = {
    "classes": write_classes,
    "table": write_table,
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo,
    "fiftyone": write_fiftyone,
    "masks": write_masks,
    "shards": write_shards,
}
