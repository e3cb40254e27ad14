"""Small files that claim to be large: known by their headers, before a decoder allocates anything."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.refine import refine

from .test_refine import PLAIN, chunk, encoded, refused, scene

Picture = Callable[..., bytes]


def bombs() -> dict[str, bytes]:
    """Small files that claim to be large, by what they are."""
    pixels = zlib.compress(bytes(1 << 20))
    jpeg = encoded(scene(64, 48))
    frame = jpeg.index(b"\xff\xc0")
    progressive = encoded(scene(64, 48), progressive=True)
    other = progressive.index(b"\xff\xc2")
    large = struct.pack(">HH", 65500, 65500)
    lossless = 0x2F | (16383 - 1) << 8 | (16383 - 1) << 22
    canvas = (0xFFFFFF).to_bytes(3, "little") * 2
    gif = encoded(scene(64, 48).convert("P"), "GIF")
    tiff = bytearray(encoded(scene(64, 48), "TIFF"))
    for tag, value in ((256, 30000), (257, 30000)):
        at = min(tiff.find(struct.pack("<HH", tag, kind), 8) % len(tiff) for kind in (3, 4))
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bmp = bytearray(encoded(scene(64, 48), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30000, 30000)
    return {
        "PNG": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""),
        "JPEG": jpeg[: frame + 5] + large + jpeg[frame + 9 :],
        "progressive JPEG": progressive[: other + 5] + large + progressive[other + 9 :],
        "lossless WebP": b"RIFF" + struct.pack("<I", 36) + b"WEBPVP8L" + struct.pack("<IQ", 24, lossless) + bytes(16),
        "WebP canvas": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 2) + canvas,
        "lossy WebP": b"RIFF" + struct.pack("<I", 34) + b"WEBPVP8 " + struct.pack("<I", 22) + b"\x10\0\0\x9d\x01\x2a"
        + struct.pack("<HH", 16383, 16383) + bytes(12),
        "GIF screen": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        "GIF frame": gif.replace(b",\0\0\0\0" + struct.pack("<HH", 64, 48), b",\0\0\0\0" + b"\xff\xff" * 2),
        "TIFF": bytes(tiff),
        "BMP": bytes(bmp),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(bombs()))
def test_a_bomb_is_known_by_its_header(name: str) -> None:
    outcome, detail = refused(bombs()[name])
    assert outcome is Outcome.TOO_MANY_PIXELS, detail


BOUNDED = """
import resource, sys
from pathlib import Path
from gristmill.shards.ingest.refine import RefineConfig, Refused, refine
from PIL import Image
Image.init()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
for path in sorted(Path(sys.argv[1]).glob("warm-*")):
    refine(path.read_bytes(), RefineConfig())
before = peak()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)  # whatever allocates a canvas fails here
for path in sorted(Path(sys.argv[1]).glob("bomb-*")):
    try:
        refine(path.read_bytes(), RefineConfig())
    except Refused as error:
        print(path.name, error.outcome.value, sep="\\t")
print(peak() - before)
"""


def test_bombs_allocate_nothing(tmp_path: Path, picture: Picture) -> None:
    """In a process that may take 64 MiB more than it has; each of these would decode to gigabytes."""
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        (tmp_path / f"warm-{kind}").write_bytes(picture(kind))
    made = {**bombs(), "TIFF tile": tiled(30000)}
    for name, data in made.items():
        (tmp_path / f"bomb-{name}").write_bytes(data)
    answer = subprocess.run([sys.executable, "-c", BOUNDED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    *lines, grown = answer.stdout.splitlines()
    assert dict(line.split("\t") for line in lines) == {f"bomb-{name}": "too_many_pixels" for name in made}
    assert int(grown) < 24  # MiB


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile of another size, all zeros, deflated."""
    body = zlib.compress(bytes(min(side * side * 3, 1 << 22)))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 2), (277, 3), (322, side), (323, side)]
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = [*((tag, 4, 1, value) for tag, value in tags), (324, 4, 1, start), (325, 4, 1, len(body))]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + body


def test_tiles_of_a_sane_size_are_read() -> None:
    assert (refine(tiled(64), PLAIN).width, refine(tiled(256), PLAIN).height) == (16, 16)
