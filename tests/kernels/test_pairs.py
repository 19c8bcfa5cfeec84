"""The pairs kernels, tile by tile and on NumPy arrays, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neglog import kernels, reference
from neglog.kernels import Pairs, pairs_backward, pairs_forward

from tests.support.errors import relative_error  # isort: skip
from tests.support.pair_tiles import (  # isort: skip
    CODES, EPS, LAST, Problem, check, check_sigmoid, cuts, draw, draw_upstreams, gradient_budget,
    lse_error, read, real_of, run_backward, run_forward, run_sigmoid, stored, whole_of,
)  # fmt: skip

# One for each size of a number in memory: 4, 8 and 2 bytes.
DTYPES = ["float32", "float64", "bfloat16"]
# The two ways to sum exps: without a maximum, and with one for each row and column.
BOUNDED = pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])


def load(backend):
    return kernels.load("pairs", backend)


def test_builds_are_loaded(every_build):
    home = "numba" if every_build == "numba" else f"cython.{kernels.isa_level()}"
    assert load(every_build).__name__ == f"neglog.kernels.{home}.pairs"


# The compiler makes other code for each build and dtype. Columns leave a rest after vectors of 2 to
# 16 numbers, after 64 partial sums and after cells of 1024; rows after cells of 64 and after the 8
# rows of a partial sum. "groups" and "all" together call every function of block_pairs.hpp.
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (7, 2), (2, 7), (257, 31), (31, 257), (64, 1024), (65, 1025), (130, 2049), (2, 50257)],
    ids=str,
)
def test_dtypes_and_sizes(every_build, rng, shape, dtype):
    kernel = load(every_build)
    for options in ("groups", "all"):
        for bounded in (True, False):
            check(kernel, draw(rng, shape, dtype, options, bounded), rng)
        check_sigmoid(kernel, draw(rng, shape, dtype, options))


# What an option does is decided in pairs.pyx and numba/tile.py, the same for all builds. Two cells
# of columns, of which the second is not full.
@BOUNDED
@pytest.mark.parametrize("options", ["plain", "groups", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(kernel_backend, rng, dtype, options, bounded):
    kernel, problem = load(kernel_backend), draw(rng, (70, 1100), dtype, options, bounded)
    check(kernel, problem, rng)
    check_sigmoid(kernel, problem)
    check_sigmoid(kernel, replace(problem, scale=np.array(problem.scale / 16, real_of(dtype))))


# NaN and inf in every build: a flag of the compiler could lose them.
@pytest.mark.parametrize("dtype", CODES)
def test_not_finite(every_build, rng, dtype):
    kernel = load(every_build)
    for options in ("plain", "groups", "all"):
        problem = draw(rng, (70, 1100), dtype, options)
        values = read(problem.memory, dtype)
        values[3, 5] = values[67, 1099] = np.nan
        values[10, 1026] = np.inf
        values[20, [7, 1030]] = -np.inf
        values[66] = -np.inf
        values[:, 9] = -np.inf
        problem.memory = stored(values, dtype)
        check(kernel, problem, rng)
        check(kernel, problem, rng, [(slice(0, 70), c) for c in cuts(1100, 500)])
        check_sigmoid(kernel, problem)


# A tile's addresses depend on the size of a number; merging depends on the bound.
@BOUNDED
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_merge_into_one_state(kernel_backend, rng, dtype, bounded):
    """Tiles of rows and of columns, neither multiples of a cell; groups and positives by tile."""
    kernel = load(kernel_backend)
    for options in ("plain", "groups", "all"):
        problem = draw(rng, (150, 2300), dtype, options, bounded)
        for sizes in ((150, 700), (37, 2300), (100, 1100)):
            rows, columns = (
                cuts(whole, size) for whole, size in zip(problem.shape, sizes, strict=True)
            )
            check(kernel, problem, rng, [(r, c) for r in rows for c in columns])


# Written directly or by way of a buffer, as the dtype has it.
@BOUNDED
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_over_the_similarities(kernel_backend, rng, dtype, bounded):
    shape = (130, 1300)  # several chunks of rows, two blocks
    kernel, problem = load(kernel_backend), draw(rng, shape, dtype, "all", bounded)
    upstreams = draw_upstreams(rng, problem)
    lse = run_forward(kernel, problem).lse(bounded)
    padding = problem.memory[:, problem.columns :].copy()
    apart = np.zeros(shape, problem.memory.dtype)  # of another stride
    run_backward(kernel, problem, lse, upstreams, out=apart, threads=2)
    run_backward(kernel, problem, lse, upstreams, out=problem.memory, threads=2)
    np.testing.assert_array_equal(problem.memory[:, : problem.columns], apart)
    np.testing.assert_array_equal(problem.memory[:, problem.columns :], padding)


# A row's gradient has a formula of its own without columns, if not bounded.
@BOUNDED
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_only(kernel_backend, rng, dtype, bounded):
    kernel, problem = load(kernel_backend), draw(rng, (70, 1100), dtype, "all", bounded)
    upstreams = draw_upstreams(rng, problem)
    both, f = run_forward(kernel, problem), run_forward(kernel, problem, columns=False)
    assert not f.column_sum.any()
    assert np.isneginf(f.column_maximum).all()
    for name in ("row_maximum", "row_sum", "positive_score"):
        np.testing.assert_array_equal(getattr(f, name), getattr(both, name))
    of_rows = {
        name: upstreams[name] for name in ("grad_row_lse", "grad_row_loss", "grad_positive_score")
    }
    truth = problem.truth(**of_rows)
    gradient = run_backward(kernel, problem, f.lse(bounded), upstreams, columns=False)
    error = relative_error(read(gradient[:, : problem.columns], dtype), truth.grad)
    assert error < gradient_budget(problem)


# -inf - -inf must be formed nowhere: not by either sum, nor in float, nor in double.
@BOUNDED
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_left(kernel_backend, rng, dtype, bounded):
    """A row whose every pair is excluded, and a column: lse -inf, gradient 0, and no NaN."""
    kernel, problem = load(kernel_backend), draw(rng, (70, 1100), dtype, "plain", bounded)
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


def test_a_positive_that_is_excluded_by_index(kernel_backend):
    """Its score counts, in losses and their gradients, but not among the pairs."""
    kernel = load(kernel_backend)
    for dtype in CODES:
        problem = Problem(dtype, stored([[0.0, 1.0, 2.0]], dtype), 3, np.array(1, real_of(dtype)))
        problem.positive, problem.excluded = np.array([2]), np.array([2])
        for problem.bounded in (True, False):
            check(kernel, problem, np.random.default_rng(0))
            assert run_forward(kernel, problem).positive_score[0] == 2


# The range of exp is that of float32 and of float64.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_and_a_column_far_below_the_others(kernel_backend, rng, dtype):
    """e^-200 times the others: with one maximum for a cell they would vanish."""
    kernel, problem = load(kernel_backend), draw(rng, (130, 2100), dtype, "plain")
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


# Sums of float32 and of float64, in one cell of rows and in two.
@BOUNDED
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [33, 65])
def test_confident_positive_keeps_its_digits(kernel_backend, n, dtype, bounded):
    """1 - p is 1e-6. A column's is right to the rounding of 8 exps beside the positive's own."""
    kernel = load(kernel_backend)
    problem = Problem(dtype, stored(np.eye(n), dtype), n, np.array(18.0, real_of(dtype)))
    problem.positive, problem.bounded = np.arange(n), bounded
    one, nothing = np.ones(n, real_of(dtype)), np.zeros(n, real_of(dtype))
    f = run_forward(kernel, problem)
    of_rows, of_columns = (
        high.astype(float) + low - f.positive_score for high, low in f.lse(bounded)
    )
    surprise = np.log1p((n - 1) * np.exp(-18.0))
    np.testing.assert_allclose(of_rows, surprise, rtol=0.05 if dtype == "float32" else 1e-7)
    half_a_unit_of_lse = 2.0**-49  # the test's own, near 18 in double
    budget = 8 * EPS[dtype] + half_a_unit_of_lse
    np.testing.assert_allclose(of_columns, surprise, rtol=0, atol=budget)
    upstreams = {"grad_row_lse": nothing, "grad_column_lse": nothing, "grad_row_loss": one,
                 "grad_column_loss": nothing, "grad_positive_score": nothing}  # fmt: skip
    lse = [(np.log(np.exp(18.0) + n - 1) + np.zeros(n)) for _ in range(2)]
    pair = [(x.astype(real_of(dtype)), (x - x.astype(real_of(dtype))).astype(real_of(dtype)))
            for x in lse]  # fmt: skip
    gradient = run_backward(kernel, problem, pair, upstreams)
    np.testing.assert_allclose(
        np.diag(gradient), np.expm1(-surprise) * one, rtol=1e-6 if dtype == "float32" else 1e-7
    )


# Several cells each way, so that threads could merge them in another order.
@BOUNDED
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(kernel_backend, rng, dtype, bounded):
    kernel, problem = load(kernel_backend), draw(rng, (300, 2500), dtype, "all", bounded)
    upstreams = draw_upstreams(rng, problem)
    outcomes = set()
    for threads in (1, 2, 3):
        f = run_forward(kernel, problem, threads=threads)
        gradient = run_backward(kernel, problem, f.lse(bounded), upstreams, threads=threads)
        sigmoid = run_sigmoid(kernel, problem, 0.3, threads=threads)
        outcomes.add(f.bits() + gradient.tobytes() + b"".join(part.tobytes() for part in sigmoid))
    assert len(outcomes) == 1


@BOUNDED
def test_empty(kernel_backend, bounded):
    kernel = load(kernel_backend)
    for shape in ((0, 5), (5, 0), (0, 0)):
        memory, scale = np.zeros(shape, np.float32), np.array(1, np.float32)
        problem = Problem("float32", memory, shape[1], scale, bounded=bounded)
        for threads in (1, 2):
            f = run_forward(kernel, problem, whole_of(problem), threads)
            assert not f.row_sum.any()
            assert not f.column_sum.any()
            assert np.isneginf(f.row_maximum).all()
            upstreams = {"grad_row_lse": np.ones(shape[0], np.float32),
                         "grad_column_lse": np.ones(shape[1], np.float32)}  # fmt: skip
            run_backward(kernel, problem, f.lse(bounded), upstreams, whole_of(problem), threads)
            assert not run_sigmoid(kernel, problem, 1.0, threads=threads)[0].any()


# Written directly or by way of a buffer, as the dtype has it.
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_by_tiles_and_over_the_similarities(kernel_backend, rng, dtype):
    kernel, problem = load(kernel_backend), draw(rng, (150, 2300), dtype, "all")
    tiles = [(r, c) for r in cuts(150, 64) for c in cuts(2300, 700)]
    check_sigmoid(kernel, problem, tiles)
    apart = run_sigmoid(kernel, problem, 0.25)
    over = run_sigmoid(kernel, problem, 0.25, out=problem.memory)
    for a, b in zip(apart[:2], over[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(apart[2][:, :2300], over[2][:, :2300])


# On NumPy arrays


def arrays_of(problem):
    """The similarities as an array, and the options of pairs_forward."""
    options = {name: getattr(problem, name) for name in
               ("scale", "bias", "positive", "excluded", "row_group", "column_group")}  # fmt: skip
    return problem.memory[:, : problem.columns], options


# How arguments become a tile depends on each option, on the dtype (NumPy has no bfloat16), and on
# the bound, which is found here.
@BOUNDED
@pytest.mark.parametrize("options", ["plain", "groups", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays(kernel_backend, rng, dtype, bounded, options):
    problem = draw(rng, (70, 1100), dtype, options, bounded)
    similarity, given = arrays_of(problem)
    upstreams = {name: rng.standard_normal(length) for name, length in
                 (("grad_row_lse", 70), ("grad_column_lse", 1100), ("grad_positive_score", 70))
                 if name != "grad_positive_score" or problem.positive is not None}  # fmt: skip
    truth, eps = problem.truth(**upstreams), EPS[dtype]
    result = pairs_forward(similarity, backend=kernel_backend, **given)
    assert result.row_lse.dtype == result.column_lse.dtype == real_of(dtype)
    assert lse_error((result.row_lse, result.row_lse_low), truth.row_lse) < 4 * eps
    assert lse_error((result.column_lse, result.column_lse_low), truth.column_lse) < 4 * eps
    gradient = pairs_backward(result, similarity, backend=kernel_backend, **given, **upstreams)
    assert gradient.dtype == similarity.dtype
    # Scaled as a whole, so that it is measured where scores are.
    expected = truth.grad * np.reshape(problem.scale, (-1, 1))
    size = problem.scale.max()
    assert relative_error(gradient / size, expected / size) < 2 * gradient_budget(problem)
    if problem.positive is None:
        assert result.positive_score is None
    else:
        assert relative_error(result.positive_score, truth.positive_score) < 2 * eps


# Bounded and not; one scale for all goes into the upstreams, a scale by row too where there are no
# columns.
@pytest.mark.parametrize("scale", [4.0, 400.0], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("by_row", [False, True])
def test_arrays_rows_only(kernel_backend, rng, scale, by_row):
    similarity, positive = rng.standard_normal((9, 40)), rng.integers(0, 40, 9)
    factor = np.linspace(scale / 2, scale, 9) if by_row else scale
    given = {"scale": factor, "positive": positive}
    truth = reference.pairs(similarity, **given, grad_row_loss=1 / 9)
    result = pairs_forward(similarity, columns=False, backend=kernel_backend, **given)
    assert result.column_lse is None
    assert result.column_lse_low is None
    gradient = pairs_backward(
        result,
        similarity,
        grad_row_lse=1 / 9,
        grad_positive_score=-1 / 9,
        backend=kernel_backend,
        **given,
    )
    np.testing.assert_allclose(result.row_lse, truth.row_lse, rtol=1e-14)
    expected = truth.grad * np.reshape(factor, (-1, 1))
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-13)


def test_arrays_choose_by_the_largest_score(kernel_backend):
    """At one past the bound e^score would still be in range; at 90 it is not in float32."""
    for largest in (40.0, 41.0, 90.0, 1e6):
        similarity = np.array([[1.0, -1.0], [-1.0, -1.0]], np.float32)
        result = pairs_forward(similarity, scale=largest, backend=kernel_backend)
        expected = np.array([largest, np.log(2) - largest])
        assert lse_error((result.row_lse, result.row_lse_low), expected) < 2.0**-40 * 1e6
        np.testing.assert_allclose(result.row_lse, expected, rtol=1e-6)
    one = pairs_forward(np.ones((2, 2)), bias=np.array([-np.inf, 5.0]), backend=kernel_backend)
    assert one.row_lse.tolist() == [6, 6]
    assert one.column_lse.tolist() == [-np.inf, pytest.approx(6 + np.log(2))]


def test_arrays_keep_the_digits_of_a_confident_positive(kernel_backend):
    """Both losses of each row: 1 - p is 3e-8, less than half a unit of float32's 1."""
    n, scale = 3, 18.0
    similarity, given = np.eye(n, dtype=np.float32), {"scale": scale, "positive": np.arange(n)}
    result = pairs_forward(similarity, backend=kernel_backend, **given)
    tiny = np.zeros(n, np.float32)
    exact = np.log(np.exp(scale) + n - 1)
    high = np.float32(exact) + tiny
    result = result._replace(
        row_lse=high, row_lse_low=tiny + np.float32(exact - np.float64(high[0])),
        column_lse=high, column_lse_low=tiny + np.float32(exact - np.float64(high[0])),
    )  # fmt: skip
    gradient = pairs_backward(
        result, similarity, grad_row_lse=1.0, grad_column_lse=1.0, grad_positive_score=-2.0,
        backend=kernel_backend, **given,
    )  # fmt: skip
    expected = 2 * scale * np.expm1(scale - exact)
    np.testing.assert_allclose(np.diag(gradient), expected, rtol=1e-5)


