"""Every build of the pairs kernels, tile by tile and on NumPy arrays, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from neglog import kernels, reference
from neglog.kernels import Pairs, pairs_backward, pairs_forward
from tests.conftest import relative_error

CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
# Each of 1, 2, 7, 31, 64, 65, 257, 1023, 1024, 1025 and 2500 as rows and as columns.
SHAPES = [(1, 1), (1, 2500), (2, 7), (7, 2), (31, 1023), (64, 1024), (65, 1025), (257, 31),
          (1023, 65), (1024, 257), (1025, 64), (2500, 1), (65, 2500)]  # fmt: skip
EPS = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-24, "float16": 2.0**-24}
# Half the distance of two neighbours of what the gradient is rounded to.
LAST = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def real_of(dtype):
    return np.float64 if dtype == "float64" else np.float32


def stored(values, dtype):
    """The values in the dtype; a bfloat16, which NumPy has not, as its bits."""
    if dtype != "bfloat16":
        return np.asarray(values).astype(dtype)
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read(memory, dtype):
    if dtype == "bfloat16":
        memory = (memory.astype(np.uint32) << 16).view(np.float32)
    return memory.astype(np.float64)


def address(array, *index):
    """Where an array's element is, 0 for None."""
    if array is None:
        return 0
    return array.ctypes.data + sum(
        i * s for i, s in zip(index, array.strides[: len(index)], strict=True)
    )


@dataclass
class Problem:
    """Similarities in a memory whose rows are longer than they, and what makes scores of them."""

    dtype: str
    memory: np.ndarray
    columns: int
    scale: np.ndarray
    bias: np.ndarray | None = None
    positive: np.ndarray | None = None
    excluded: np.ndarray | None = None
    row_group: np.ndarray | None = None
    column_group: np.ndarray | None = None
    bounded: bool = False

    @property
    def shape(self):
        return len(self.memory), self.columns

    def tile(self, rows, columns):
        """The kernel's argument for two slices."""
        row, column = rows.start, columns.start
        by_column = self.bias is not None and self.bias.ndim == 1
        return (
            CODES[self.dtype], rows.stop - row, columns.stop - column, column,
            address(self.memory, row, column), self.memory.shape[1],
            address(self.scale, *[row] * self.scale.ndim), self.scale.ndim,
            address(self.bias, *[column] * by_column), int(by_column),
            address(self.positive, row), address(self.excluded, row),
            address(self.row_group, row), address(self.column_group, column), self.bounded,
        )  # fmt: skip

    def truth(self, **upstreams):
        options = {"bias": 0.0} if self.bias is None else {"bias": self.bias}
        for name in ("scale", "positive", "excluded", "row_group", "column_group"):
            options[name] = getattr(self, name)
        similarity = read(self.memory[:, : self.columns], self.dtype)
        return reference.pairs(similarity, **options, **upstreams)

    def largest(self):
        """The largest |score| that counts."""
        similarity = read(self.memory[:, : self.columns], self.dtype)
        z = np.abs(similarity * np.reshape(self.scale, (-1, 1)))
        if self.bias is not None:
            z = z + np.abs(np.where(np.isneginf(self.bias), 0, self.bias))
        return z.max(initial=0, where=np.isfinite(z))


def draw(rng, shape, dtype, options="plain", bounded=False):
    """Cosines, a third of them near 1 or -1, at a scale that just keeps `bounded`, or at 100."""
    rows, columns = shape
    real = real_of(dtype)
    cosines = np.tanh(rng.standard_normal((rows, columns + 3)) * 1.5)
    largest = {np.float32: 36.0, np.float64: 280.0}[real] if bounded else 100.0
    problem = Problem(dtype, stored(cosines, dtype), columns, np.array(largest, real))
    problem.bounded = bounded
    if options == "plain":
        return problem
    problem.positive = rng.integers(0, columns, rows)
    if options == "groups":
        problem.bias = np.array(-1.5, real)
        problem.row_group = rng.integers(0, 5, rows)
        problem.column_group = rng.integers(0, 5, columns)
        return problem
    problem.scale = (largest * rng.uniform(0.2, 1, rows)).astype(real)
    problem.bias = rng.uniform(-3, 3, columns).astype(real)
    problem.bias[rng.random(columns) < 0.1] = -np.inf
    problem.bias[problem.positive[0]] = 0.5  # one column at least that counts
    problem.excluded = rng.integers(-1, columns, rows)
    return problem


