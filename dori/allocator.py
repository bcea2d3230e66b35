"""Keep freed memory within the process.

glibc gives every large block back to the kernel when it is freed, so each intermediate tensor of a network is mapped
and cleared anew: a fifth to a third of the time of the testbed's U-Net on a CPU (`python benchmarks/speed.py`).
"""

import ctypes

# malloc.h: one arena for all threads, as only it can grow to any size; no block of its own mapping; nothing given back.
SETTINGS = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}


def keep_freed_memory() -> bool:
    """Set glibc's allocator so for the rest of the process; False, and nothing changed, with another C library."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) for name, value in SETTINGS.values())
