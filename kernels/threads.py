"""How many threads a kernel may use."""

from __future__ import annotations

import operator
import os
from typing import Any

# Where there are fewer cores. OpenMP ends the process where it cannot start as many as it is asked
# for, and what threads beyond the cores do is wait.
MOST_THREADS = 64

_threads_started = False
_threads_lost = False


def _after_fork_in_child() -> None:
    global _threads_lost
    _threads_lost = _threads_started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def allowed(threads: int) -> int:
    """`threads`, or 1 in a child that was forked after a call with several threads.

    GNU OpenMP's threads do not exist in the child, which would wait for them for ever.
    """
    global _threads_started
    if _threads_lost:
        return 1
    _threads_started = _threads_started or threads > 1
    return threads


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_count(threads: Any) -> int:
    """The number of threads for an argument `threads`; None is every core of this process."""
    if threads is None:
        return allowed(_cores())
    try:
        count = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads: expected a whole number or None, got {threads!r}") from None
    if count < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    return allowed(min(count, max(_cores(), MOST_THREADS)))