def load(build):
    kernel = kernels.load("pairs", build)
    home = "numba" if build == "numba" else f"cython.{kernels.isa_level()}"
    assert kernel.__name__ == f"neglog.kernels.{home}.pairs"
    return kernel


def cuts(whole, size):
    return [slice(start, min(start + size, whole)) for start in range(0, whole, size)]


def whole_of(problem):
    return [(slice(0, problem.shape[0]), slice(0, problem.shape[1]))]


@dataclass
class Forward:
    row_maximum: np.ndarray
    row_sum: np.ndarray
    column_maximum: np.ndarray
    column_sum: np.ndarray
    positive: np.ndarray

    def lse(self, bounded):
        """By row and by column, a pair of `real`s each."""
        found = []
        for maximum, total in (
            (self.row_maximum, self.row_sum),
            (self.column_maximum, self.column_sum),
        ):
            with np.errstate(divide="ignore", invalid="ignore"):
                lse = (0.0 if bounded else maximum.astype(np.float64)) + np.log(total)
                high = lse.astype(maximum.dtype)
                low = np.where(np.isfinite(lse), lse - high, 0).astype(maximum.dtype)
            found.append((high, low))
        return found

    def bits(self):
        return b"".join(part.tobytes() for part in vars(self).values())


def run_forward(kernel, problem, tiles=None, threads=1, columns=True):
    real, (rows, width) = real_of(problem.dtype), problem.shape
    f = Forward(
        np.full(rows, -np.inf, real), np.zeros(rows), np.full(width, -np.inf, real),
        np.zeros(width), np.full(rows, 777, real),
    )  # fmt: skip
    for down, across in tiles or whole_of(problem):
        row, column = down.start, across.start
        kernel.forward(
            problem.tile(down, across),
            0 if problem.bounded else address(f.row_maximum, row), address(f.row_sum, row),
            0 if problem.bounded or not columns else address(f.column_maximum, column),
            address(f.column_sum, column) if columns else 0,
            address(f.positive, row), threads,
        )  # fmt: skip
    return f


def draw_upstreams(rng, problem):
    rows, columns = problem.shape
    upstreams = {
        "grad_row_lse": rng.standard_normal(rows),
        "grad_column_lse": rng.standard_normal(columns),
    }
    if problem.positive is not None:
        for name in ("grad_row_loss", "grad_column_loss", "grad_positive"):
            upstreams[name] = rng.standard_normal(rows)
    # As the kernel gets them, so that their own rounding is no error.
    return {name: g.astype(real_of(problem.dtype)) for name, g in upstreams.items()}


def run_backward(kernel, problem, lse, upstreams, tiles=None, threads=1, out=None, columns=True):
    real = real_of(problem.dtype)
    of_rows, of_columns = lse
    by_row = upstreams["grad_row_lse"].astype(np.float64)
    by_column = upstreams["grad_column_lse"].astype(np.float64)
    row_loss, column_loss = upstreams.get("grad_row_loss"), upstreams.get("grad_column_loss")
    if problem.positive is not None:
        by_row = by_row + row_loss
        np.add.at(by_column, problem.positive, column_loss)
    by_row, by_column = by_row.astype(real), by_column.astype(real)
    out = np.zeros_like(problem.memory) if out is None else out
    for down, across in tiles or whole_of(problem):
        row, column = down.start, across.start
        kernel.backward(
            problem.tile(down, across),
            (address(of_rows[0], row), address(of_rows[1], row), address(by_row, row),
             address(row_loss, row)),
            (address(of_columns[0], column), address(of_columns[1], column),
             address(by_column, column), address(column_loss, row)) if columns else (0, 0, 0, 0),
            address(upstreams.get("grad_positive"), row), address(out, row, column),
            out.shape[1], threads,
        )  # fmt: skip
    return out


def lse_error(found, expected):
    """Of the pair as a whole."""
    high, low = found
    return relative_error(high.astype(np.float64) + low, expected)


def gradient_budget(problem):
    """Four roundings of a score, which are relative errors of e^score, and the result's own."""
    eps = EPS[problem.dtype]
    return 4 * eps * (1 + problem.largest()) + LAST[problem.dtype]


