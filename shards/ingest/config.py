"""What an ingest is asked to do. All that decides on its output is recorded, and a killed one goes on with nothing else."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, Field, model_validator

from .fetch_config import FetchConfig
from .refine import RefineConfig

MAX_SHARD_BYTES = 3_000_000_000
UNIT = 1000  # inputs that one worker takes up at a time


class IngestConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of an ingest; its sources and its place are told apart from it."""

    shard_samples: int = Field(default=10_000, ge=1, description="samples in a shard, at most")
    shard_bytes: int = Field(
        default=256 << 20, ge=1, le=MAX_SHARD_BYTES, description="a shard is closed at so many bytes"
    )
    holdout: float = Field(
        default=0.0, ge=0, lt=1, description="share kept apart for probes, chosen by (seed, content)"
    )
    seed: int = Field(default=0, description="of the holdout")
    near: int | None = Field(
        default=None, ge=0, le=31, description="bits by which near duplicates differ at most; None: exact only"
    )
    against: tuple[str, ...] = Field(
        default=(), description="sources whose images count as seen already, and are not taken"
    )
    keep: tuple[str, ...] = Field(
        default=(), description="columns or fields of the source that go into each sample's json"
    )
    image_column: str | None = Field(default=None, description="column of a Parquet source that holds the images")
    url_column: str | None = Field(default=None, description="column of a list that holds the urls")
    filter: str | None = Field(default=None, description="module:name of a user's filter (hook.py)")
    unit: int = Field(default=UNIT, ge=1, le=100_000, description="inputs that one worker takes up at a time")
    refine: RefineConfig = RefineConfig()
    fetch: FetchConfig = FetchConfig()

    @model_validator(mode="after")
    def _possible(self) -> IngestConfig:
        if self.filter is not None and not all(self.filter.partition(":")):
            raise ValueError(f"filter {self.filter!r} is no name: write module:function or module:Class")
        return self

    def output(self) -> dict[str, Any]:
        """What decides on the output: all but how urls are fetched and how work is cut up."""
        found = json.loads(self.model_dump_json())
        del found["fetch"]
        return found
