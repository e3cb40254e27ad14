"""What makes crops: DALI on GPUs, compiled loops on CPUs. Both are imported and do a little work."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from .finding import Asked, Finding, said

LOOPS = (
    "gristmill.pipeline.augment.kernels", "gristmill.pipeline.augment.strong_loops", "gristmill.pipeline.mask_loops",
    "gristmill.pipeline.native", "gristmill.shards.ingest.search",
)  # fmt: skip


def check_dali(asked: Asked) -> Finding:
    """Decode and resize two small pictures in DALI, on the GPU where there is one."""
    why = "it decodes and crops on GPUs (stream.augment=dali); CPUs have loops of their own"
    cards = bool(list(Path("/dev").glob("nvidia[0-9]*")))
    try:
        from ...pipeline.augment.trial import decode_two

        release, seconds = decode_two("mixed" if cards else "cpu", 0 if cards else None)
    except Exception as error:
        remedy = 'pip install --force-reinstall "nvidia-dali-cuda130==2.4.0" "nvidia-nvimgcodec-cu13>=0.9,<0.10"'
        remedy += ", and look at the findings on the driver" if cards else ", or go on without it: CPUs do not use it"
        return Finding("dali", "bad" if cards else "warn", f"no pipeline runs: {said(error)}", why, remedy)
    found = f"{release}: pictures decoded and resized on the {'GPU' if cards else 'CPU'}"
    return Finding("dali", "ok", found, why, "", {"release": release, "seconds": seconds})


def check_loops(asked: Asked, modules: Sequence[str] = LOOPS) -> Finding:
    """Import the compiled loops, and see where their machine code is kept."""
    why = "they read, crop and mask on the CPU; where they cannot be kept, every process compiles them for itself, at each start"
    begin = time.perf_counter()
    try:
        functions = [f for name in modules for f in vars(importlib.import_module(name)).values() if _compiled(f)]
    except Exception as error:
        remedy = 'pip install --force-reinstall "numba==0.68.1" "llvmlite==0.50.0"'
        return Finding("numba", "bad", f"loops do not compile: {said(error)}", why, remedy)
    seconds = time.perf_counter() - begin
    folders = sorted({str(f._cache.cache_path) for f in functions if getattr(f._cache, "cache_path", None)})
    kept = sum(bool(getattr(f._cache, "cache_path", None)) for f in functions)
    loaded = sum(sum(f.stats.cache_hits.values()) > 0 for f in functions)
    figures = {"loops": len(functions), "kept": kept, "loaded": loaded, "seconds": seconds, "folders": folders}
    found = f"{len(functions)} loops ready in {seconds:.2g} s, {loaded} of them compiled before"
    if kept < len(functions):
        remedy = "set NUMBA_CACHE_DIR to a folder that can be written and stays, in the environment of every run"
        return Finding("numba", "warn", f"{found}; {len(functions) - kept} cannot be kept", why, remedy, figures)
    lost = [folder for folder in folders if not os.access(folder, os.W_OK)]
    if lost and loaded < len(functions):
        remedy = f"make {lost[0]} writable, or set NUMBA_CACHE_DIR to a folder that is"
        return Finding("numba", "warn", f"{found}; {lost[0]} cannot be written", why, remedy, figures)
    return Finding("numba", "ok", f"{found}; kept in {len(folders)} folders", why, "", figures)


def _compiled(thing: object) -> bool:
    """Whether this is a function with machine code for given types; parts that are compiled into others have none."""
    return hasattr(thing, "_cache") and hasattr(thing, "stats") and bool(getattr(thing, "signatures", ()))
