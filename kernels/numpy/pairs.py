"""pairs on NumPy arrays: checks the arguments, allocates the results, and passes addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neglog.kernels.numpy.nll import (
    DTYPE_CODES,
    INT64_MAX,
    RealType,
    address,
    array_of,
    check_flag,
    check_kind_of_result,
    load_kernel,
    new_gradient,
    reals_of,
    row_stride,
    rows_of,
)
from neglog.kernels.threads import thread_count

# Where no score is farther from 0, e^score is in range and serves its row and its column alike.
BOUND: dict[RealType, float] = {np.float32: 40.0, np.float64: 300.0}


class Pairs(NamedTuple):
    """What pairs_forward returns: float32 arrays, float64 for float64 similarities.

    row_lse, row_lse_low: (N,) the log-sum-exp of a row's scores is row_lse + row_lse_low, to twice
        the digits.
    column_lse, column_lse_low: (M,) the same for the columns; None with columns=False.
    positive_score: (N,) the scores of the positives; None without `positive`.
    """

    row_lse: NDArray
    row_lse_low: NDArray
    column_lse: NDArray | None
    column_lse_low: NDArray | None
    positive_score: NDArray | None


class _Problem(NamedTuple):
    """The tile that forward and backward share, and the arrays it points into."""

    tile: tuple[Any, ...]
    real: RealType
    similarity: NDArray
    scale: NDArray
    positive: NDArray | None
    arrays: tuple[Any, ...]  # all that the tile points into; keeps them alive


def _reals(name: str, value: ArrayLike, length: int, real: RealType) -> NDArray:
    """A scalar, or (length,), as real numbers of the type that is computed in."""
    return reals_of(name, value, ((), (length,)), real)


def _scale(value: ArrayLike, length: int, real: RealType) -> NDArray:
    """() or (length,), finite in the type that is computed in."""
    with np.errstate(over="ignore"):
        scale = _reals("scale", value, length, real)
    bad = np.flatnonzero(~np.isfinite(scale))
    if len(bad):
        got = np.asarray(value).reshape(-1)[bad[0]]
        raise ValueError(f"scale: expected finite numbers of {np.dtype(real)}, got {got}")
    return scale


def _integers(name: str, value: ArrayLike, length: int) -> NDArray:
    a = array_of(name, value)
    if a.shape != (length,):
        raise ValueError(f"{name}: expected shape {(length,)}, got {a.shape}")
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {a.dtype}")
    return a


def _columns(
    name: str, value: ArrayLike | None, shape: tuple[int, int], lowest: int
) -> NDArray | None:
    """(N,) a column for each row, each in [lowest, M)."""
    if value is None:
        return None
    a = _integers(name, value, shape[0])
    outside = np.flatnonzero((a < lowest) | (a >= shape[1]))
    if len(outside):
        raise IndexError(
            f"{name} {a[outside[0]]} at row {outside[0]} is out of range: expected {lowest} <= "
            f"{name} < {shape[1]}"
        )
    return np.ascontiguousarray(a, np.int64)


def _groups(
    rows: ArrayLike | None, columns: ArrayLike | None, shape: tuple[int, int]
) -> tuple[NDArray | None, NDArray | None]:
    if rows is None and columns is None:
        return None, None
    if rows is None or columns is None:
        raise ValueError("row_group, column_group: expected both or neither, got one")
    return _group("row_group", rows, shape[0]), _group("column_group", columns, shape[1])


def _group(name: str, value: ArrayLike, length: int) -> NDArray:
    a = _integers(name, value, length)
    if a.dtype == np.uint64 and (a > INT64_MAX).any():  # as int64 it would be another group
        raise ValueError(f"{name}: expected integers of int64, got {a.max()}")
    return np.ascontiguousarray(a, np.int64)


def _bounded(similarity: NDArray, scale: NDArray, bias: NDArray | None, real: RealType) -> bool:
    """Whether every score is within BOUND, except where the bias is -inf. With a NaN it is not."""
    if similarity.size == 0:
        return True
    largest = max(float(similarity.max()), -float(similarity.min())) * float(np.abs(scale).max())
    if bias is not None:
        largest += float(np.abs(bias[bias != -np.inf]).max(initial=0))
    return largest <= BOUND[real]


def _problem(
    similarity: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike | None,
    positive: ArrayLike | None,
    excluded: ArrayLike | None,
    row_group: ArrayLike | None,
    column_group: ArrayLike | None,
) -> _Problem:
    x, code = rows_of("similarity", similarity)
    real: RealType = np.float64 if code == DTYPE_CODES["float64"] else np.float32
    factor = _scale(scale, x.shape[0], real)
    offset = None if bias is None else _reals("bias", bias, x.shape[1], real)
    match = _columns("positive", positive, x.shape, 0)
    left_out = _columns("excluded", excluded, x.shape, -1)
    groups = _groups(row_group, column_group, x.shape)
    tile = (
        code, *x.shape, 0, address(x), row_stride(x),
        address(factor), factor.ndim, address(offset), 0 if offset is None else offset.ndim,
        address(match), address(left_out), *map(address, groups),
        _bounded(x, factor, offset, real),
    )  # fmt: skip
    return _Problem(tile, real, x, factor, match, (x, factor, offset, match, left_out, groups))


class _States(NamedTuple):
    """The online log-sum-exps of rows or columns."""

    maximum: NDArray
    sum: NDArray

    @classmethod
    def empty(cls, length: int, real: RealType) -> _States:
        return cls(np.full(length, -np.inf, real), np.zeros(length))

    def lse(self, bounded: bool) -> tuple[NDArray, NDArray]:
        """The log-sum-exps as unevaluated sums of two numbers, and 0 beside what is not finite."""
        maximum = np.zeros(1) if bounded else self.maximum.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_sum = np.log(self.sum)
            total = maximum + log_sum
            back = total - maximum
            lost = (maximum - (total - back)) + (log_sum - back)  # Knuth's two-sum
            high = total.astype(self.maximum.dtype)
            low = np.where(np.isfinite(high), (total - high) + lost, 0)
        return high, low.astype(high.dtype)


def pairs_forward(
    similarity: ArrayLike,
    *,
    scale: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    positive: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
    row_group: ArrayLike | None = None,
    column_group: ArrayLike | None = None,
    columns: bool = True,
    threads: int | None = None,
    backend: str | None = None,
) -> Pairs:
    """Log-sum-exps over the rows and the columns of scores z, (N, M). Returns `Pairs`.

    z[i, j] = scale[i] * similarity[i, j] + bias[j]; an excluded pair's score is -inf.

    similarity: (N, M) float32, float64, float16 or (from ml_dtypes) bfloat16. Its rows may be apart
        in memory. Everything is computed in float32, float64 similarities in float64.
    scale: a number, or (N,). InfoNCE's 1 / temperature.
    bias: a number, or (M,); -inf excludes a column.
    positive: (N,) integers in [0, M), the column of each row's positive, whose score is returned.
        A row's InfoNCE loss is row_lse - positive_score, that of its column
        column_lse[positive] - positive_score.
    excluded: (N,) a column to exclude from each row, -1 for none.
    row_group, column_group: (N,) and (M,) integers. A pair of one group is excluded, unless it is
        the row's positive.
    columns: False leaves the columns' log-sum-exps out.
    threads: how many threads to use, no more than the cores or 64; every core if None.
    backend: "cython" or "numba"; the first that can run if None.

    A row or column whose every pair is excluded has a log-sum-exp of -inf.

    Raises IndexError for a column out of range, ValueError for a wrong shape or value, TypeError
    for a wrong dtype, ImportError if the backend cannot run.
    """
    check_flag("columns", columns)
    kernel = load_kernel("pairs", backend)
    problem = _problem(similarity, scale, bias, positive, excluded, row_group, column_group)
    shape, bounded = problem.similarity.shape, problem.tile[-1]
    by_row, by_column = (_States.empty(length, problem.real) for length in shape)
    positive_score = None if positive is None else np.empty(shape[0], problem.real)
    kernel.forward(
        problem.tile, address(by_row.maximum), address(by_row.sum),
        address(by_column.maximum) if columns else 0, address(by_column.sum) if columns else 0,
        address(positive_score), thread_count(threads),
    )  # fmt: skip
    row_lse, row_lse_low = by_row.lse(bounded)
    column_lse, column_lse_low = by_column.lse(bounded) if columns else (None, None)
    return Pairs(row_lse, row_lse_low, column_lse, column_lse_low, positive_score)


def _upstream(name: str, grad: ArrayLike | None, length: int) -> NDArray:
    if grad is None:
        return np.zeros(length)
    return np.array(np.broadcast_to(_reals(name, grad, length, np.float64), (length,)))


def _share(wanted: NDArray, available: NDArray) -> NDArray:
    """As much of `wanted` as `available` has, of its sign: between 0 and `available`."""
    return np.clip(wanted, np.minimum(available, 0), np.maximum(available, 0))


def _saved(
    name: str, lse: NDArray | None, low: NDArray | None, length: int, real: RealType
) -> tuple[NDArray, NDArray]:
    if lse is None or low is None:
        raise ValueError(f"result.{name}: expected that of columns=True, got None")
    if lse.shape != (length,) or lse.dtype != real:
        raise ValueError(
            f"result.{name}: expected shape {(length,)} and {np.dtype(real)}, those of these "
            f"similarities, got {lse.shape} and {lse.dtype}"
        )
    return np.ascontiguousarray(lse), np.ascontiguousarray(low)


def pairs_backward(
    result: Pairs,
    similarity: ArrayLike,
    *,
    grad_row_lse: ArrayLike | None = None,
    grad_column_lse: ArrayLike | None = None,
    grad_positive_score: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    positive: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
    row_group: ArrayLike | None = None,
    column_group: ArrayLike | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> NDArray:
    """The gradient of the similarities, (N, M) of their dtype, given those of the `Pairs`.

    result: what pairs_forward returned for the same arguments. similarity and the options are to be
        as they were there.
    grad_row_lse, grad_positive_score: a number, or (N,); grad_column_lse: a number, or (M,).
        None is 0. For the sum of the rows' losses they are 1, -1 and None, for the mean 1 / N,
        -1 / N and None.

    Where grad_positive_score is negative, as in a loss lse - positive_score, it is paired with the
    gradients of the log-sum-exps, so that p - 1 keeps its digits where p is nearly 1.

    Raises what pairs_forward does, and ValueError if `result` does not fit or lacks what a gradient
    is given for.
    """
    check_kind_of_result(result, Pairs, "pairs_forward")
    kernel = load_kernel("pairs", backend)
    problem = _problem(similarity, scale, bias, positive, excluded, row_group, column_group)
    real, (rows, columns) = problem.real, problem.similarity.shape
    of_rows = _upstream("grad_row_lse", grad_row_lse, rows)
    of_columns = _upstream("grad_column_lse", grad_column_lse, columns)
    # grad_positive_score = rest - grad_row_loss - grad_column_loss, the losses lse - positive_score
    wanted = -_upstream("grad_positive_score", grad_positive_score, rows)
    grad_row_loss, grad_column_loss = np.zeros((2, rows))
    if problem.positive is not None:
        grad_row_loss = _share(wanted, of_rows)
        grad_column_loss = _share(wanted - grad_row_loss, of_columns[problem.positive])
    elif grad_positive_score is not None:
        raise ValueError("grad_positive_score: expected None without positive, got a gradient")
    # The similarities' gradient is scale times that of the scores. One scale for all goes into the
    # upstreams. A scale by row cannot where gradients come by columns too: there it multiplies
    # the result.
    scale_after = problem.scale.ndim == 1 and grad_column_lse is not None
    factor = 1.0 if scale_after else problem.scale.astype(np.float64)
    rest = grad_row_loss + grad_column_loss - wanted
    by_row, row_loss, column_loss, rest = (
        (upstream * factor).astype(real)
        for upstream in (of_rows, grad_row_loss, grad_column_loss, rest)
    )
    saved = _saved("row_lse", result.row_lse, result.row_lse_low, rows, real)
    row = *map(address, saved), address(by_row), address(row_loss)
    column: tuple[int, ...] = (0, 0, 0, 0)
    if grad_column_lse is not None:
        kept = _saved("column_lse", result.column_lse, result.column_lse_low, columns, real)
        by_column = (of_columns * factor).astype(real)
        column = *map(address, kept), address(by_column), address(column_loss)
    out = new_gradient(problem.similarity)
    kernel.backward(
        problem.tile, row, column, address(rest), address(out), columns, thread_count(threads)
    )
    if scale_after:
        np.multiply(out, problem.scale[:, None], out=out, casting="unsafe")
    return out
