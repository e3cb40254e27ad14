"""`gristmill ingest`. Imports happen when it runs."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from .commands import example, main

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Bytes(click.ParamType):
    """A number of bytes: 250000000, 250MB, 256MiB."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size: write 250MB, 256MiB or a number of bytes", param, ctx)
        return int(float(found[1]) * _UNITS[found[2]])


class Near(click.ParamType):
    """0 to 31 bits, or off."""

    name = "bits|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        text = str(value).strip().lower()
        if text == "off":
            return None
        if not text.isdigit() or int(text) > 31:
            self.fail(f"{value!r} is no distance: write 0 to 31 bits, or off", param, ctx)
        return int(text)


@main.command(
    epilog=example(
        "gristmill ingest ~/Pictures --out shards",
        "gristmill ingest urls.parquet --out crawl --min-side 200 --max-aspect 3",
        "gristmill ingest s3://bucket/laion/ --out s3://bucket/clean --work /scratch/clean --engine ray",
        "gristmill ingest more/ --out crawl --append",
        "gristmill ingest --out crawl --retry-failed",
    )
)
@click.argument("sources", nargs=-1, metavar="[SRC]...")
@click.option(
    "--out", required=True, metavar="DEST", help="Folder, s3:// or gs://; `train` (and `probe`) are made inside."
)
@click.option("--work", type=click.Path(), help="Local folder for the work, where DEST is remote.")
@click.option("--append", is_flag=True, help="Add SRC to a data set that is published already.")
@click.option(
    "--retry-failed", is_flag=True, help="Take up what failed for reasons that may have passed, and nothing else."
)
@click.option("--restart", is_flag=True, help="Throw away what an unfinished ingest has done.")
@click.option(
    "--shard-samples", type=click.IntRange(1), default=10_000, show_default=True, help="Images in a shard, at most."
)
@click.option(
    "--shard-bytes", type=Bytes(), default="256MiB", show_default=True, help="Close a shard at so many bytes."
)
@click.option(
    "--holdout", type=click.FloatRange(0, 0.9), default=0.0, show_default=True, help="Share kept apart for probes."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the holdout.")
@click.option(
    "--min-side", type=click.IntRange(0), default=0, show_default=True, help="Pixels of the shorter side, at least."
)
@click.option("--max-pixels", type=click.IntRange(1), help="Pixels, at most; refused before decoding.")
@click.option("--max-aspect", type=click.FloatRange(1), help="Longer over shorter side, at most.")
@click.option("--min-bytes", type=Bytes(), help="Bytes of a file, at least.")
@click.option("--max-bytes", type=Bytes(), help="Bytes of a file, at most; a download stops there.")
@click.option("--resize", type=click.IntRange(16), help="Make the shorter side so many pixels where it is longer.")
@click.option("--reencode", type=click.Choice(["jpg"]), help="Store all images in this format.")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEGs that are written.")
@click.option(
    "--near",
    type=Near(),
    default="31",
    show_default=True,
    help="Leave out near duplicates, fingerprints up to so many of 256 bits apart; off: equal bytes alone.",
)
@click.option(
    "--dedup-against", "against", multiple=True, metavar="SRC", help="Leave out what this data set or source holds too."
)
@click.option("--filter", "filter_", metavar="MODULE:NAME", help="Your own filter or score (docs/ingest.md).")
@click.option(
    "--keep", multiple=True, metavar="COLUMN", help="Column or field of SRC that goes into each sample's json."
)
@click.option("--image-column", metavar="COLUMN", help="Of a Parquet source (default: the one that holds images).")
@click.option("--url-column", metavar="COLUMN", help="Of a list of urls (default: the one that looks like it).")
@click.option("--per-host", type=click.IntRange(1), help="Requests to one host at a time.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests of one worker at a time.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds for one try of a download.")
@click.option("--tries", type=click.IntRange(1), help="Tries of one download.")
@click.option("--allow-private", is_flag=True, help="Fetch from private and loopback addresses too.")
@click.option("--ignore-robots", is_flag=True, help="Take images whose server says noai or noimageai.")
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Who does the work."
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes (default: one a core, two for urls) or Ray tasks at a time."
)
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), help="Serve Prometheus metrics on this port of loopback."
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def ingest(sources: tuple[str, ...], out: str, as_json: bool, metrics_port: int | None, **given: Any) -> None:
    """Images from anywhere become WebDataset shards with a manifest, and a ledger of what became of every input.

    SRC is a folder, a tar or WebDataset, Parquet with images, or a list of urls (Parquet, CSV, TSV, JSON lines, text; .gz
    too); local, s3://, gs:// or http(s)://. Every image is checked by decoding it, and stored with its own bytes where it
    can be. Interrupted or killed, the same command goes on.
    """
    from pydantic import ValidationError

    from ..shards.ingest import FetchConfig, IngestConfig, IngestError, RefineConfig
    from .ingest import run_ingest

    def told(**names: str) -> dict[str, Any]:
        return {field: given[name] for field, name in names.items() if given[name] is not None}

    refine = told(min_side="min_side", max_pixels="max_pixels", max_aspect="max_aspect", min_bytes="min_bytes",
                  max_bytes="max_bytes", resize="resize", reencode="reencode", quality="quality")  # fmt: skip
    fetch = told(per_host="per_host", in_flight="in_flight", timeout="timeout", tries="tries", max_bytes="max_bytes")
    if given["append"] and given["retry_failed"]:
        raise click.UsageError(
            "--append brings sources and --retry-failed takes up old ones: give one of them at a time"
        )
    try:
        config = IngestConfig(
            shard_samples=given["shard_samples"],
            shard_bytes=given["shard_bytes"],
            holdout=given["holdout"],
            seed=given["seed"],
            near=given["near"],
            against=given["against"],
            keep=given["keep"],
            image_column=given["image_column"],
            url_column=given["url_column"],
            filter=given["filter_"],
            refine=RefineConfig(**refine),
            fetch=FetchConfig(**fetch, allow_private=given["allow_private"], respect_robots=not given["ignore_robots"]),
        )
    except ValidationError as error:
        raise IngestError(
            "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ")
                for e in error.errors()
            )
        ) from error
    how = {name: given[name] for name in ("append", "retry_failed", "restart", "engine", "workers", "work")}
    sys.exit(run_ingest(sources, out, config, as_json=as_json, metrics_port=metrics_port, **how))
