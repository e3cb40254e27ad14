"""Data at rest: WebDataset tars and the manifest that says what lies where. Knows nothing of tensors.

`ingest` makes a data set out of a folder of images, `Manifest` reads one, `verify` compares the two. `index_shard` finds
the samples of any WebDataset tar, `index_dataset` makes their manifest, `open_manifest` opens one behind a url. `Labels`
and `Quarantine` are what a data set's probes and its reader keep beside it, `Tombstones` what was removed from it.
"""

from .blob import Blob, LocalBlob
from .cache import Cache, CacheError
from .errors import GristmillError
from .foreign import index_dataset
from .images import CheckedImage, ImageError, check_image
from .index import ShardError, index_shard
from .labels import Labels, LabelsError, write_labels
from .manifest import Manifest, ManifestError, Rows
from .mirror import open_manifest
from .quarantine import Quarantine, QuarantineError
from .remote import open_blob
from .retry import RetryPolicy, StorageError
from .tombstones import TombstoneError, Tombstones
from .verify import Finding, verify
from .writer import ManifestWriter, write_manifest

__all__ = [
    "Blob",
    "Cache",
    "CacheError",
    "CheckedImage",
    "Finding",
    "GristmillError",
    "ImageError",
    "Labels",
    "LabelsError",
    "LocalBlob",
    "Manifest",
    "ManifestError",
    "ManifestWriter",
    "Quarantine",
    "QuarantineError",
    "RetryPolicy",
    "Rows",
    "ShardError",
    "StorageError",
    "TombstoneError",
    "Tombstones",
    "check_image",
    "index_dataset",
    "index_shard",
    "open_blob",
    "open_manifest",
    "verify",
    "write_labels",
    "write_manifest",
]
