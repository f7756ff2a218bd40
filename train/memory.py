"""Memory of a process that trains on a CPU."""

from __future__ import annotations

import ctypes

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed for the next allocation, as GPU allocators do; False where there is no glibc.

    By default the large tensors of every step are given back to the system and come again page by page, each filled
    with zeros first. The process keeps its largest size until it ends. No bit depends on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(option, _MOST) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])
