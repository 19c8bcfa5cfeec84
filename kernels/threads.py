"""How many threads a kernel may start."""

from __future__ import annotations

import operator
import os
from typing import Any

_pool_exists = False
_pool_lost = False


def _after_fork() -> None:
    global _pool_lost
    _pool_lost = _pool_exists


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def allowed(threads: int) -> int:
    """`threads`, or 1 in a child forked after a parallel call.

    GNU OpenMP's threads do not live on in a child, which would wait for them for ever.
    """
    global _pool_exists
    if _pool_lost:
        return 1
    _pool_exists = _pool_exists or threads > 1
    return threads


def checked(threads: Any) -> int:
    """What the user asked for, None meaning every core this process may run on."""
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return allowed(cores or 1)
    try:
        count = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads: expected a whole number or None, got {threads!r}") from None
    if count < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    return allowed(count)
