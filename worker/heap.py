"""How this process's heap treats memory that comes and goes: it keeps it.

ZeroMQ allocates each frame that it receives, and frees it once it is copied. By default the C
library gives so much back to the kernel, which zeroes each page anew when the next frame comes.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_SETTINGS = {
    _MMAP_THRESHOLD: 32 << 20,  # what is smaller comes from the heap; the most that glibc allows
    _TRIM_THRESHOLD: 256 << 20,  # so much may lie free at its end: more than a peer's window
    _TOP_PAD: 16 << 20,  # it grows by as much
}


def keep_freed_memory() -> bool:
    """Before there are threads. False where the C library is not glibc, and nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, size) == 1 for option, size in _SETTINGS.items())