def check(kernel, problem, rng, tiles=None):
    """Forward and backward against the oracle, within budgets made of a few roundings."""
    upstreams = draw_upstreams(rng, problem)
    truth = problem.truth(**upstreams)
    f = run_forward(kernel, problem, tiles)
    lse = f.lse(problem.bounded)
    gradient = run_backward(kernel, problem, lse, upstreams, tiles)
    eps = EPS[problem.dtype]
    print(
        "LSE",
        problem.dtype,
        problem.bounded,
        max(lse_error(lse[0], truth.row_lse), lse_error(lse[1], truth.column_lse)) / eps,
    )
    assert lse_error(lse[0], truth.row_lse) < 4 * eps
    assert lse_error(lse[1], truth.column_lse) < 4 * eps
    if problem.positive is not None:
        assert relative_error(f.positive, truth.positive) < 2 * eps
    error = relative_error(read(gradient[:, : problem.columns], problem.dtype), truth.grad)
    assert error < gradient_budget(problem)
    assert not read(gradient[:, problem.columns :], problem.dtype).any()


@pytest.mark.parametrize("options", ["plain", "groups", "all"])
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(build, rng, shape, dtype, bounded, options):
    check(load(build), draw(rng, shape, dtype, options, bounded), rng)


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", CODES)
def test_tiles_merge_into_one_state(build, rng, dtype, bounded):
    """Tiles of rows and of columns, neither multiples of a cell; groups and positives by tile."""
    kernel = load(build)
    for options in ("plain", "groups", "all"):
        problem = draw(rng, (150, 2300), dtype, options, bounded)
        for sizes in ((150, 700), (37, 2300), (100, 1100)):
            rows, columns = (
                cuts(whole, size) for whole, size in zip(problem.shape, sizes, strict=True)
            )
            check(kernel, problem, rng, [(r, c) for r in rows for c in columns])


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(7, 2), (130, 1300)])
def test_gradient_over_the_similarities(build, rng, shape, dtype, bounded):
    kernel, problem = load(build), draw(rng, shape, dtype, "all", bounded)
    upstreams = draw_upstreams(rng, problem)
    lse = run_forward(kernel, problem).lse(bounded)
    padding = problem.memory[:, problem.columns :].copy()
    apart = np.zeros(shape, problem.memory.dtype)  # of another stride
    run_backward(kernel, problem, lse, upstreams, out=apart, threads=2)
    run_backward(kernel, problem, lse, upstreams, out=problem.memory, threads=2)
    np.testing.assert_array_equal(problem.memory[:, : problem.columns], apart)
    np.testing.assert_array_equal(problem.memory[:, problem.columns :], padding)


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", CODES)
def test_rows_only(build, rng, dtype, bounded):
    kernel, problem = load(build), draw(rng, (70, 1100), dtype, "all", bounded)
    upstreams = draw_upstreams(rng, problem)
    both, f = run_forward(kernel, problem), run_forward(kernel, problem, columns=False)
    assert not f.column_sum.any()
    assert np.isneginf(f.column_maximum).all()
    for name in ("row_maximum", "row_sum", "positive"):
        np.testing.assert_array_equal(getattr(f, name), getattr(both, name))
    of_rows = {name: upstreams[name] for name in ("grad_row_lse", "grad_row_loss", "grad_positive")}
    truth = problem.truth(**of_rows)
    gradient = run_backward(kernel, problem, f.lse(bounded), upstreams, columns=False)
    error = relative_error(read(gradient[:, : problem.columns], dtype), truth.grad)
    assert error < gradient_budget(problem)


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", CODES)
def test_nothing_left(build, rng, dtype, bounded):
    """A row whose every pair is excluded, and a column: lse -inf, gradient 0, and no NaN."""
    kernel, problem = load(build), draw(rng, (70, 1100), dtype, "plain", bounded)
    problem.row_group, problem.column_group = np.arange(70) % 3, np.full(1100, 5)
    problem.row_group[66] = 5
    problem.bias = np.zeros(1100, real_of(dtype))
    problem.bias[1050] = -np.inf
    for tiles in (None, [(slice(0, 70), c) for c in cuts(1100, 500)]):
        f = run_forward(kernel, problem, tiles)
        assert np.isneginf(f.lse(bounded)[0][0]).nonzero()[0].tolist() == [66]
        assert np.isneginf(f.lse(bounded)[1][0]).nonzero()[0].tolist() == [1050]
        gradient = run_backward(
            kernel, problem, f.lse(bounded), draw_upstreams(rng, problem), tiles
        )
        assert not read(gradient[66], dtype).any()
        assert not read(gradient[:, 1050], dtype).any()
        check(kernel, problem, rng, tiles)


