"""The kernels of pairs on NumPy arrays: checks, memory, and the addresses they want. No torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neglog.kernels import load
from neglog.kernels.numpy.nll import DTYPE_CODES, address, new_gradient, rows_of
from neglog.kernels.threads import checked

# No score farther from 0: then e^score is in range, and serves its row and its column alike.
BOUND = {np.float32: 40.0, np.float64: 300.0}


class Pairs(NamedTuple):
    """Log-sum-exps by row (N,) and by column (M,), and the positives' scores (N,).

    lse + lse_low is a log-sum-exp to twice the digits. What was not asked for is None.
    """

    row_lse: NDArray
    row_lse_low: NDArray
    column_lse: NDArray | None
    column_lse_low: NDArray | None
    positive: NDArray | None


class _Problem(NamedTuple):
    """The tile that forward and backward share, and the arrays it points into."""

    tile: tuple
    real: type
    similarity: NDArray
    scale: NDArray
    positive: NDArray | None
    keep_alive: tuple


def _reals(name: str, value: ArrayLike, length: int, real: type) -> NDArray:
    """A scalar, or one number for each of `length`."""
    a = np.asarray(value)
    if a.dtype.name not in DTYPE_CODES and a.dtype.kind not in "iub":
        raise TypeError(f"{name}: expected real numbers, got {a.dtype}")
    if a.shape not in ((), (length,)):
        raise ValueError(f"{name}: expected a scalar or shape {(length,)}, got {a.shape}")
    return np.array(a, real, order="C")


def _integers(name: str, value: ArrayLike, length: int) -> NDArray:
    a = np.asarray(value)
    if a.shape != (length,):
        raise ValueError(f"{name}: expected shape {(length,)}, got {a.shape}")
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {a.dtype}")
    return a


def _columns(name: str, value: ArrayLike | None, shape: tuple, lowest: int) -> NDArray | None:
    """A column of each row."""
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
    rows: ArrayLike | None, columns: ArrayLike | None, shape: tuple
) -> tuple[NDArray | None, NDArray | None]:
    if rows is None and columns is None:
        return None, None
    if rows is None or columns is None:
        raise ValueError("row_group, column_group: expected both or neither, got one")
    return (
        np.ascontiguousarray(_integers("row_group", rows, shape[0]), np.int64),
        np.ascontiguousarray(_integers("column_group", columns, shape[1]), np.int64),
    )


def _bounded(similarity: NDArray, scale: NDArray, bias: NDArray | None, real: type) -> bool:
    """Whether every score but those of -inf by their bias is within BOUND. With NaN: no."""
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
    real = np.float64 if code == DTYPE_CODES["float64"] else np.float32
    factor = _reals("scale", scale, x.shape[0], real)
    offset = None if bias is None else _reals("bias", bias, x.shape[1], real)
    match = _columns("positive", positive, x.shape, 0)
    left_out = _columns("excluded", excluded, x.shape, -1)
    groups = _groups(row_group, column_group, x.shape)
    tile = (
        code, *x.shape, 0, address(x), x.strides[0] // x.itemsize,
        address(factor), factor.ndim, address(offset), 0 if offset is None else offset.ndim,
        address(match), address(left_out), *map(address, groups),
        _bounded(x, factor, offset, real),
    )  # fmt: skip
    return _Problem(tile, real, x, factor, match, (x, factor, offset, match, left_out, groups))


class _States(NamedTuple):
    maximum: NDArray
    sum: NDArray

    @classmethod
    def empty(cls, length: int, real: type) -> _States:
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
    """Log-sum-exps of the rows and, if `columns`, the columns of scale * similarity + bias.

    similarity: (N, M) float32, float64, float16 or (from ml_dtypes) bfloat16; any row stride.
    scale: a scalar or (N,). bias: a scalar or (M,); -inf leaves a column out.
    positive: (N,) the column of each row whose score is wanted too: that of a row's InfoNCE loss,
        row_lse - positive, and of its column's, column_lse[positive] - positive.
    excluded: (N,) a column that each row leaves out, -1 for none.
    row_group, column_group: (N,) and (M,) integers; pairs of one group are left out, unless they
        are a row's positive.
    Results are float32, float64 for float64 similarities. A row or column of which nothing is left
    has -inf.

    Raises IndexError for a column out of range, ValueError and TypeError for shapes and dtypes.
    """
    kernel = load("pairs", backend)
    problem = _problem(similarity, scale, bias, positive, excluded, row_group, column_group)
    shape, bounded = problem.similarity.shape, problem.tile[-1]
    by_row, by_column = (_States.empty(length, problem.real) for length in shape)
    score = None if positive is None else np.empty(shape[0], problem.real)
    kernel.forward(
        problem.tile, address(by_row.maximum), address(by_row.sum),
        address(by_column.maximum) if columns else 0, address(by_column.sum) if columns else 0,
        address(score), checked(threads),
    )  # fmt: skip
    of_columns = by_column.lse(bounded) if columns else (None, None)
    return Pairs(*by_row.lse(bounded), *of_columns, score)


def _upstream(name: str, grad: ArrayLike | None, length: int) -> NDArray:
    if grad is None:
        return np.zeros(length)
    return np.array(np.broadcast_to(_reals(name, grad, length, np.float64), (length,)))


def _share(wanted: NDArray, available: NDArray) -> NDArray:
    """As much of what is available, above or below 0, as is wanted."""
    return np.clip(wanted, np.minimum(available, 0), np.maximum(available, 0))


def _saved(name: str, lse: NDArray | None, low: NDArray | None, length: int, real: type) -> tuple:
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
    grad_positive: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    positive: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
    row_group: ArrayLike | None = None,
    column_group: ArrayLike | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> NDArray:
    """The gradient of the similarities, (N, M), given those of what `pairs_forward` returned.

    grad_row_lse, grad_positive: a scalar or (N,). grad_column_lse: a scalar or (M,).
    For the mean of the rows' losses pass grad_row_lse = 1 / N and grad_positive = -1 / N. What
    grad_positive takes back from the log-sum-exps it shares out among them, so that p - 1 keeps
    its digits where p nears 1.
    """
    kernel = load("pairs", backend)
    problem = _problem(similarity, scale, bias, positive, excluded, row_group, column_group)
    real, (rows, columns) = problem.real, problem.similarity.shape
    of_rows = _upstream("grad_row_lse", grad_row_lse, rows)
    of_columns = _upstream("grad_column_lse", grad_column_lse, columns)
    own = -_upstream("grad_positive", grad_positive, rows)
    hard_rows, hard_columns = np.zeros((2, rows))
    if problem.positive is not None:
        hard_rows = _share(own, of_rows)
        hard_columns = _share(own - hard_rows, of_columns[problem.positive])
    elif grad_positive is not None:
        raise ValueError("grad_positive: expected None without positive, got a gradient")
    # One factor for all goes into the upstreams; each row's own cannot where columns flow in too.
    apart = problem.scale.ndim == 1 and grad_column_lse is not None
    factor = 1.0 if apart else problem.scale.astype(np.float64)
    by_row = [
        (upstream * factor).astype(real)
        for upstream in (of_rows, hard_rows, hard_columns, hard_rows + hard_columns - own)
    ]
    saved = _saved("row_lse", result.row_lse, result.row_lse_low, rows, real)
    row = *map(address, saved), address(by_row[0]), address(by_row[1])
    column = 0, 0, 0, 0
    if grad_column_lse is not None:
        kept = _saved("column_lse", result.column_lse, result.column_lse_low, columns, real)
        by_column = (of_columns * factor).astype(real)
        column = *map(address, kept), address(by_column), address(by_row[2])
    out = new_gradient(problem.similarity)
    kernel.backward(
        problem.tile, row, column, address(by_row[3]), address(out), columns, checked(threads)
    )
    if apart:
        np.multiply(out, problem.scale[:, None], out=out, casting="unsafe")
    return out
