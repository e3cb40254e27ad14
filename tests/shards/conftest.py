"""What the tests of shards share: pictures (a smooth gradient with a checker, encoded in whatever way a test needs), a
folder of tars as others make them, a server with twelve shards, and a disk that is soon full."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gristmill.shards.client import Client
from gristmill.shards.remote import HttpBlob
from PIL import Image

from .. import disks
from ..faulty_http import FaultyServer
from ..servers import WEED_MISSING, Server, find_weed, kept_ports, weed_server
from .cached import QUICK, content
from .remotes import DATA
from .tars import tar


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    shade = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), ((x // 5 + y // 5) % 2) * 160 + seed % 64)
    return Image.fromarray(np.stack(shade, -1).astype(np.uint8))


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """picture(format, width, height, seed, mode=..., **save options) -> bytes of an image file."""

    def encode(kind: str = "JPEG", width: int = 40, height: int = 24, seed: int = 0, mode: str = "RGB", **options):
        file = io.BytesIO()
        draw(width, height, seed).convert(mode).save(file, kind, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def pictures(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """A source of 24 images in two levels of folders, in three formats, no two alike."""
    for number in range(24):
        kind, suffix = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")][number % 3]
        place = tmp_path / "source" / "ab"[number % 2] / f"c{number % 4}" / f"{number:02d}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(kind, 20 + number, 30, number))
    return tmp_path / "source"


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Three shards of five samples, image and text."""
    for shard in range(3):
        entries = []
        for number in range(5):
            entries.append((f"{shard}{number}.jpg", picture("JPEG", 20 + number, 30, 5 * shard + number)))
            entries.append((f"{shard}{number}.txt", b"caption"))
        tar(tmp_path / "set" / f"{shard:03d}.tar", entries)
    return tmp_path / "set"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """`/a.tar` of remotes.py, and the twelve shards `/0.tar` and so on of cached.py."""
    with FaultyServer({"/a.tar": DATA, **{f"/{number}.tar": content(number) for number in range(12)}}) as server:
        yield server


@pytest.fixture
def blob(server: FaultyServer) -> Callable[[int], HttpBlob]:
    """blob(number) -> that shard of the server."""
    client = Client(QUICK)
    return lambda number: HttpBlob(server.url(f"/{number}.tar"), client)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own: the only honest way to fill a disk."""
    with disks.small_disk(tmp_path / "small-disk", "1m") as place:
        yield place


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server for tests that leave it as it is."""
    if find_weed() is None:
        pytest.skip(WEED_MISSING)
    with weed_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, until the test itself does."""
    with kept_ports(1) as [port]:
        yield port