def test_arrays_of_nothing(kernel_backend):
    for shape in ((0, 5), (5, 0), (0, 0)):
        similarity = np.zeros(shape, np.float32)
        result = pairs_forward(similarity, backend=kernel_backend)
        assert np.isneginf(result.row_lse).all()
        assert np.isneginf(result.column_lse).all()
        assert not result.row_lse_low.any()
        gradient = pairs_backward(
            result, similarity, grad_row_lse=1.0, grad_column_lse=1.0, backend=kernel_backend
        )
        assert gradient.shape == shape


# Arguments are checked in Python, the same for all builds.
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
    "group beyond int64": (ValueError, r"row_group: expected integers of int64, got 18446744073",
                           {"row_group": np.array([0, 2**64 - 1], np.uint64),
                            "column_group": [-1, 0, 1, 2]}),
    "scale NaN": (ValueError, r"scale: expected finite numbers of float32, got nan",
                  {"scale": np.nan}),
    "scale beyond float32": (ValueError, r"scale: .* of float32, got 1e\+300",
                             {"scale": [1.0, 1e300]}),
    "columns": (TypeError, r"columns: expected a bool, got str", {"columns": "no"}),
    "ragged": (ValueError, r"similarity: expected an array;", {"similarity": [[1.0], [1.0, 2.0]]}),
    "list of backends": (TypeError, r"backend: expected a str or None, got list",
                         {"backend": ["cython"]}),
    "threads": (ValueError, r"threads: expected", {"threads": 0}),
    "backend": (ValueError, r"backend: expected one of cython, numba", {"backend": "gpu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD.keys())
def test_bad_input(error, message, change):
    arguments = {"similarity": np.zeros((2, 4), np.float32), **change}
    with pytest.raises(error, match=message):
        pairs_forward(**arguments)


def test_bad_upstreams():
    similarity = np.zeros((2, 4), np.float32)
    result = pairs_forward(similarity, columns=False)
    for error, message, change in (
        (ValueError, r"grad_positive_score: expected None without positive",
         {"grad_positive_score": 1.0}),
        (ValueError, r"result.column_lse: expected that of columns=True", {"grad_column_lse": 1.0}),
        (ValueError, r"grad_row_lse: expected a scalar or shape \(2,\)", {"grad_row_lse": [1.0]}),
        (ValueError, r"result.row_lse: expected shape \(2,\) and float32",
         {"result": Pairs(np.zeros(2), np.zeros(2), None, None, None)}),
        (ValueError, r"result.row_lse: expected shape \(3,\)",
         {"similarity": np.zeros((3, 4), np.float32)}),
        (TypeError, r"result: expected the Pairs of pairs_forward, got NoneType", {"result": None}),
        (TypeError, r"result: expected the Pairs of pairs_forward, got ndarray",
         {"result": similarity, "similarity": result}),
    ):  # fmt: skip
        given = {"result": result, "similarity": similarity, "grad_row_lse": 1.0, **change}
        with pytest.raises(error, match=message):
            pairs_backward(**given)


@pytest.mark.parametrize("name", ["similarity", "scale", "bias", "positive"])
def test_a_mask_is_refused(name):
    given = {"similarity": np.zeros((2, 3), np.float32), "scale": np.ones(2)}
    given |= {"bias": np.zeros(3), "positive": np.array([0, 1])}
    given[name] = np.ma.masked_array(given[name])
    with pytest.raises(TypeError, match=f"{name}: expected an array without a mask"):
        pairs_forward(**given)
