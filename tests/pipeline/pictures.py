"""Small shards of real JPEGs and an executor in plain Pillow, for the tests of the loader."""

import io
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from gristmill.pipeline.augment import DecodeError
from gristmill.pipeline.draws import COLUMNS
from gristmill.pipeline.loader import Loader
from gristmill.pipeline.philox import SUBSTITUTE, integers
from gristmill.pipeline.views import StreamConfig, View
from gristmill.shards.manifest import Manifest, Rows
from gristmill.shards.writer import write_manifest
from PIL import Image, ImageOps

PER_SHARD, SHARDS = 6, 4
N = PER_SHARD * SHARDS
VIEWS = [View(name="global", count=2, size=16), View(name="local", count=3, size=8, scale=(0.05, 0.25))]
CONFIG = StreamConfig(seed=7, lanes=3, window=8, reader_threads=2, prefetch=2, damage_bound=0.5)
X0, FLIP = COLUMNS.index("x0"), COLUMNS.index("flip")


def picture(index):
    noise = np.random.default_rng(index).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((40 + index % 5, 32)).save(out, "JPEG", quality=90)
    return out.getvalue()


PICTURES = [picture(i) for i in range(N)]


def write_data(root, deep=True):
    root.mkdir(parents=True)
    shards = []
    for shard in range(SHARDS):
        index = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        path = root / f"{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in index:
                info = tarfile.TarInfo(f"k{i:03d}.jpg")
                info.size = len(PICTURES[i])
                tar.addfile(info, io.BytesIO(PICTURES[i]))
        with tarfile.open(path) as tar:
            offsets = [member.offset_data for member in tar.getmembers()]
        rows = Rows(
            keys=[f"k{i:03d}" for i in index],
            offset=np.array(offsets, np.int64),
            length=np.array([len(PICTURES[i]) for i in index], np.int64),
            crc32=np.array([zlib.crc32(PICTURES[i]) for i in index], np.uint32),
            width=np.array([40 + i % 5 for i in index], np.int32),
            height=np.full(PER_SHARD, 32, np.int32),
            format=["jpg"] * PER_SHARD,
            deep=deep,
        )
        shards.append((path.name, path.stat().st_size, rows))
    write_manifest(root, shards)
    return Manifest.open(root)


class PlainExecutor:
    """Crop, resize and flip with Pillow; remembers who called it."""

    def __init__(self, views=VIEWS):
        self.views, self.threads, self.runs = views, set(), 0

    def run(self, data, draws):
        self.threads.add(threading.get_ident())
        self.runs += 1
        images, bad = [], []
        for slot, encoded in enumerate(data):
            try:
                images.append(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")))
            except OSError:
                bad.append(slot)
        if bad:
            raise DecodeError(bad)
        result, v = {}, 0
        for view in self.views:
            out = np.empty((len(data), view.count, 3, view.size, view.size), np.float32)
            for slot, image in enumerate(images):
                for copy in range(view.count):
                    row = draws.params[slot, v + copy]
                    crop = image.resize((view.size, view.size), Image.Resampling.BILINEAR, box=tuple(row[X0 : X0 + 4]))
                    pixels = np.asarray(crop, np.float32)[:, :: -1 if row[FLIP] else 1]
                    out[slot, copy] = pixels.transpose(2, 0, 1) / 255
            result[view.name] = torch.from_numpy(out)
            v += view.count
        return result


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gristmill")]


def open_files():
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(entry.readlink()))
        except FileNotFoundError:  # the descriptor of this very listing, or one that is just being closed
            continue
    return names


def load(manifest, quarantine, **options):
    options = {"batch": 4, "executor": PlainExecutor(), "stall": 60.0} | options
    return Loader(manifest, VIEWS, options.pop("config", CONFIG), quarantine=quarantine, **options)


def collect(loader, batches):
    """Keys, ids, views and geometry of so many batches, end to end; closes the loader."""
    with loader:
        got = [next(loader) for _ in range(batches)]
    tensors = {
        f"{kind}.{view.name}": torch.cat([getattr(batch, kind)[view.name] for batch in got])
        for kind in ("views", "geometry")
        for view in VIEWS
    }
    return [key for batch in got for key in batch.keys], np.concatenate([batch.ids for batch in got]), tensors


def assert_equal(a, b):
    assert a[0] == b[0]
    assert np.array_equal(a[1], b[1])
    for name in a[2]:
        assert torch.equal(a[2][name], b[2][name]), name


def part(stream, start, stop):
    return stream[0][start:stop], stream[1][start:stop], {k: v[start:stop] for k, v in stream[2].items()}


def spoil(manifest, index, offset=0, data=None):
    """Overwrite bytes of a sample; by default everything behind its image header."""
    shard, row = divmod(index, PER_SHARD)
    if data is None:
        offset = PICTURES[index].index(b"\xff\xda")
        data = b"\0" * (len(PICTURES[index]) - offset)
    with manifest.path(shard).open("r+b") as file:
        file.seek(int(manifest.rows(shard).offset[row]) + offset)
        file.write(data)


def first_healthy(position, bad):
    draws = integers(CONFIG.seed, [position], SUBSTITUTE, 100, N)[0].tolist()
    return next(i for i in draws if i not in bad)


class Gated(PlainExecutor):
    """Runs once for each time that its gate is released."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def run(self, data, draws):
        self.entered.release()
        assert self.gate.acquire(timeout=60)
        return super().run(data, draws)
