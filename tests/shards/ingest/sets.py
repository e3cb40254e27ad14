"""Sources for whole ingests, and what is looked at afterwards: the tree of files, the samples, the ledger."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from gristmill.shards import Manifest
from gristmill.shards.ingest import IngestConfig
from gristmill.shards.ingest.ledger import generations, rows_of
from PIL import Image

SMALL = IngestConfig(unit=4, shard_samples=7)


def key(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def scene(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A picture of soft blobs, unlike that of any other seed; fine enough for a fingerprint to hold on to."""
    raw = np.random.Generator(np.random.Philox(seed)).integers(0, 255, (24, 32, 3), np.uint8)
    return Image.fromarray(raw).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scenes(folder: Path, count: int, first: int = 0) -> list[bytes]:
    """So many images in folders a/ and b/, in three formats, in the order in which they are found."""
    for number in range(first, first + count):
        kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")][number % 3]
        place = folder / "ab"[number % 2] / f"{number:05d}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(scene(number), kind))
    return [path.read_bytes() for path in sorted(folder.rglob("*.*"))]


def noise(root: Path, count: int, size: int) -> None:
    """JPEGs of noise, which fill a disk fast: about 3 bytes for each of size x size pixels."""
    root.mkdir()
    for number in range(count):
        pixels = np.random.Generator(np.random.Philox(number)).integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.jpg", quality=98, subsampling=0)


def tree(root: Path) -> dict[str, bytes]:
    """Every published file; not what an ingest keeps for itself."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    named = {str(path.relative_to(root)): path for path in paths}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".ingest/")}


def stored(root: Path) -> dict[str, bytes]:
    """Every sample of a data set by key, cut out of the tars at the manifest's places."""
    manifest, found = Manifest.open(root), {}
    for shard in range(len(manifest.urls)):
        rows, data = manifest.rows(shard), manifest.path(shard).read_bytes()
        places = zip(rows.keys, rows.offset, rows.length, strict=True)
        found |= {name: data[offset : offset + length] for name, offset, length in places}
    return found


def ledger(root: Path, generation: int | None = None) -> list[dict[str, Any]]:
    """The rows of one generation, or of all."""
    numbers = [one.number for one in generations(root)] if generation is None else [generation]
    return [row for number in numbers for table in rows_of(root, number) for row in table.to_pylist()]


def counted(root: Path, generation: int | None = None) -> Counter[str]:
    return Counter(row["outcome"] for row in ledger(root, generation))


def table(root: Path, generation: int = 0) -> pa.Table:
    return pa.concat_tables(rows_of(root, generation))