def test_a_positive_that_is_excluded_by_index(build):
    """Its score counts, in losses and their gradients, but not among the pairs."""
    kernel = load(build)
    for dtype in CODES:
        problem = Problem(dtype, stored([[0.0, 1.0, 2.0]], dtype), 3, np.array(1, real_of(dtype)))
        problem.positive, problem.excluded = np.array([2]), np.array([2])
        for problem.bounded in (True, False):
            check(kernel, problem, np.random.default_rng(0))
            assert run_forward(kernel, problem).positive[0] == 2


@pytest.mark.parametrize("dtype", CODES)
def test_a_row_and_a_column_far_below_the_others(build, rng, dtype):
    """e^-200 times the others: with one maximum for a cell they would vanish."""
    kernel, problem = load(build), draw(rng, (130, 2100), dtype, "plain")
    cosines = 1 - rng.random((130, 2103)) / 64
    cosines[[5, 129]] -= 1.98
    cosines[:, [1500, 2099]] = -1 + rng.random((130, 2)) / 64
    problem.memory = stored(cosines, dtype)
    check(kernel, problem, rng)
    upstreams = {"grad_row_lse": np.ones(130, real_of(dtype)),
                 "grad_column_lse": np.zeros(2100, real_of(dtype))}  # fmt: skip
    lse = run_forward(kernel, problem).lse(False)
    assert (lse[0][0][[5, 129]] < -80).all()
    gradient = read(run_backward(kernel, problem, lse, upstreams), dtype)
    np.testing.assert_allclose(gradient[:, :2100].sum(axis=1), 1, rtol=4 * LAST[dtype] + 1e-4)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("options", ["plain", "groups", "all"])
def test_not_finite(build, rng, dtype, options):
    kernel, problem = load(build), draw(rng, (70, 1100), dtype, options)
    values = read(problem.memory, dtype)
    values[3, 5] = values[67, 1099] = np.nan
    values[10, 1026] = np.inf
    values[20, [7, 1030]] = -np.inf
    values[66] = -np.inf
    values[:, 9] = -np.inf
    problem.memory = stored(values, dtype)
    check(kernel, problem, rng)
    check(kernel, problem, rng, [(slice(0, 70), c) for c in cuts(1100, 500)])


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [33, 65])
def test_confident_positive_keeps_its_digits(build, n, dtype, bounded):
    """1 - p is 1e-6. A column's is right to the rounding of 8 exps beside the positive's own."""
    kernel = load(build)
    problem = Problem(dtype, stored(np.eye(n), dtype), n, np.array(18.0, real_of(dtype)))
    problem.positive, problem.bounded = np.arange(n), bounded
    one, nothing = np.ones(n, real_of(dtype)), np.zeros(n, real_of(dtype))
    f = run_forward(kernel, problem)
    of_rows, of_columns = (high.astype(float) + low - f.positive for high, low in f.lse(bounded))
    surprise = np.log1p((n - 1) * np.exp(-18.0))
    np.testing.assert_allclose(of_rows, surprise, rtol=0.05 if dtype == "float32" else 1e-7)
    half_a_unit_of_lse = 2.0**-49  # the test's own, near 18 in double
    budget = 8 * EPS[dtype] + half_a_unit_of_lse
    np.testing.assert_allclose(of_columns, surprise, rtol=0, atol=budget)
    upstreams = {"grad_row_lse": nothing, "grad_column_lse": nothing, "grad_row_loss": one,
                 "grad_column_loss": nothing, "grad_positive": nothing}  # fmt: skip
    lse = [(np.log(np.exp(18.0) + n - 1) + np.zeros(n)) for _ in range(2)]
    pair = [(x.astype(real_of(dtype)), (x - x.astype(real_of(dtype))).astype(real_of(dtype)))
            for x in lse]  # fmt: skip
    gradient = run_backward(kernel, problem, pair, upstreams)
    np.testing.assert_allclose(
        np.diag(gradient), np.expm1(-surprise) * one, rtol=1e-6 if dtype == "float32" else 1e-7
    )


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_bits_do_not_depend_on_threads(build, rng, dtype, bounded):
    kernel, problem = load(build), draw(rng, (300, 2500), dtype, "all", bounded)
    upstreams = draw_upstreams(rng, problem)
    outcomes = set()
    for threads in (1, 2, 3):
        f = run_forward(kernel, problem, threads=threads)
        gradient = run_backward(kernel, problem, f.lse(bounded), upstreams, threads=threads)
        sigmoid = run_sigmoid(kernel, problem, 0.3, threads=threads)
        outcomes.add(f.bits() + gradient.tobytes() + b"".join(part.tobytes() for part in sigmoid))
    assert len(outcomes) == 1


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(build, shape, bounded):
    kernel = load(build)
    problem = Problem("float32", np.zeros(shape, np.float32), shape[1], np.array(1, np.float32))
    problem.bounded = bounded
    for threads in (1, 2):
        f = run_forward(kernel, problem, whole_of(problem), threads)
        assert not f.row_sum.any()
        assert not f.column_sum.any()
        assert np.isneginf(f.row_maximum).all()
        upstreams = {"grad_row_lse": np.ones(shape[0], np.float32),
                     "grad_column_lse": np.ones(shape[1], np.float32)}  # fmt: skip
        run_backward(kernel, problem, f.lse(bounded), upstreams, whole_of(problem), threads)
        assert not run_sigmoid(kernel, problem, 1.0, threads=threads)[0].any()


