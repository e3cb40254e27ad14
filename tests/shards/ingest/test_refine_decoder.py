"""What `refine` lets through, DALI's CPU decoder reads, upright and as Pillow does: also what went the fast way."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.refine import CUT_OFF, RefineConfig, Refused, refine
from PIL import Image, ImageOps

from .. import test_decoder
from .test_refine import PLAIN, ZIP, encoded, refused, scene, turn

decode = test_decoder.decode  # the fixture
Decode = Callable[[bytes], np.ndarray]


def test_cut_and_odd_files_are_read(decode: Decode) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(scene(120, 90), kind, exif=turn(6), quality=90)
        image = refine(data + ZIP, PLAIN)
        assert image.changed == CUT_OFF
        seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
        assert np.abs(decode(image.data) - seen).max() == 0
    whole = encoded(scene(120, 90))
    late = whole[:-2] + bytes(7) + whole[-2:]
    assert np.array_equal(decode(refine(late, PLAIN).data), decode(whole))
    for config in (RefineConfig(resize=50), RefineConfig(reencode="jpg")):
        small = refine(encoded(scene(120, 90), exif=turn(8)), config)
        assert decode(small.data).shape == (small.height, small.width, 3)


@pytest.mark.parametrize("factors", [(0x22, 0x21), (0x41, 0x12), (0x14, 0x21), (0x31, 0x11), (0x24, 0x11)])
def test_rare_sampling_is_read(decode: Decode, factors: tuple[int, int]) -> None:
    """Within the standard, and beyond turbojpeg's simple interface: what Pillow accepts, DALI has to read."""
    whole = bytearray(encoded(scene(64, 48), subsampling=2))
    at = bytes(whole).index(b"\xff\xc0")
    whole[at + 11], whole[at + 14] = factors
    image = refine(bytes(whole), PLAIN)
    seen = np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).astype(int)
    assert np.abs(decode(image.data) - seen).mean() < 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_refused_or_read(decode: Decode) -> None:
    """Of JPEGs alone, headers above all: two parsers have to agree."""
    image = scene(160, 120)
    sources = [
        encoded(image, progressive=True, exif=turn(8)),
        encoded(image, exif=turn(6), comment=b"words"),
        encoded(image.convert("L")),
        encoded(image, subsampling=0, restart_marker_blocks=4),
        encoded(image.convert("CMYK")),
    ]
    numbers = np.random.default_rng(9)
    kept, outcomes = 0, set()
    for _ in range(90):
        for source in sources:
            reach = int(numbers.choice([len(source), 700]))
            at, value = int(numbers.integers(2, min(reach, len(source)))), numbers.bytes(1)
            damaged = source[:at] + [value, b"", value * 2][int(numbers.integers(3))] + source[at + 1 :]
            try:
                found = refine(damaged, PLAIN)
            except Refused as error:
                outcomes.add(error.outcome)
                continue
            kept += 1
            assert decode(found.data).shape == (found.height, found.width, 3), found.changed
    assert kept > 60
    assert outcomes <= {Outcome.BROKEN, Outcome.NOT_AN_IMAGE, Outcome.TOO_MANY_PIXELS}
    assert refused(sources[0][:-2])[0] is Outcome.BROKEN
