"""The readers that `gristmill bench stream` compares: encoded images, each from its own format, written from the same tars.

Ours, webdataset's, DALI's and others'; those that are not installed raise ImportError when they are asked for. Beside
them stands what none can fall below that copies out of the page cache and checks what it copied. What a training step
takes is a batch, so that is what all are asked for: those that give an image at a time put them into a list, as a
DataLoader would before it collates. What they take if each image is dropped before the next one stands beside it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from ...pipeline.order import Order, Sequential
from ...pipeline.reader import Reader
from ...shards.blob import LocalBlob
from ...shards.dali import write_idx
from ...shards.foreign import index_dataset
from ...shards.index import sample_shard
from ...shards.manifest import Manifest
from ...shards.quarantine import Quarantine

BATCH = 256


@lru_cache
def reader_of(root: Path, order: str, threads: int, quick: bool = False) -> Reader:
    """One reader for one epoch after the other, as in training: shards' rows are read in the first one only."""
    folder = root / "data" / "train"
    if quick:
        folder, tars = root / "quick", folder
        if not folder.exists():
            index_dataset(sorted(str(path) for path in tars.glob("*.tar")), folder, threads=1)
    manifest = Manifest.open(folder)
    kind = Sequential(manifest.counts) if order == "sequential" else Order(manifest.counts, 0, 1, 1 << 22)
    return Reader(manifest, Quarantine(root / "quarantine.jsonl"), order=kind, seed=0, threads=threads)


@lru_cache
def _images_of(reader: Reader) -> Iterator[np.ndarray]:
    """Batch after batch, epoch after epoch: a stream has no short batch at its end."""
    batches = (reader.read(np.arange(first, first + BATCH)).data for first in count(0, BATCH))
    return chain.from_iterable(batches)


def _ours(root: Path, order: str, threads: int = 2, quick: bool = False) -> Iterator[np.ndarray]:
    reader = reader_of(root, order, threads, quick)
    yield from islice(_images_of(reader), reader.library.samples)


@lru_cache
def _places(root: Path) -> tuple[list[tuple[int, int, int, int]], memoryview]:
    """(handle, offset, length, checksum) of every image, in the order of the shuffled reader's batches; room for one."""
    manifest = Manifest.open(root / "data" / "train")
    handles = [os.open(manifest.path(shard), os.O_RDONLY) for shard in range(len(manifest.urls))]
    order, found = Order(manifest.counts, 0, 1, 1 << 22), []
    for first in range(0, manifest.samples, BATCH):
        batch = order.locate(np.arange(first, min(first + BATCH, manifest.samples)))
        for shard, row in sorted(zip(*(part.tolist() for part in batch), strict=True)):
            rows = manifest.rows(shard)
            found.append((handles[shard], *(int(of[row]) for of in (rows.offset, rows.length, rows.crc32))))
    batches = (sum(length for _, _, length, _ in found[a : a + BATCH]) for a in range(0, len(found), BATCH))
    return found, memoryview(bytearray(max(batches)))


def _bare(root: Path, checked: bool) -> Iterator[memoryview]:
    """What no reader of whole batches can fall below: a copy out of the page cache for each image, and its checksum."""
    places, slab = _places(root)
    at = 0
    for number, (handle, offset, length, checksum) in enumerate(places):
        at = 0 if number % BATCH == 0 else at
        image = slab[at : at + length]
        os.preadv(handle, (image,), offset)
        if checked and crc32(image) != checksum:
            raise RuntimeError("the shards changed under the benchmark")
        at += length
        yield image


def _webdataset(root: Path, buffer: int = 0) -> Iterator[bytes]:
    import webdataset

    paths = sorted(str(path) for path in (root / "data" / "train").glob("*.tar"))
    data = webdataset.WebDataset(paths, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    for sample in data.shuffle(buffer) if buffer else data:
        yield sample["jpg"]


def _dali(root: Path) -> Iterator[np.ndarray]:
    from ...pipeline.augment.raw import raw_webdataset

    manifest = Manifest.open(root / "data" / "train")
    paths, indices = [], []
    for shard in range(len(manifest.urls)):
        paths.append(str(manifest.path(shard)))
        indices.append(str(root / f"{shard}.idx"))
        if not os.path.exists(indices[-1]):
            with LocalBlob(paths[-1]) as blob:
                write_idx(Path(indices[-1]), sample_shard(blob))
    yield from raw_webdataset(paths, indices, BATCH, manifest.samples)


def _mosaic(root: Path, shuffle: bool) -> Iterator[bytes]:
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]

    out = root / "mds"
    if not out.exists():
        with MDSWriter(out=str(out), columns={"jpg": "bytes"}, size_limit=1 << 26) as writer:
            for data in _webdataset(root):
                writer.write({"jpg": data})
    for sample in StreamingDataset(local=str(out), batch_size=BATCH, shuffle=shuffle):
        yield sample["jpg"]


