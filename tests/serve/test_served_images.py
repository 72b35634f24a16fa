"""Decoding what strangers send: right for every ordinary kind, refused within bounds for every other."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import small_preprocessing
from modelpatch.serve.problems import Problem
from modelpatch.serve.question import FORMATS, decode
from modelpatch.serve.settings import Settings

pytestmark = pytest.mark.service

KIND = small_preprocessing()
LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def bomb(width: int, height: int, lines: int | None = None) -> bytes:
    """A small PNG with one bit a pixel, all of them white; of `height` only `lines` if that is given."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = b"\0" + b"\xff" * (-(-width // 8))
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(line) for _ in range(height if lines is None else lines)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_on_the_list_decodes_as_the_library_does(kind: str) -> None:
    data = encoded(noise(), kind)
    assert torch.equal(decode(data, [KIND], LIMIT)[0][KIND], KIND.center_crop(KIND.decode(data)))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16", "LA"])
def test_every_mode_is_a_right_answer(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 128 * 257, dtype=np.uint16))
    else:
        gray = Image.new("RGB", (40, 30), (128, 128, 128))
        image = gray.quantize(4) if mode == "P" else gray.convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    crop = decode(data, [KIND], LIMIT)[0][KIND]
    if mode == "1":  # dithered
        assert 100 < crop.float().mean() < 156
    else:
        assert (crop.int() - 128).abs().max() <= 3


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        red, _, blue = decode(data, [KIND], LIMIT)[0][KIND][:, 8, 8].tolist()
        assert (red, blue) == (255, 0)


def test_one_pixel_is_an_image() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), "red")), [KIND], LIMIT)[0][KIND][:, 0, 0].tolist() == [255, 0, 0]


def test_an_image_is_seen_by_every_preprocessing() -> None:
    kinds = [KIND, small_preprocessing(24)]
    assert [crop.shape for crop in decode(encoded(noise()), kinds, LIMIT)[0].values()] == [(3, 16, 16), (3, 24, 24)]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 422),
        (b"\0" * 1000, 422),
        (b"GIF89a", 422),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
        (encoded(noise(), "TIFF"), 422),  # not on the list
        (encoded(noise())[:200], 422),
        (encoded(noise(), "JPEG")[:400], 422),
        (bomb(13_000, 13_000), 413),
        (bomb(1_001, 1_000), 413),
        (encoded(Image.new("RGB", (60_000, 1))), 413),  # the shorter side would become 16: 15 million pixels
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_image_or_too_large_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(Problem) as refusal:
        decode(data, [KIND], LIMIT)
    assert refusal.value.status == status
    assert refusal.value.advice


def test_flipped_bytes_are_an_image_or_a_refusal() -> None:
    generator = np.random.default_rng(0)
    for kind in FORMATS:
        whole = np.frombuffer(encoded(noise(), kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            places = generator.integers(0, len(data), 3)
            data[places] = generator.integers(0, 256, 3)
            try:
                assert decode(data.tobytes(), [KIND], LIMIT)[0][KIND].shape == (3, 16, 16)
            except Problem as problem:
                assert problem.kind in ("unreadable-image", "too-large")  # noqa: PT017 (either outcome is right)


BOMBS = """
import resource, sys
sys.path[:0] = {path!r}
from test_served_images import KIND, bomb, decode
from modelpatch.serve.problems import Problem
corpus = [bomb(13_000, 13_000), bomb(100_000, 90_000, 9), bomb(2**31 - 1, 2**31 - 1, 0), bomb(60_000, 1), bomb(1, 60_000)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
statuses = []
for data in corpus:
    try:
        decode(data, [KIND], 32_000_000)
        statuses.append(200)
    except Problem as problem:
        statuses.append(problem.status)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *statuses)
"""


LARGEST = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_served_images import KIND, decode
from modelpatch.serve.settings import Settings
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    assert decode(Path(file).read_bytes(), [KIND], Settings().pixels)[0][KIND].shape == (3, 16, 16)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_images_at_the_limit_take_bounded_memory(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    files = []
    for mode in ("P", "I;16", "RGB", "CMYK", "LA", "RGBA"):
        image = Image.new(mode, (Settings().pixels // 4000, 4000))
        kind = "JPEG" if mode in ("RGB", "CMYK") else "PNG"
        files.append(tmp_path / mode)
        files[-1].write_bytes(encoded(image, kind, exif=turned, **({"compress_level": 1} if kind == "PNG" else {})))
    code = LARGEST.format(path=[path for path in sys.path if path])
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    peaks = [1024 * int(line) for line in result.stdout.split()]
    assert len(peaks) == len(files)
    assert max(peaks) < 200_000_000, peaks


def test_decompression_bombs_cost_little_memory() -> None:
    code = BOMBS.format(path=[path for path in sys.path if path])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kibibytes, *statuses = map(int, result.stdout.split())
    assert 1024 * kibibytes < 200_000_000
    assert all(status in (200, 413, 422) for status in statuses)
    assert statuses[0] == 413