# The loss by sigmoids


def run_sigmoid(kernel, problem, grad_scale, tiles=None, threads=1, out=None):
    """Losses and gradients' sums by row, and the gradient."""
    rows = problem.shape[0]
    loss, grad = np.zeros((2, rows))
    out = np.zeros_like(problem.memory) if out is None else out
    for down, across in tiles or whole_of(problem):
        row = down.start
        kernel.sigmoid(
            problem.tile(down, across), grad_scale, address(loss, row), address(grad, row),
            address(out, row, across.start), out.shape[1], threads,
        )  # fmt: skip
    return loss, grad, out


def check_sigmoid(kernel, problem, tiles=None):
    truth = problem.truth(grad_sigmoid=0.25)
    loss, grad, out = run_sigmoid(kernel, problem, 0.25, tiles)
    print(
        "SIG",
        problem.dtype,
        relative_error(loss, truth.sigmoid) / EPS[problem.dtype],
        relative_error(grad, truth.sigmoid_grad.sum(axis=1)) / EPS[problem.dtype],
    )
    # 16 roundings in a partial sum of a block, then those of 64 partial sums in double.
    assert relative_error(loss, truth.sigmoid) < 16 * EPS[problem.dtype]
    assert relative_error(grad, truth.sigmoid_grad.sum(axis=1)) < 16 * EPS[problem.dtype]
    gradient = read(out[:, : problem.columns], problem.dtype)
    assert relative_error(gradient, truth.sigmoid_grad) < gradient_budget(problem)
    assert not read(out[:, problem.columns :], problem.dtype).any()


@pytest.mark.parametrize("options", ["plain", "groups", "all"])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid(build, rng, shape, dtype, options):
    problem = draw(rng, shape, dtype, options)
    check_sigmoid(load(build), problem)
    mild = np.array(problem.scale / 16, real_of(dtype))
    check_sigmoid(load(build), replace(problem, scale=mild))


