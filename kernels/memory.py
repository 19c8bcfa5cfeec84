"""Memory for large gradients: on huge pages, and used again by the next gradient of its size.

(a) New memory is the hidden cost of a backward on the CPU: the operating system clears each page at
    its first write. For a gradient of 262 MB (2048 x 32000 float32) on 4 KB pages a backward takes
    70 to 85 ms; in memory that was written before, 10 to 15.
(b) Huge pages, requested before the first write, bring it to 28 ms: 125 page faults, not 64000.
(c) So a gradient's memory is kept when the gradient dies. The next gradient of its size, one
    training step later, takes it without a page fault. It is kept as MADV_FREE: the system may take
    the pages whenever anyone needs memory. Until then they count in the process's resident size. At
    most three buffers are kept. NEGLOG_KEEP_MEMORY=0 frees each one at once instead.
(d) Memory that must be its framework's own, so that a user can resize it, is not kept. It may have
    huge pages: a backward of 262 MB then takes 41 ms, for 17 in kept memory and 131 on 4 KB pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from functools import cache
from typing import Any

HUGE_PAGE = 2 << 20
# Smaller gradients come from the allocator, whose pages were mostly written before.
LARGE = 4 << 20
# The scores that a contrastive loss keeps, and the gradients of both its sides.
MAX_KEPT = 3


class _KeptBuffers:
    """The buffers that are kept for the next gradients, the oldest first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection under the lock may add a buffer
        self._buffers: list[mmap.mmap] = []

    def pop(self, nbytes: int) -> mmap.mmap | None:
        """One of at least nbytes, of which at least half will be used; None if there is none."""
        with self._lock:
            fitting = [buffer for buffer in self._buffers if nbytes <= len(buffer) <= 2 * nbytes]
            if fitting:
                best = min(reversed(fitting), key=len)  # of one size, the last that was written
                self._buffers = [buffer for buffer in self._buffers if buffer is not best]
                return best
            # Sizes have changed, so the oldest is of a size that is no longer used.
            del self._buffers[:1]
        return None

    def add(self, buffer: mmap.mmap) -> None:
        if os.environ.get("NEGLOG_KEEP_MEMORY", "1") == "0":
            return
        buffer.madvise(mmap.MADV_FREE)
        with self._lock:
            self._buffers = [*self._buffers, buffer][-MAX_KEPT:]

    def clear(self) -> None:
        with self._lock:
            self._buffers = []

    def reset_after_fork(self) -> None:
        """A lock that another thread held at the fork would stay locked in the child for ever."""
        self._lock = threading.RLock()
        self._buffers = []


_kept = _KeptBuffers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.reset_after_fork)


def give_back() -> None:
    """Free all kept buffers."""
    _kept.clear()


def large_buffer(nbytes: int) -> Any:
    """At least `nbytes` writable bytes on huge pages, of any content, aligned to a huge page.

    They are kept for the next one when the last array or tensor on them dies. None where the
    ordinary allocator should serve: small sizes, and systems other than Linux.
    """
    if nbytes < LARGE or not sys.platform.startswith("linux"):
        return None
    # Whole huge pages, and one more because the mapping may begin anywhere.
    size = (-(-nbytes // HUGE_PAGE) + 1) * HUGE_PAGE
    pages = _kept.pop(size)
    if pages is None:
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # no memory, of which the allocator's error says more; or no huge pages
            return None
    whole = ctypes.c_char.from_buffer(pages)
    start = -ctypes.addressof(whole) % HUGE_PAGE
    # Not an array: a view of a view of an array has the first array as its base, so an array made
    # here could die while its memory is in use.
    lease = (ctypes.c_char * nbytes).from_buffer(pages, start)
    weakref.finalize(lease, _kept.add, pages).atexit = False
    return lease


def use_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages for new memory, before its first write; where it is large, on Linux."""
    if nbytes < LARGE or not sys.platform.startswith("linux"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(start, size, mmap.MADV_HUGEPAGE)  # refused where the kernel has none: no matter


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
