"""The index of a shard against Python's `tarfile`, in one run: the same tars, in turn, the best of several rounds.

The tars have real headers and holes for data: an index reads no data, and neither does `tarfile` where it can seek. Both
find the page cache warm, so this is the cost of the work, not of a disk. `tarfile` does the same job in two measures:
listing the members alone, and with their names split and grouped by webdataset's rule. CPU time is what counts on a
machine that others use too; wall time stands beside it.

    python -m gristmill.ops.bench.index [--samples N] [--rounds N] [--json]
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import click

from ...shards.headers import padded
from ...shards.index import sample_shard

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # how webdataset splits a name

# What people have: name, tar's format, the members of a sample with their bytes, whether times have fractions.
LAYOUTS = {
    "jpg + json, 40 kB": (tarfile.USTAR_FORMAT, (("jpg", 40_000), ("json", 300)), False),
    "jpg alone, 110 kB": (tarfile.USTAR_FORMAT, (("jpg", 110_000),), False),
    "jpg + cls, 1.5 kB": (tarfile.USTAR_FORMAT, (("jpg", 1_500), ("cls", 3)), False),
    "img2dataset, 30 kB": (tarfile.PAX_FORMAT, (("jpg", 30_000), ("txt", 80), ("json", 400)), True),
}


@dataclass(frozen=True)
class Timing:
    """Microseconds for each member: ours, `tarfile` listing, `tarfile` grouping as well."""

    layout: str
    members: int
    ours_cpu: float
    ours_wall: float
    listing_cpu: float
    listing_wall: float
    grouping_cpu: float
    grouping_wall: float

    @property
    def ratio(self) -> float:
        """CPU time of `tarfile` doing the same job over ours."""
        return self.grouping_cpu / self.ours_cpu


def make_shard(path: Path, layout: str, samples: int) -> int:
    """Write a tar whose data are holes. Returns how many members it has."""
    form, parts, fractions = LAYOUTS[layout]
    offset = 0
    with path.open("wb") as file:
        for number in range(samples):
            for suffix, size in parts:
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = size + number % 97
                member.mtime = 1.7e9 + number * (0.0137 if fractions else 1)
                member.uname = member.gname = "bigdata"
                header = member.tobuf(form)
                os.pwrite(file.fileno(), header, offset)
                offset += len(header) + padded(member.size)
        os.ftruncate(file.fileno(), offset + 10_240)
    return samples * len(parts)


def _listing(path: Path) -> int:
    with tarfile.open(path) as file:
        return len([(member.name, member.offset_data, member.size) for member in file if member.isreg()])


def _grouping(path: Path) -> int:
    with tarfile.open(path) as file:
        named = ((_NAME.match(member.name), member) for member in file if member.isreg())
        split = ((match[1], match[2].lower(), member.offset_data, member.size) for match, member in named if match)
        return len([(key, list(group)) for key, group in groupby(split, key=lambda part: part[0])])


def _ours(path: Path) -> int:
    return len(sample_shard(path).members)


def measure(layout: str, samples: int, rounds: int) -> Timing:
    """Time the three on one shard, in turn, and keep the best of each."""
    works: dict[str, Callable[[Path], int]] = {"ours": _ours, "listing": _listing, "grouping": _grouping}
    best = {f"{name}_{kind}": float("inf") for name in works for kind in ("cpu", "wall")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        members = make_shard(path, layout, samples)
        _ours(path)  # brings the headers into the page cache
        for _ in range(rounds):
            for name, work in works.items():
                cpu, wall = time.process_time(), time.perf_counter()
                work(path)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                best[f"{name}_cpu"] = min(best[f"{name}_cpu"], cpu * 1e6 / members)
                best[f"{name}_wall"] = min(best[f"{name}_wall"], wall * 1e6 / members)
    return Timing(layout, members, **best)


@click.command()
@click.option("--samples", default=10_000, show_default=True, help="Samples in each shard.")
@click.option("--rounds", default=5, show_default=True, help="Of which the best counts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(samples: int, rounds: int, as_json: bool) -> None:
    """Compare the index with tarfile on four layouts of shards."""
    timings = [measure(layout, samples, rounds) for layout in LAYOUTS]
    if as_json:
        click.echo(json.dumps([{**asdict(timing), "ratio": timing.ratio} for timing in timings]))
        return
    click.echo("microseconds a member, CPU (wall)            index   tarfile lists   and groups   ratio (CPU)")
    for t in timings:
        click.echo(
            f"{t.layout:<20}{t.members:>8} members  {t.ours_cpu:6.2f} ({t.ours_wall:5.2f})  "
            f"{t.listing_cpu:6.1f} ({t.listing_wall:5.1f})  {t.grouping_cpu:6.1f} ({t.grouping_wall:5.1f})  "
            f"{t.ratio:5.1f}x"
        )


if __name__ == "__main__":
    main()