@pytest.mark.parametrize("dtype", CODES)
def test_sigmoid_by_tiles_and_over_the_similarities(build, rng, dtype):
    kernel, problem = load(build), draw(rng, (150, 2300), dtype, "all")
    tiles = [(r, c) for r in cuts(150, 64) for c in cuts(2300, 700)]
    check_sigmoid(kernel, problem, tiles)
    apart = run_sigmoid(kernel, problem, 0.25)
    over = run_sigmoid(kernel, problem, 0.25, out=problem.memory)
    for a, b in zip(apart[:2], over[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(apart[2][:, :2300], over[2][:, :2300])


@pytest.mark.parametrize("dtype", CODES)
def test_sigmoid_of_what_is_not_finite(build, rng, dtype):
    problem = draw(rng, (4, 1100), dtype)
    values = read(problem.memory, dtype)
    values[0, 5], values[1, 1099], values[2, 7] = np.nan, np.inf, -np.inf
    problem.memory = stored(values, dtype)
    check_sigmoid(load(build), problem)


# On NumPy arrays


def face(problem):
    """The similarities as an array, and the options of pairs_forward."""
    options = {name: getattr(problem, name) for name in
               ("scale", "bias", "positive", "excluded", "row_group", "column_group")}  # fmt: skip
    return problem.memory[:, : problem.columns], options


@pytest.mark.parametrize("options", ["plain", "groups", "all"])
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays(build, rng, dtype, bounded, options):
    load(build)
    problem = draw(rng, (70, 1100), dtype, options, bounded)
    similarity, given = face(problem)
    upstreams = {name: rng.standard_normal(length) for name, length in
                 (("grad_row_lse", 70), ("grad_column_lse", 1100), ("grad_positive", 70))
                 if name != "grad_positive" or problem.positive is not None}  # fmt: skip
    truth, eps = problem.truth(**upstreams), EPS[dtype]
    result = pairs_forward(similarity, backend=build, **given)
    assert result.row_lse.dtype == result.column_lse.dtype == real_of(dtype)
    assert lse_error((result.row_lse, result.row_lse_low), truth.row_lse) < 4 * eps
    assert lse_error((result.column_lse, result.column_lse_low), truth.column_lse) < 4 * eps
    gradient = pairs_backward(result, similarity, backend=build, **given, **upstreams)
    assert gradient.dtype == similarity.dtype
    # Scaled as a whole, so that it is measured where scores are.
    expected = truth.grad * np.reshape(problem.scale, (-1, 1))
    size = problem.scale.max()
    assert relative_error(gradient / size, expected / size) < 2 * gradient_budget(problem)
    if problem.positive is None:
        assert result.positive is None
    else:
        assert relative_error(result.positive, truth.positive) < 2 * eps


@pytest.mark.parametrize("scale", [4.0, 400.0], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("by_row", [False, True])
def test_arrays_rows_only(build, rng, scale, by_row):
    similarity, positive = rng.standard_normal((9, 40)), rng.integers(0, 40, 9)
    factor = np.linspace(scale / 2, scale, 9) if by_row else scale
    given = {"scale": factor, "positive": positive}
    truth = reference.pairs(similarity, **given, grad_row_loss=1 / 9)
    result = pairs_forward(similarity, columns=False, backend=build, **given)
    assert result.column_lse is None
    assert result.column_lse_low is None
    gradient = pairs_backward(
        result, similarity, grad_row_lse=1 / 9, grad_positive=-1 / 9, backend=build, **given
    )
    np.testing.assert_allclose(result.row_lse, truth.row_lse, rtol=1e-14)
    expected = truth.grad * np.reshape(factor, (-1, 1))
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-13)


def test_arrays_choose_by_the_largest_score(build):
    """At one past the bound e^score would still be in range; at 90 it is not in float32."""
    for largest in (40.0, 41.0, 90.0, 1e6):
        similarity = np.array([[1.0, -1.0], [-1.0, -1.0]], np.float32)
        result = pairs_forward(similarity, scale=largest, backend=build)
        expected = np.array([largest, np.log(2) - largest])
        assert lse_error((result.row_lse, result.row_lse_low), expected) < 2.0**-40 * 1e6
        np.testing.assert_allclose(result.row_lse, expected, rtol=1e-6)
    one = pairs_forward(np.ones((2, 2)), bias=np.array([-np.inf, 5.0]), backend=build)
    assert one.row_lse.tolist() == [6, 6]
    assert one.column_lse.tolist() == [-np.inf, pytest.approx(6 + np.log(2))]


def test_arrays_keep_the_digits_of_a_confident_positive(build):
    """Both losses of each row: 1 - p is 3e-8, less than half a unit of float32's 1."""
    n, scale = 3, 18.0
    similarity, given = np.eye(n, dtype=np.float32), {"scale": scale, "positive": np.arange(n)}
    result = pairs_forward(similarity, backend=build, **given)
    tiny = np.zeros(n, np.float32)
    exact = np.log(np.exp(scale) + n - 1)
    high = np.float32(exact) + tiny
    result = result._replace(
        row_lse=high, row_lse_low=tiny + np.float32(exact - np.float64(high[0])),
        column_lse=high, column_lse_low=tiny + np.float32(exact - np.float64(high[0])),
    )  # fmt: skip
    gradient = pairs_backward(
        result, similarity, grad_row_lse=1.0, grad_column_lse=1.0, grad_positive=-2.0,
        backend=build, **given,
    )  # fmt: skip
    expected = 2 * scale * np.expm1(scale - exact)
    np.testing.assert_allclose(np.diag(gradient), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_arrays_of_nothing(build, shape):
    similarity = np.zeros(shape, np.float32)
    result = pairs_forward(similarity, backend=build)
    assert np.isneginf(result.row_lse).all()
    assert np.isneginf(result.column_lse).all()
    assert not result.row_lse_low.any()
    gradient = pairs_backward(
        result, similarity, grad_row_lse=1.0, grad_column_lse=1.0, backend=build
    )
    assert gradient.shape == shape


BAD = {
    "similarity shape": (ValueError, r"similarity: expected shape \(N, V\)",
                         {"similarity": np.zeros(4)}),
    "similarity dtype": (TypeError, r"similarity: expected one of",
                         {"similarity": np.zeros((2, 4), int)}),
    "scale": (ValueError, r"scale: expected a scalar or shape \(2,\)", {"scale": np.ones(3)}),
    "scale dtype": (TypeError, r"scale: expected real numbers, got complex", {"scale": 1j}),
    "bias": (ValueError, r"bias: expected a scalar or shape \(4,\)", {"bias": np.ones(2)}),
    "positive above": (IndexError, r"positive 4 at row 1 .*0 <= positive < 4",
                       {"positive": [0, 4]}),
    "positive below": (IndexError, r"positive -1 at row 0", {"positive": [-1, 4]}),
    "positive uint64": (IndexError, r"positive 18446744073709551615 at row 1",
                        {"positive": np.array([0, 2**64 - 1], np.uint64)}),
    "positive shape": (ValueError, r"positive: expected shape \(2,\)", {"positive": [0]}),
    "positive dtype": (TypeError, r"positive: expected integers", {"positive": [0.0, 1.0]}),
    "excluded": (IndexError, r"excluded -2 at row 0 .*-1 <= excluded < 4", {"excluded": [-2, 0]}),
    "one group": (ValueError, r"row_group, column_group: expected both", {"row_group": [0, 0]}),
    "groups": (ValueError, r"column_group: expected shape \(4,\)",
               {"row_group": [0, 0], "column_group": [0, 0]}),
    "threads": (ValueError, r"threads: expected", {"threads": 0}),
    "backend": (ValueError, r"backend: expected one of cython, numba", {"backend": "gpu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD.keys())
def test_bad_input(error, message, change):
    arguments = {"similarity": np.zeros((2, 4), np.float32), **change}
    with pytest.raises(error, match=message):
        pairs_forward(**arguments)


def test_bad_upstreams(build):
    similarity = np.zeros((2, 4), np.float32)
    result = pairs_forward(similarity, columns=False, backend=build)
    for error, message, change in (
        (ValueError, r"grad_positive: expected None without positive", {"grad_positive": 1.0}),
        (ValueError, r"result.column_lse: expected that of columns=True", {"grad_column_lse": 1.0}),
        (ValueError, r"grad_row_lse: expected a scalar or shape \(2,\)", {"grad_row_lse": [1.0]}),
        (ValueError, r"result.row_lse: expected shape \(2,\) and float32",
         {"result": Pairs(np.zeros(2), np.zeros(2), None, None, None)}),
        (ValueError, r"result.row_lse: expected shape \(3,\)",
         {"similarity": np.zeros((3, 4), np.float32)}),
    ):  # fmt: skip
        given = {"result": result, "similarity": similarity, "grad_row_lse": 1.0, **change}
        with pytest.raises(error, match=message):
            pairs_backward(**given, backend=build)
