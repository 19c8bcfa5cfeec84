"""forward_backward of nll against forward and backward, and against itself at other addresses.

By addresses, so that bfloat16, which NumPy has not, takes part: as the bits of its numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neglog import kernels

CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
IGNORED = -100
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.1, "z_loss": 0.01},
    "token_weight": {"token_weight": True},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 3.0, "z_loss": 0.01},
    "probabilities": {"probabilities": True, "label_smoothing": 0.1},
}


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Of the nearest bfloat16, ties to even, as IEEE rounds; NaN is 0x7fc0."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def in_memory(x: np.ndarray, dtype: str) -> np.ndarray:
    return bfloat16_bits(x) if dtype == "bfloat16" else x.astype(dtype)


class Call:
    """The arrays of a call whose rows lie `stride` numbers apart, from a number of an array on."""

    def __init__(self, z, dtype, offset=0, gap=0, **options):
        self.rows, self.vocab = z.shape
        self.dtype, self.stride = dtype, self.vocab + gap
        self.logits = self.rows_of(in_memory(z, dtype), offset)
        self.out = self.rows_of(np.zeros_like(self.logits), offset)
        rng = np.random.default_rng(7)
        real = np.float64 if dtype == "float64" else np.float32
        weight = rng.uniform(0.1, 2.0, self.vocab).astype(real)
        self.weight = weight if options.pop("weight", False) else None
        of_rows = rng.uniform(0.1, 2.0, self.rows).astype(real)
        of_rows[-1] = 0
        self.token_weight = of_rows if options.pop("token_weight", False) else None
        self.target = rng.integers(0, self.vocab, self.rows)
        self.target[self.rows // 2] = IGNORED
        drawn = rng.dirichlet(np.ones(self.vocab), self.rows)
        self.probs = in_memory(drawn, dtype) if options.pop("probabilities", False) else None
        self.loss, self.lse, self.low = np.full((3, self.rows), 7, real)
        self.options = {
            "label_smoothing": 0.0, "logit_scale": 1.0, "softcap": 0.0, "z_loss": 0.0, **options,
        }  # fmt: skip

    def rows_of(self, x, offset):
        memory = np.zeros(offset + self.rows * self.stride + 64, x.dtype)
        first = offset + -memory.ctypes.data % 64 // x.itemsize  # a cache line begins at offset 0
        rows = memory[first : first + self.rows * self.stride].reshape(self.rows, self.stride)
        rows[:, : self.vocab] = x
        return rows[:, : self.vocab]

    def problem(self, logits=None):
        logits = self.logits if logits is None else logits
        given = (self.probs, self.weight, self.token_weight)
        address = [0 if x is None else x.ctypes.data for x in given]
        target = 0 if self.probs is not None else self.target.ctypes.data
        return (CODES[self.dtype], self.rows, self.vocab, logits.ctypes.data, self.stride, target,
                address[0], self.vocab, *address[1:], IGNORED, *self.options.values())  # fmt: skip

    def stats(self):
        return self.loss.ctypes.data, self.lse.ctypes.data, self.low.ctypes.data, 0, 0, 0

    def two_passes(self, nll, scale, threads=1):
        nll.forward(*self.problem(), *self.stats(), threads)
        grad = np.ones(1, self.loss.dtype)
        nll.backward(*self.problem(), self.lse.ctypes.data, self.low.ctypes.data,
                     grad.ctypes.data, 0, scale, 0, 0, 0, self.out.ctypes.data, self.stride,
                     threads)  # fmt: skip
        return self.bits(self.out)

    def one_pass(self, nll, scale, threads=1, in_place=False):
        out = self.logits if in_place else self.out
        nll.forward_backward(*self.problem(), *self.stats(), scale, out.ctypes.data, self.stride,
                             threads)  # fmt: skip
        return self.bits(out)

    def bits(self, out):
        """One NaN is as good as another."""
        arrays = (self.loss, self.lse, self.low, out)
        return [np.where(np.isnan(x), x.dtype.type(np.nan), x).tobytes()
                if x.dtype.kind == "f" else x.tobytes() for x in arrays]  # fmt: skip


def scores(rng, rows, vocab):
    """An ordinary row, a confident one, a masked one, rows of inf and of NaN, and large ones."""
    z = rng.standard_normal((rows, vocab)) * 3
    z[1 % rows, vocab // 2] = 40
    z[2 % rows, vocab // 3 :] = -np.inf
    z[3 % rows, vocab - 1] = np.inf
    z[4 % rows, 0] = np.nan
    z[5 % rows] *= 1000
    return z


# Every instruction set has its own loops. The sizes leave a rest after a register and after a cache
# line, and are more than one block.
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("vocab", [1, 31, 2100])
def test_one_pass_has_the_bits_of_two(every_build, rng, dtype, vocab):
    nll = kernels.load("nll", every_build)
    z = scores(rng, 9, vocab)
    for options in OPTIONS.values():
        call = Call(z, dtype, gap=5, **options)
        for scale in (0.37, -2.0):
            expected = call.two_passes(nll, scale)
            call.out[:] = 0
            assert call.one_pass(nll, scale) == expected
        assert call.one_pass(nll, -2.0, in_place=True) == expected


# Stores go by lines of the cache, sums by columns.
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("options", ["plain", "softcap"])
def test_bits_do_not_depend_on_the_address(every_build, rng, dtype, options):
    nll = kernels.load("nll", every_build)
    z = scores(rng, 7, 157)
    expected = Call(z, dtype, **OPTIONS[options]).one_pass(nll, 0.37)
    for offset, gap in ((1, 0), (3, 1), (8, 11), (17, 99)):
        call = Call(z, dtype, offset, gap, **OPTIONS[options])
        assert call.one_pass(nll, 0.37) == expected
        assert call.one_pass(nll, 0.37, in_place=True) == expected


# Above 64 MB the gradient goes past the caches. Neither that nor the rows beside it change a bit.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", ["plain", "weight"])
def test_streamed_gradients_have_the_same_bits(every_build, rng, dtype, options):
    nll = kernels.load("nll", every_build)
    vocab = 100_003
    z = scores(rng, 9, vocab)
    few = Call(z, dtype, **OPTIONS[options])
    expected = few.one_pass(nll, 0.37)
    copies = 1 + (64 << 20) // few.out.nbytes
    many = Call(np.tile(z, (copies, 1)), dtype, offset=1, **OPTIONS[options])
    many.target[:] = np.tile(few.target, copies)
    assert many.out.nbytes > 64 << 20
    for run in (many.two_passes, many.one_pass):
        many.out[:] = 0
        *stats, out = run(nll, 0.37, threads=2)
        assert stats == [part * copies for part in expected[:-1]]
        assert out == expected[-1] * copies


def test_bfloat16_gradients_round_to_nearest_even(every_build, rng):
    """grad_lse times p = 1 writes any float32 as a bfloat16."""
    nll = kernels.load("nll", every_build)
    values = rng.standard_normal(4000) * 10.0 ** rng.integers(-44, 39, 4000)
    ties = (rng.integers(0, 0x7F00, 500).astype(np.uint32) << 16 | 0x8000).view(np.float32)
    special = [1 + 2**-8, 1 + 3 * 2**-8, 3.39e38, 3.4e38, np.inf, -np.inf, np.nan]
    wide = np.concatenate([values, ties, special]).astype(np.float32)
    wide = wide[wide != 0]
    call = Call(np.zeros((len(wide), 1)), "bfloat16")
    call.target[:] = IGNORED
    zeros = np.zeros(len(wide), np.float32)
    nll.backward(*call.problem(), zeros.ctypes.data, zeros.ctypes.data, zeros.ctypes.data, 1, 1.0,
                 wide.ctypes.data, 0, 0, call.out.ctypes.data, 1, 1)  # fmt: skip
    np.testing.assert_array_equal(call.out[:, 0], bfloat16_bits(wide))


def test_every_nan_of_bfloat16_stays_nan(every_build):
    """Whatever its bits: no rounding carries it to another number."""
    nll = kernels.load("nll", every_build)
    bits = np.arange(1 << 16, dtype=np.uint32)
    nans = bits[np.isnan((bits << 16).view(np.float32))].astype(np.uint16)
    call = Call(np.zeros((len(nans), 40)), "bfloat16")
    call.logits[:, 17] = nans
    call.target[:] = 3
    call.one_pass(nll, 0.5)
    assert np.isnan(call.loss).all()
    assert np.isnan((call.out.astype(np.uint32) << 16).view(np.float32)).all()
    upstream = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    call.logits[:, 17] = 0
    call.two_passes(nll, float(upstream[0]))
    assert np.isnan((call.out.astype(np.uint32) << 16).view(np.float32)).all()


def test_an_infinite_upstream_gives_infinite_gradients(every_build):
    """Not NaN. One near the largest float gives finite gradients."""
    nll = kernels.load("nll", every_build)
    z = np.zeros((3, 40))
    for scale, expected in ((np.inf, np.inf), (3.2e38, 3.2e38 / 40)):
        call = Call(z, "float32")
        call.one_pass(nll, scale)
        row = np.delete(call.out[0], call.target[0])
        np.testing.assert_allclose(row, expected, rtol=1e-6)
