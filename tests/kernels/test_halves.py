"""Numba's conversion of float16, by the processor's instructions or, without them, by bits."""

import pytest

from tests.support.processes import python

CONVERT = """
import numpy as np
from numba import njit
from neglog.kernels.numba.block import block_narrow, block_widen
from neglog.kernels.numba.intrinsics import pointer

HALF, FLOAT = np.uint16(0), np.float32(0)

@njit
def widen(half, n, to):
    block_widen(pointer(half, HALF), n, pointer(to, FLOAT))

@njit
def narrow(x, n, to):
    block_narrow(pointer(x, FLOAT), n, pointer(to, HALF))

def same(found, expected):
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert found[numbers].tobytes() == expected[numbers].tobytes()

every = np.arange(65536).astype(np.uint16).view(np.float16)
wide = np.empty(every.size, np.float32)
widen(every.ctypes.data, every.size, wide.ctypes.data)
same(wide, every.astype(np.float32))

# Each number, each tie between two, and what lies just beside a tie.
ties = (wide[:-1].astype(np.float64) + wide[1:]) / 2
around = [np.nextafter(ties.astype(np.float32), np.float32(end)) for end in (-np.inf, np.inf)]
x = np.concatenate([wide, ties.astype(np.float32), *around, np.float32([1e9, -1e9, 1e-30])])
half = np.empty(x.size, np.float16)
narrow(x.ctypes.data, x.size, half.ctypes.data)
with np.errstate(over="ignore"):
    same(half, x.astype(np.float16))
print("vcvtph2ps" in widen.inspect_asm(widen.signatures[0]))
"""
WITHOUT_F16C = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "-f16c"}


@pytest.mark.parametrize("features", [{}, WITHOUT_F16C], ids=["this processor", "no F16C"])
def test_float16_is_converted_as_by_numpy(features):
    result = python(CONVERT, **features)
    assert result.returncode == 0, result.stderr
    if features:
        assert result.stdout == "False\n"
