"""Ingest: sources of any kind and size become shards, a manifest, and a ledger in which every input is accounted for."""

from .candidate import PASSING, Outcome
from .config import IngestConfig
from .errors import IngestError
from .fetch_config import FetchConfig
from .folder import ingest_folder
from .hook import Offered
from .ledger import outcomes
from .refine import RefineConfig
from .report import IngestReport, IngestStats
from .run import ingest

__all__ = [
    "PASSING",
    "FetchConfig",
    "IngestConfig",
    "IngestError",
    "IngestReport",
    "IngestStats",
    "Offered",
    "Outcome",
    "RefineConfig",
    "ingest",
    "ingest_folder",
    "outcomes",
]
