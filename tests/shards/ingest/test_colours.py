"""What a source is beside plain RGB is told, so that it can be counted; the picture is the same."""

import io
from typing import Any

import numpy as np
import pytest
from gristmill.shards.ingest.refine import RefineConfig, refine
from PIL import Image

PLAIN = RefineConfig()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "colours"),
    [
        ("RGB", "JPEG", ""),
        ("L", "JPEG", "grey"),
        ("CMYK", "JPEG", "cmyk"),
        ("RGB", "PNG", ""),
        ("L", "PNG", "grey"),
        ("1", "PNG", "grey"),
        ("P", "PNG", "palette"),
        ("LA", "PNG", "alpha"),
        ("RGBA", "PNG", "alpha"),
        ("I;16", "PNG", "16 bit"),
        ("RGBA", "WEBP", "alpha"),
        ("P", "GIF", "palette"),
    ],
)
@pytest.mark.parametrize("config", [PLAIN, RefineConfig(resize=16)])
def test_what_is_no_plain_rgb_is_told(mode: str, kind: str, colours: str, config: RefineConfig) -> None:
    grain = np.random.default_rng(3).integers(0, 255, (40, 50, 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grain[..., 0].astype(np.uint16) * 256)
    elif mode in ("LA", "RGBA"):
        image = Image.fromarray(grain).convert(mode[:-1])
        image.putalpha(100)
    else:
        image = Image.fromarray(grain).convert(mode)
    assert refine(saved(image, kind), config).colours == colours


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_told(kind: str) -> None:
    grain = np.random.default_rng(4).integers(0, 255, (2, 40, 50, 3), np.uint8)
    first, second = (Image.fromarray(frame) for frame in grain)
    data = saved(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    found = refine(data, PLAIN)
    assert found.colours == "animated"
    assert np.abs(found.grey.astype(int) - refine(saved(first, "PNG"), PLAIN).grey).mean() < 12, (
        "the first frame; the other one is some 40 levels off"
    )
