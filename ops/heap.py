"""What glibc does with freed memory: give it back to the system, or keep it for the next step.

glibc serves large requests from pages of their own, but raises what it calls large, up to 32 MB, as such requests are
freed; from then on activations share one heap with what outlives them (man 3 mallopt, M_MMAP_THRESHOLD), whose end goes back
to the system whenever it is free (M_TRIM_THRESHOLD), to be asked for again in the next step. New pages are not cheap: a
Mugs step of ViT-S/16 in bf16 met 30,000 of them, and on a virtual machine whose host has them to find as well they took up to
a fifth of its time. So a run on a CPU keeps what it has once had; the peak is the same, for all of a step is needed in each.
With `engine.recompute`, where somebody has asked for memory at the cost of time, large tensors get pages of their own instead,
given back as they are freed: no holes stay, and the peak is 240 MB lower, of 2,660.
"""

from __future__ import annotations

import ctypes

LARGE = 1 << 20  # bytes from which requests get pages of their own where memory is dearer than time
HUGE = 1 << 30  # and where it is not; above it, nothing is worth keeping for long
_TRIM, _MMAP, _MMAP_MAX = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of malloc.h


def keep_heap(kept: bool) -> bool:
    """From now on, keep freed tensors' memory for those to come, or give large ones back at once.

    False where the C library is not glibc.
    """
    if kept:
        # Older releases refuse a threshold that high; there no request gets pages of its own.
        return bool((_set(_MMAP, HUGE) or _set(_MMAP_MAX, 0)) and _set(_TRIM, -1))
    own = 1 << 16  # glibc's, which may have been changed above
    return bool(_set(_MMAP_MAX, own) and _set(_MMAP, LARGE) and _set(_TRIM, LARGE))


def _set(what: int, value: int) -> int:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return 0 if mallopt is None else mallopt(what, value)