def _litdata(root: Path, shuffle: bool, views: bool = False) -> Iterator[bytes | memoryview]:
    """It gives views of a mapped file, of which no byte was read; but for `views` they are brought into memory."""
    from litdata import StreamingDataset  # pyright: ignore[reportMissingImports]
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]

    out = root / "lit"
    if not out.exists():
        out.mkdir()
        writer = BinaryWriter(str(out), chunk_bytes=1 << 26)
        for number, data in enumerate(_webdataset(root)):
            writer[number] = data
        writer.done()
        writer.merge()
    for sample in StreamingDataset(str(out), shuffle=shuffle):
        yield sample if views else bytes(sample)


def _energon(root: Path) -> Iterator[bytes]:
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset  # pyright: ignore[reportMissingImports]
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory  # pyright: ignore[reportMissingImports]

    out = root / "energon"
    if not out.exists():
        out.mkdir()
        for path in sorted((root / "data" / "train").glob("*.tar")):
            shutil.copy(path, out)
        names = sorted(path.name for path in out.glob("*.tar"))
        BaseWebdatasetFactory.prepare_dataset(out, names, split_parts_ratio=[("train", 1.0)], workers=1)
        (out / ".nv-meta" / "dataset.yaml").write_text(
            "sample_type:\n  __module__: megatron.energon\n  __class__: ImageSample\nfield_map:\n  image: jpg\n"
        )
    from megatron.energon import DefaultTaskEncoder  # pyright: ignore[reportMissingImports]

    data = get_train_dataset(
        out,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        auto_decode=False,
        task_encoder=DefaultTaskEncoder(),
    )
    left = Manifest.open(root / "data" / "train").samples  # it has no end of its own
    for batch in get_loader(data):
        yield from batch.image[:left]
        left -= len(batch.image)
        if left <= 0:
            return


ReadAll = Callable[[Path], Iterator[bytes | memoryview | np.ndarray]]  # every encoded image once
READERS: dict[str, ReadAll] = {
    "webdataset": _webdataset,
    "webdataset, buffer of 1000": lambda root: _webdataset(root, 1000),
    "gristmill, shuffled": lambda root: _ours(root, "shuffled"),
    "gristmill, as on disk": lambda root: _ours(root, "sequential"),
    "gristmill, shuffled, 1 thread": lambda root: _ours(root, "shuffled", 1),
    "gristmill, quick index, shuffled": lambda root: _ours(root, "shuffled", 2, quick=True),
    "gristmill, quick index, as on disk": lambda root: _ours(root, "sequential", 2, quick=True),
    "a copy and a checksum, nothing else": lambda root: _bare(root, True),
    "a copy, nothing else": lambda root: _bare(root, False),
    "DALI's webdataset reader": _dali,
    "MosaicML Streaming, shuffled": lambda root: _mosaic(root, True),
    "MosaicML Streaming, as on disk": lambda root: _mosaic(root, False),
    "litData, shuffled": lambda root: _litdata(root, True),
    "litData, as on disk": lambda root: _litdata(root, False),
    "litData, shuffled, mapped but not read": lambda root: _litdata(root, True, views=True),
    "litData, as on disk, mapped but not read": lambda root: _litdata(root, False, views=True),
    "Energon": _energon,
}
# These give one image at a time; all others give whole batches, and have no other way.
SINGLY = ("webdataset", "MosaicML", "litData")


def read_all(reader: ReadAll, root: Path, held: bool = False) -> tuple[int, int]:
    """One pass: images and bytes read. Each image is dropped at once, or `held` until its batch is full."""
    number = total = 0
    batch = []
    for image in reader(root):
        number, total = number + 1, total + len(image)
        if held:
            batch.append(image)
            if len(batch) == BATCH:
                batch = []
    return number, total
