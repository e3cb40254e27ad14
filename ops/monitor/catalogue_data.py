"""Metrics of the data path, in the order of flow: storage and cache, reader, encoded buffer, augmentation, ready buffer."""

from .row import Group, Row

READY = (("buffer", "ready"),)  # batches, augmented, between the loader and the step
ENCODED = (("buffer", "encoded"),)  # samples as they lie in the shards, between reader and augmentation
STARVED = "Time for which the consumer waited on an empty buffer: the part before it is too slow."
BLOCKED = "Time for which the producer waited on a full buffer: the part after it is too slow."
DEPTH, CAPACITY = "Batches that wait in the buffer.", "Batches that it can hold."
DWELL = "Time that batches lay in it."
FETCHED = "Bytes read from shards, by where they lay: a local disk, the node's cache, or behind a network."
COUNTED = "Times that a batch found a remote shard that it reads in the node's cache (only with one)."

STORAGE = Group(
    "Storage and cache",
    "`pipeline/fetch.py`, `shards/client.py`, `shards/cache.py`",
    (
        Row("storage/local_bytes", "total", "gristmill_fetched_bytes_total", FETCHED, (("source", "local"),)),
        Row("storage/cached_bytes", "total", "gristmill_fetched_bytes_total", FETCHED, (("source", "cache"),)),
        Row("storage/remote_bytes", "total", "gristmill_fetched_bytes_total", FETCHED, (("source", "remote"),)),
        Row(
            "storage/requests",
            "total",
            "gristmill_storage_requests_total",
            "Requests to remote storage (only where shards lie behind a network).",
            late=True,
        ),
        Row(
            "storage/retries/{retry}",
            "total",
            "gristmill_storage_retries_total",
            "Requests to remote storage that were tried again, by kind of trouble (as above).",
            late=True,
        ),
        Row(
            "storage/throttled_seconds",
            "total",
            "gristmill_storage_throttled_seconds_total",
            "Time that reads waited for their turn at a host, which may have asked to be left alone (as above).",
            late=True,
        ),
        Row(
            "storage/refetched",
            "total",
            "gristmill_refetched_samples_total",
            "Samples whose bytes were wrong at first and right when they were fetched again.",
        ),
        Row("cache/hits", "total", "gristmill_cache_hits_total", COUNTED, late=True),
        Row("cache/misses", "total", "gristmill_cache_misses_total", COUNTED.replace("found", "missed"), late=True),
        Row(
            "cache/fetched_bytes",
            "total",
            "gristmill_cache_fetched_bytes_total",
            "Bytes that this process brought into the cache.",
            late=True,
        ),
        Row(
            "cache/evicted_bytes",
            "total",
            "gristmill_cache_evicted_bytes_total",
            "Bytes that this process removed from the cache to make room.",
            late=True,
        ),
        Row("cache/size", "gauge", "gristmill_cache_size_bytes", "What the cache took when room was last made in it."),
        Row(
            "cache/limit", "gauge", "gristmill_cache_limit_bytes", "What the cache may take, over all ranks of a node."
        ),
    ),
)

READER = Group(
    "Reader",
    "`pipeline/loader.py`",
    (
        Row("loader/samples", "total", "gristmill_read_samples_total", "Samples delivered by the reader."),
        Row("loader/bytes", "total", "gristmill_read_bytes_total", "Bytes of images read from shards."),
        Row("loader/read_seconds", "total", "gristmill_read_seconds_total", "Time spent reading shards."),
        Row(
            "loader/storage_seconds",
            "total",
            "gristmill_storage_seconds_total",
            "Part of reading spent in the storage.",
        ),
        Row(
            "loader/augment_seconds", "total", "gristmill_augment_seconds_total", "Time spent decoding and augmenting."
        ),
        Row(
            "loader/removed",
            "total",
            "gristmill_removed_samples_total",
            "Samples removed on request that were replaced.",
        ),
        Row(
            "loader/substituted", "total", "gristmill_substituted_samples_total", "Damaged samples that were replaced."
        ),
        Row("loader/quarantined", "gauge", "gristmill_quarantined_samples", "Samples in the run's quarantine."),
    ),
)

BUFFERS = Group(
    "Buffers",
    "`pipeline/loader.py`: encoded lies between reader and augmentation, ready between augmentation and the step",
    (
        Row("loader/encoded_depth", "gauge", "gristmill_buffer_depth_batches", DEPTH, ENCODED),
        Row("loader/ready_depth", "gauge", "gristmill_buffer_depth_batches", DEPTH, READY),
        Row("loader/encoded_capacity", "gauge", "gristmill_buffer_capacity_batches", CAPACITY, ENCODED),
        Row("loader/ready_capacity", "gauge", "gristmill_buffer_capacity_batches", CAPACITY, READY),
        Row("loader/encoded_dwell_seconds", "total", "gristmill_buffer_dwell_seconds_total", DWELL, ENCODED),
        Row("loader/dwell_seconds", "total", "gristmill_buffer_dwell_seconds_total", DWELL, READY),
        Row("loader/hungry_seconds", "total", "gristmill_buffer_starved_seconds_total", STARVED, ENCODED),
        Row("loader/starved_seconds", "total", "gristmill_buffer_starved_seconds_total", STARVED, READY),
        Row("loader/encoded_blocked_seconds", "total", "gristmill_buffer_blocked_seconds_total", BLOCKED, ENCODED),
        Row("loader/blocked_seconds", "total", "gristmill_buffer_blocked_seconds_total", BLOCKED, READY),
    ),
)
