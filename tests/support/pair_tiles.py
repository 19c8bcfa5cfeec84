"""Tiles of similarities for tests of pairs: drawn, run by address, and compared with the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neglog import reference
from tests.support.errors import relative_error

CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
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
    """Similarities, in an array with columns to spare, and what makes scores of them."""

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
    positive_score: np.ndarray

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
            address(f.positive_score, row), threads,
        )  # fmt: skip
    return f


def draw_upstreams(rng, problem):
    rows, columns = problem.shape
    upstreams = {
        "grad_row_lse": rng.standard_normal(rows),
        "grad_column_lse": rng.standard_normal(columns),
    }
    if problem.positive is not None:
        for name in ("grad_row_loss", "grad_column_loss", "grad_positive_score"):
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
            address(upstreams.get("grad_positive_score"), row), address(out, row, column),
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
    assert lse_error(lse[0], truth.row_lse) < 4 * eps
    assert lse_error(lse[1], truth.column_lse) < 4 * eps
    if problem.positive is not None:
        assert relative_error(f.positive_score, truth.positive_score) < 2 * eps
    error = relative_error(read(gradient[:, : problem.columns], problem.dtype), truth.grad)
    assert error < gradient_budget(problem)
    assert not read(gradient[:, problem.columns :], problem.dtype).any()


def run_sigmoid(kernel, problem, grad_scale, tiles=None, threads=1, out=None):
    """Losses and gradients' sums by row, and the gradient."""
    rows = problem.shape[0]
    loss, grad_sum = np.zeros((2, rows))
    out = np.zeros_like(problem.memory) if out is None else out
    for down, across in tiles or whole_of(problem):
        row = down.start
        kernel.sigmoid(
            problem.tile(down, across), grad_scale, address(loss, row), address(grad_sum, row),
            address(out, row, across.start), out.shape[1], threads,
        )  # fmt: skip
    return loss, grad_sum, out


def check_sigmoid(kernel, problem, tiles=None):
    truth = problem.truth(grad_sigmoid=0.25)
    loss, grad_sum, out = run_sigmoid(kernel, problem, 0.25, tiles)
    # 16 roundings in a partial sum of a block, then those of 64 partial sums in double.
    assert relative_error(loss, truth.sigmoid) < 16 * EPS[problem.dtype]
    assert relative_error(grad_sum, truth.sigmoid_grad.sum(axis=1)) < 16 * EPS[problem.dtype]
    gradient = read(out[:, : problem.columns], problem.dtype)
    assert relative_error(gradient, truth.sigmoid_grad) < gradient_budget(problem)
    assert not read(out[:, problem.columns :], problem.dtype).any()
