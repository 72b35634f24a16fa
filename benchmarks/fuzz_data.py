"""Fuzz data folders, manifests and annotations with mutated names, columns, values and bytes: no raw error, none takes 1 s.

    python benchmarks/fuzz_data.py --count 100000 --state counts.json

A case is a small set in one of the layouts (`fuzz_inputs.py`), with changes inside its documents and odd files and folders
beside them; it is read as a folder or by one of its files, sometimes with options, and every fourth one that is read is
reported on as `modelpatch data` does. `fuzzing.py` says how cases are numbered, continued and repeated.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import fuzzing
from fuzz_inputs import CELLS, FILES, LAYOUTS, NAMES, Draw, picture, write_text
from modelpatch.data.task import load_task
from modelpatch.tasks.kind import KINDS

SHORT_LIVED = Path("/dev/shm")  # in memory
REPORTED = 4  # one read case of so many is reported on
PICTURES = (".png", ".jpg", ".jfif")


def write_case(root: Path, draw: Draw) -> None:
    """A set in some layout, or none, with odd files and folders."""
    root.mkdir()
    folders = [root]
    if draw.random() < 0.9:
        LAYOUTS[draw.choice(list(LAYOUTS))](root, draw)
        folders += [folder for folder in sorted(root.rglob("*")) if folder.is_dir()]
    for _ in range(draw.some(0, 0, 0, 0, 1, 5)):
        folder = draw.choice(folders) / draw.choice(NAMES)
        if not folder.exists():
            folder.mkdir()
            folders.append(folder)
    for _ in range(draw.some(0, 0, 0, 0, 1, 2, 8)):
        file = draw.choice(folders) / draw.choice(FILES)
        if not file.is_dir():
            pictured = file.suffix.lower() in PICTURES and draw.random() < 0.8
            file.write_bytes(draw.damage(picture()) if pictured else write_text(draw))


def choose_options(draw: Draw) -> dict[str, Any]:
    """Options for reading, mostly none."""
    chosen: dict[str, Any] = {}
    if draw.random() < 0.7:
        return chosen
    if draw.random() < 0.3:
        chosen["kind"] = draw.choice(sorted(KINDS))
    if draw.random() < 0.3:
        chosen["classes"] = draw.choice(
            [["cat", "dog"], ["bg", "cat"], ["cat"], ["x", "x"], [""], draw.sample(CELLS, 2)]
        )
    if draw.random() < 0.15:
        chosen["ignore"] = draw.choice([0, 1, 255])
    if draw.random() < 0.15:
        chosen["separator"] = draw.choice(["|", ",", "x", " "])
    for column in ("image_column", "label_column", "split_column"):
        if draw.random() < 0.08:
            chosen[column] = draw.choice(["image", "label", "split", "x", "id"])
    chosen["skip_unreadable"] = draw.random() < 0.2
    chosen["hold_out"] = draw.random() < 0.8
    return chosen


def read(source: Path, chosen: dict[str, Any], reported: bool) -> str:
    """Read a case, and report on it as `modelpatch data` does."""
    task = load_task(source, **chosen)
    if reported:
        str(task.report(near=True))
    return "reported" if reported else "read"


def main() -> None:
    """Read the options and run."""
    given = fuzzing.options(__doc__, 100_000).parse_args()
    with tempfile.TemporaryDirectory(dir=SHORT_LIVED if SHORT_LIVED.is_dir() else None) as place:
        root = Path(place) / "data"

        def prepare(number: int) -> fuzzing.Case:
            shutil.rmtree(root, ignore_errors=True)
            draw = Draw(max(number, 0))
            draw.rate = 0.0 if number < 0 else draw.choice([0.0, 0.3, 0.6, 0.6])
            if number < 0:
                root.mkdir()
                LAYOUTS["coco"](root, draw)
                return partial(read, root, {}, True)
            write_case(root, draw)
            files = [file for file in sorted(root.rglob("*")) if file.is_file()]
            texts = [file for file in files if file.suffix not in PICTURES] if draw.random() < 0.9 else files
            source = draw.choice(texts) if texts and draw.random() < 0.3 else root
            return partial(read, source, choose_options(draw), draw.randrange(REPORTED) == 0)

        fuzzing.run(prepare, given)


if __name__ == "__main__":
    main()
