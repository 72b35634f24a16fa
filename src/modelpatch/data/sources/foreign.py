"""Data that is not read, told by name with what to do: annotations of other tools, arrays, records, archives, pictures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from modelpatch.backbone.listing import list_folder
from modelpatch.backbone.preprocessing import IMAGE_SUFFIXES
from modelpatch.plain_files import open_plain

BEGINNING = 2**16  # bytes in which a document says what it is
PROBED = 200  # documents that are looked into
KITTI = (15, 16)  # values in a line of its labels, and of its results
DATASET = "give a Dataset that reads them: Task.from_datasets(train, test)"
CONVERT = "Convert them to JPEG, PNG or TIFF"
EXPORT = "Export them as COCO."


class Foreign(NamedTuple):
    """Data that is not read, and advice for its user."""

    what: str
    advice: str


def _by_suffix(*rows: tuple[str, str, str]) -> dict[str, Foreign]:
    known = {suffix: Foreign(what, advice) for suffixes, what, advice in rows for suffix in suffixes.split()}
    return {suffix: foreign for suffix, foreign in known.items() if suffix not in IMAGE_SUFFIXES}


ARRAYS = _by_suffix(
    (".npy", "arrays", f"Write pictures, name the arrays in a table of images and labels, or {DATASET}."),
    (".npz .mat .h5 .hdf5", "arrays", f"Write a picture or a .npy file for each image, or {DATASET}."),
)
PICTURES = _by_suffix(
    (".heic .heif .hif .avif .jxl .exr .hdr .svg .pdf .eps", "pictures in a format of their own", f"{CONVERT}."),
    (".cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .raw", "raw photos", f"{CONVERT}."),
    (".dcm .dicom .nii .mha .mhd .nrrd", "medical images", f"{CONVERT}, with the window of values that they need."),
    (".mp4 .mov .avi .mkv .webm .m4v", "videos", "Write their frames as pictures."),
)
OTHERS = _by_suffix(
    (".tfrecord .tfrecords .record", "records of TensorFlow", "Write pictures, or tar shards of WebDataset."),
    (".rec .mdb .lmdb .beton .mds", "records", f"Write pictures, or {DATASET}."),
    (".xls .xlsx .ods .numbers", "spreadsheets", "Save them as CSV."),
    (".zip .rar .7z .gz .tgz .bz2 .xz .zst", "archives", "Unpack them."),
    (".pkl .pickle .pt .pth", "pickles, which could run code", f"Write pictures, or {DATASET}."),
)
NAMES = {  # a part of names without suffix
    "-ubyte": Foreign("MNIST's own files", f"Take torchvision.datasets.MNIST, or {DATASET}."),
    "data_batch_": Foreign("CIFAR's own files", f"Take torchvision.datasets.CIFAR10, or {DATASET}."),
}
TOOLS: Sequence[tuple[tuple[bytes, ...], Foreign]] = (  # by what a document holds
    ((b'"shape_attributes"',), Foreign("annotations of VIA", EXPORT)),
    ((b"region_shape_attributes",), Foreign("annotations of VIA", EXPORT)),
    ((b'"asset"', b'"regions"'), Foreign("annotations of VoTT", "Export them as Pascal VOC.")),
    ((b'"item"', b'"annotations"', b'"slots"'), Foreign("annotations of V7 Darwin", EXPORT)),
    ((b'"item"', b'"annotations"', b'"bounding_box"'), Foreign("annotations of V7 Darwin", EXPORT)),
    ((b'"data_row"',), Foreign("an export of Labelbox", EXPORT)),
    ((b'"Labeled Data"',), Foreign("an export of Labelbox", EXPORT)),
    ((b'"source-ref"',), Foreign("a manifest of SageMaker", "Write a table of images and labels.")),
    ((b'"imageGcsUri"',), Foreign("a manifest of Vertex AI", "Write a table of images and labels.")),
    ((b"imagesource:", b"gsd:"), Foreign("oriented boxes of DOTA", "Convert them to YOLO or COCO.")),
    ((b"<annotation", b"<robndbox"), Foreign("turned boxes of roLabelImg", "Convert them to COCO.")),
)
LINES_OF_KITTI = Foreign("boxes of KITTI", "Convert them to YOLO or COCO.")
DOCUMENTS = (".json", ".jsonl", ".ndjson", ".manifest", ".csv", ".txt", ".xml")
SUFFIXES = {**OTHERS, **PICTURES, **ARRAYS}


def is_unread_picture(file: Path) -> bool:
    """Return True for the name of a picture or video in a format that is not read."""
    return file.suffix.lower() in PICTURES


def begins_as_picture(file: Path) -> bool:
    """Return True for a file that begins as a JPEG, PNG, GIF or WebP does, whatever its name is."""
    try:
        with open_plain(file) as stream:
            begin = stream.read(12)
    except OSError:
        return False
    return begin.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or begin[8:] == b"WEBP"


def is_of_another_tool(text: bytes) -> bool:
    """Return True for the beginning of a document of a tool whose annotations are not read."""
    return any(all(key in text for key in keys) for keys, _ in TOOLS)


def tell_arrays(files: Iterable[Path], root: Path) -> str:
    """A sentence about the arrays among files, empty where there are none."""
    return _tell({file: ARRAYS[file.suffix.lower()] for file in files if file.suffix.lower() in ARRAYS}, root)


def tell_foreign(path: Path) -> str:
    """A sentence about data in a folder, or in a file, that is not read; empty where there is none that is known."""
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = [file for listing in list_folder(path).below() for file in listing.files]
    found = {file: known for file in files if (known := SUFFIXES.get(file.suffix.lower()) or _by_name(file.name))}
    if not found:
        documents = [file for file in files if file.suffix.lower() in DOCUMENTS][:PROBED]
        found = {file: known for file in documents if (known := _by_content(file))}
    return _tell(found, path if path.is_dir() else path.parent)


def _tell(found: Mapping[Path, Foreign], root: Path) -> str:
    """A sentence about the most frequent of what was found."""
    if not found:
        return ""
    (known, count), *_ = Counter(found.values()).most_common(1)
    first = next(file for file, own in found.items() if own == known)
    name = first.relative_to(root).as_posix() if first.is_relative_to(root) else str(first)
    return f"{count:,} {'file' if count == 1 else 'files'}, first {name[:200]}: {known.what}, not read. {known.advice}"


def _by_name(name: str) -> Foreign | None:
    return next((known for part, known in NAMES.items() if part in name.lower() and "." not in name), None)


def _by_content(file: Path) -> Foreign | None:
    try:
        with file.open("rb") as stream:
            text = stream.read(BEGINNING).replace(b"\0", b"")  # without the zeros of UTF-16
    except OSError:
        return None
    words = text.split(b"\n", 1)[0].split()
    if file.suffix.lower() == ".txt" and len(words) in KITTI and not words[0][:1].isdigit():
        return LINES_OF_KITTI
    return next((known for keys, known in TOOLS if all(key in text for key in keys)), None)
