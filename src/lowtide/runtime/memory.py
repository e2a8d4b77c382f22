"""Memory of this process: how much there is, giving back what is unused, and reading ahead what will be used."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POPULATE_READ = 22
"""madvise: read pages in and map them, Linux 5.14 (linux/mman.h)."""


def peak_rss_bytes() -> int:
    """Most resident memory this process has had, in bytes.

    Linux tells it in VmHWM. getrusage is the way elsewhere; on Linux it would count the parent's
    memory from before exec.
    """
    if peak := _status("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes, mapped files included; 0 where Linux does not tell it."""
    return _status("VmRSS")


def _status(name: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def give_back_unused() -> None:
    """Hand freed memory that the C library has kept (glibc) back to the system; elsewhere nothing happens."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pages_of(arrays: Iterable[NDArray[Any]]) -> list[tuple[int, int]]:
    """Memory pages that contiguous arrays lie on: (address, bytes), ascending, those that touch put together."""
    page = mmap.PAGESIZE
    spans = sorted(
        (a.ctypes.data // page * page, -(-(a.ctypes.data + a.nbytes) // page) * page) for a in arrays if a.nbytes
    )
    joined: list[list[int]] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return [(start, stop - start) for start, stop in joined]


def read_pages(arrays: Iterable[NDArray[Any]]) -> int:
    """Read the pages of memory-mapped arrays into memory, and no others; returns their bytes.

    Linux maps them in one call for each run of pages. Elsewhere, and on older kernels, a byte of each is read.
    """
    arrays = list(arrays)
    advise = getattr(_libc(), "madvise", None) if sys.platform == "linux" else None
    total = 0
    for address, size in pages_of(arrays):
        total += size
        if advise is not None and advise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_READ) == 0:
            continue
        advise = None
    if advise is None:
        for array in arrays:
            np.add.reduce(array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE], dtype=np.uint64)
    return total


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library; None where it cannot be reached this way (Windows)."""
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None
