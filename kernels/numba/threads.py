"""How the Numba version uses threads.

(a) Threads take rows from a shared counter. prange alone gives each thread an equal part, and a
    prompt of ignored rows would leave one thread with all the work.
(b) One thread does not enter Numba's threading layer: GNU's does not survive a fork, and Numba's
    own ends the process when two Python threads enter it. So that no two do, the parallel functions
    keep the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def call_with_threads(
    threads: int, serial: Callable[..., Any], parallel: Callable[..., Any], *arguments: Any
) -> Any:
    """serial(*arguments, counter), or parallel(*arguments, counter, workers) for several threads.

    counter: the address of an int64 that is 0.
    """
    counter = np.zeros(1, np.int64)
    config: Any = numba.config  # whose attributes mypy does not see
    workers = min(threads, config.NUMBA_NUM_THREADS)
    if workers <= 1:
        return serial(*arguments, counter.ctypes.data)
    before = numba.get_num_threads()
    numba.set_num_threads(workers)
    try:
        return parallel(*arguments, counter.ctypes.data, workers)
    finally:
        numba.set_num_threads(before)
