"""The sums of block.hpp, by a compiler that vectorises nothing: their exactness is its own.

Only where a compiler is, as the compiled kernels are.
"""

import ctypes
import subprocess

import numpy as np
import pytest

from tests.support.emulated import AVAILABLE, COMPILER, ROOT

BLOCK = 2048


# By name, the terms in float64; z are scores of this lse.
TERMS = {
    "exp_sum": lambda z, lse, _: np.exp(z - lse),
    "log_probability_sum": lambda z, lse, _: z - lse,
    "log_probability_dot": lambda z, lse, coefficient: coefficient * (z - lse),
    "negative_entropy": lambda z, lse, _: np.exp(z - lse) * (z - lse),
    "exp_sum_of_row": lambda z, _, __: np.exp(z),
    "softplus_sum": lambda z, _, __: np.logaddexp(0, z),
}


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """The functions of tests/support/block_sums.cpp, compiled in less than a second."""
    made = tmp_path_factory.mktemp("block") / "block_sums.so"
    source = ROOT / "tests" / "support" / "block_sums.cpp"
    include = f"-I{ROOT / 'kernels' / 'cython'}"
    command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", include, source, "-o", made]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))


# A whole block, and one that leaves a rest after 64 partial sums.
@pytest.mark.parametrize("name", TERMS if AVAILABLE else [])
def test_a_sum_is_exact_without_vectorisation(sums, rng, name):
    function = getattr(sums, name)
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float, ctypes.c_void_p]
    for n in (BLOCK, BLOCK - 37):
        z = -np.abs(rng.standard_normal(n).astype(np.float32)) * 3
        lse = np.float32(np.log(np.exp(z.astype(np.float64)).sum()))
        other = rng.uniform(0.1, 2.0, n).astype(np.float32)
        terms = TERMS[name](z.astype(np.float64), np.float64(lse), other.astype(np.float64))
        found = function(z.ctypes.data, n, lse, other.ctypes.data)
        # An ulp of the terms. One float for the whole block is off by 1e-6.
        assert abs(found - terms.sum()) < 6e-8 * np.abs(terms).sum()
