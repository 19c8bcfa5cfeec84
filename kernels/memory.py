"""Memory for large gradients: huge pages, and the last one's pages again.

(a) New memory is the hidden cost of a backward on the CPU: the kernel clears each page before the
    first write. For a gradient of 262 MB (2048 x 32000 float32) on 4 KB pages a backward takes 70
    to 85 ms; in memory that was written before, 10 to 15.
(b) Huge pages, asked for before the first write, bring it to 28 ms: 125 faults, not 64000.
(c) So a gradient's memory is kept when the gradient dies, and the next of its size, one training
    step later, finds it there: no fault at all. It is kept as MADV_FREE, which hands the pages to
    the kernel to take whenever anyone needs memory; until then they stay in the process's resident
    size. At most three such buffers wait. NEGLOG_KEEP_MEMORY=0 gives it back at once instead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from typing import Any

HUGE_PAGE = 2 << 20
# Smaller gradients come from the allocator, whose own pages were written before.
LARGE = 4 << 20


# Buffers that may wait: the scores that a contrastive loss keeps, and the gradients of both sides.
PLACES = 3


class _Shelf:
    """The buffers that wait for the next gradients, the oldest first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection under the lock may return a buffer
        self._waiting: list[mmap.mmap] = []

    def take(self, nbytes: int) -> mmap.mmap | None:
        with self._lock:
            # One that is too small, or half empty, would not do.
            fitting = [pages for pages in self._waiting if nbytes <= len(pages) <= 2 * nbytes]
            if fitting:
                best = min(reversed(fitting), key=len)  # of a size, the last to have been written
                self._waiting = [pages for pages in self._waiting if pages is not best]
                return best
            # Sizes have changed: what was kept for others goes back, the oldest first.
            del self._waiting[:1]
        return None

    def put(self, pages: mmap.mmap) -> None:
        if not _keeps_memory():
            return
        pages.madvise(mmap.MADV_FREE)
        with self._lock:
            self._waiting = [*self._waiting, pages][-PLACES:]

    def clear(self) -> None:
        with self._lock:
            self._waiting = []


_shelf = _Shelf()
if hasattr(os, "register_at_fork"):
    # A lock held by another thread at the fork would be held in the child for ever.
    os.register_at_fork(after_in_child=_shelf.__init__)


def _keeps_memory() -> bool:
    return os.environ.get("NEGLOG_KEEP_MEMORY", "1") != "0"


def give_back() -> None:
    """Let go of all buffers that wait."""
    _shelf.clear()


def large_buffer(nbytes: int) -> Any:
    """At least `nbytes` writable bytes on huge pages, with any content, aligned to a huge page.

    They are free again when the last array or tensor on them dies. None where the ordinary
    allocator should serve: small sizes, and systems other than Linux.
    """
    if nbytes < LARGE or not sys.platform.startswith("linux"):
        return None
    # Whole huge pages, and one more because the mapping may begin anywhere.
    size = (-(-nbytes // HUGE_PAGE) + 1) * HUGE_PAGE
    pages = _shelf.take(size)
    if pages is None:
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # no memory, which the allocator says better; or no huge pages
            return None
    whole = ctypes.c_char.from_buffer(pages)
    start = -ctypes.addressof(whole) % HUGE_PAGE
    # Not an array: NumPy lets a view's base be the first of a chain of arrays, and the link that
    # tells of its death would be dropped while the memory is in use.
    lease = (ctypes.c_char * nbytes).from_buffer(pages, start)
    weakref.finalize(lease, _shelf.put, pages).atexit = False
    return lease
