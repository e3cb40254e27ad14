"""Data at rest: WebDataset tars and the manifest that says what lies where. Knows nothing of tensors.

`ingest` makes a data set out of a folder of images, `Manifest` reads one, `verify` compares the two. `index_shard` finds
the samples of any WebDataset tar. `Labels` and `Quarantine` are what a data set's probes and its reader keep beside it.
"""

from .engine import IngestError, IngestReport, ingest
from .errors import GristmillError
from .images import CheckedImage, ImageError, check_image
from .index import ShardError, index_shard
from .labels import Labels, LabelsError, write_labels
from .manifest import Manifest, ManifestError, Rows
from .quarantine import Quarantine, QuarantineError
from .sources import Candidate, SourceError, find_images
from .tars import TarsError
from .verify import Finding, verify
from .writer import ManifestWriter, write_manifest

__all__ = [
    "Candidate",
    "CheckedImage",
    "Finding",
    "GristmillError",
    "ImageError",
    "IngestError",
    "IngestReport",
    "Labels",
    "LabelsError",
    "Manifest",
    "ManifestError",
    "ManifestWriter",
    "Quarantine",
    "QuarantineError",
    "Rows",
    "ShardError",
    "SourceError",
    "TarsError",
    "check_image",
    "find_images",
    "index_shard",
    "ingest",
    "verify",
    "write_labels",
    "write_manifest",
]
