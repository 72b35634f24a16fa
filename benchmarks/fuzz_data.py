"""Fuzz data folders and manifests with mutated names, columns, values and bytes: no raw error, none takes a second.

    python benchmarks/fuzz_data.py --count 100000 --seed 0

Prints every input that fails, by its number, and ends with status 1 where there is one.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from PIL import Image

from modelpatch.data.task import load_task
from modelpatch.errors import ModelpatchError

NAMES = [
    "train",
    "Test",
    "val",
    "dev",
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
]
FILES = [
    "0.png",
    "1.JPG",
    "2.jfif",
    "._0.png",
    "Thumbs.db",
    "x",
    "y.txt",
    "labels.csv",
    "train.csv",
    "metadata.jsonl",
    "a.json",
]
FILES += ["train.tar", "data.yaml", "a.xml", "t.parquet", "_annotations.coco.json", "test.tsv"]
CELLS = [
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
    "label",
    "id",
    "split",
]
SEPARATORS = [",", ";", "\t", "|", " ", "\n"]
LONGEST = 1.0  # seconds


def write_text(draw: random.Random) -> bytes:
    """A table of random cells, or something like JSON, in a random encoding, with random bytes changed."""
    separator = draw.choice(SEPARATORS)
    lines = [separator.join(draw.choices(CELLS, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 6))]
    if draw.random() < 0.5:
        lines.insert(0, separator.join(draw.sample(["image", "label", "split", "id", "x"], draw.randint(1, 4))))
    text = "\n".join(lines)
    if draw.random() < 0.3:
        text = (
            draw.choice(
                ['[{"image": "0.png", "label": %s}]', '{"images": [%s]}', '{"annotations": %s', "[%s", "<annotation>%s"]
            )
            % text
        )
    content = bytearray(text.encode(draw.choice(["utf-8", "utf-16", "latin-1", "utf-8-sig"]), "replace"))
    for _ in range(draw.choice([0, 0, 1, 5])):
        if content:
            content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def write_set(root: Path, draw: random.Random, picture: bytes) -> None:
    """Class folders in splits, or pictures with a manifest."""
    kind, classes = draw.choice(["classes", "splits", "table", "tables"]), draw.sample(NAMES, 2)
    for split in draw.sample(["train", "Testing", "dev", "my-test"], 2) if kind in ("splits", "tables") else ["."]:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(2):
                (folder / f"{number}.png").write_bytes(picture)
        if kind in ("table", "tables"):
            rows = [f"{name}/{number}.png{{0}}{name}" for name in classes for number in range(2)]
            header = "{0}".join(
                [draw.choice(["image", "file_name", "Path", "id"]), draw.choice(["label", "class", "breed"])]
            )
            text = "\n".join([header, *rows]).replace("{0}", draw.choice(SEPARATORS[:4]))
            (root / split / draw.choice(["labels.csv", "metadata.csv", "x.tsv"])).write_text(text)


def write_folder(root: Path, draw: random.Random, picture: bytes) -> None:
    """Random folders with random files, mostly beside a data set that could be read."""
    folders = [root]
    if draw.random() < 0.8:
        write_set(root, draw, picture)
        folders += [folder for folder in sorted(root.rglob("*")) if folder.is_dir()]
    for _ in range(draw.choice([0, 0, 1, 5])):
        folder = draw.choice(folders) / draw.choice(NAMES)
        folder.mkdir(exist_ok=True)
        folders.append(folder)
    for _ in range(draw.choice([0, 0, 1, 2, 8])):
        file = draw.choice(folders) / draw.choice(FILES)
        pictured = file.suffix.lower() in (".png", ".jpg", ".jfif")
        file.write_bytes(picture if pictured and draw.random() < 0.9 else write_text(draw))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        drawn = Path(place) / "picture.png"
        Image.new("RGB", (4, 4)).save(drawn)
        picture = drawn.read_bytes()
        for number in range(options.seed, options.seed + options.count):
            draw, root = random.Random(number), Path(place) / "data"
            root.mkdir()
            write_folder(root, draw, picture)
            files = [file for file in sorted(root.rglob("*")) if file.is_file()]
            source = draw.choice(files) if files and draw.random() < 0.4 else root
            start = time.perf_counter()
            try:
                load_task(source)
                outcome = "read"
            except ModelpatchError:
                outcome = "refused"
            except Exception:
                outcome = "raw error"
                print(f"input {number}: {source.relative_to(place)}\n{traceback.format_exc(limit=-3)}")
            if (seconds := time.perf_counter() - start) > LONGEST and number > options.seed:
                outcome = "slow"
                print(f"input {number}: {seconds:.2f} s")
            outcomes[outcome] += 1
            shutil.rmtree(root)
    print(", ".join(f"{count:,} {name}" for name, count in outcomes.items()))
    sys.exit(bool(outcomes["raw error"] or outcomes["slow"]))


if __name__ == "__main__":
    main()
