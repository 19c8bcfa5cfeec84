"""What the cases of contrastive losses share: embeddings, and the truth about a slice of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neglog.benchmark.cases import Problem, Shape, Spec, Truth
from neglog.benchmark.cases.cross_entropy import backend_of
from neglog.losses import _pairs as comparison
from neglog.tiles import gemm

CHECKED_ROWS = 64
CHUNK = 1024  # rows of the oracle's matrix at once


class Matrix(NamedTuple):
    """Scores scale * <query_i, key_j> in float64; row i's positive is column (i + shift) mod M."""

    query: Tensor
    key: Tensor
    scale: float
    shift: int = 0
    without_self: bool = False

    def scores(self, rows: Tensor) -> Tensor:
        z = self.scale * (self.query[rows] @ self.key.t())
        return z.scatter(1, rows[:, None], -torch.inf) if self.without_self else z

    def positive(self, rows: Tensor) -> Tensor:
        return (rows + self.shift) % len(self.key)


def truth_of(matrix: Matrix, picked: Tensor, columns: bool) -> tuple[float, Tensor]:
    """Mean loss, of rows or of rows and columns, and its gradient by the scores of some rows."""
    count = len(matrix.query)
    column_lse = torch.full((len(matrix.key),), -torch.inf, dtype=torch.float64)
    total = 0.0
    for rows in torch.arange(count).split(CHUNK):
        z = matrix.scores(rows)
        score = z.gather(1, matrix.positive(rows)[:, None]).squeeze(1)
        total += float((z.logsumexp(1) - score).sum())
        column_lse = torch.logaddexp(column_lse, z.logsumexp(0))
        if columns:
            total -= float(score.sum())
    z = matrix.scores(picked)
    gradient = z.softmax(1)
    if columns:
        total += float(column_lse.sum())
        gradient = gradient + (z - column_lse).exp()
    sides = 1 + columns
    own = matrix.positive(picked)[:, None]
    gradient.scatter_add_(1, own, torch.full(own.shape, -float(sides), dtype=torch.float64))
    return total / (sides * count), gradient / (sides * count)


def embeddings(count: int, features: int, dtype: str, seed: int) -> tuple[Tensor, Tensor]:
    """Two normalised (count, features) whose rows belong together, but so loosely as early in
    training: a loss near 0 would have no digits to verify."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, features, generator=generator)
    second = first + 6 * torch.randn(count, features, generator=generator)
    kind = getattr(torch, dtype)
    return F.normalize(first, dim=1).to(kind), F.normalize(second, dim=1).to(kind)


def some_rows(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, CHECKED_ROWS)).round().long()


def problem_of(
    shape: Shape, dtype: str, leaves: tuple[Tensor, ...], matmuls: int, loss: float, grad: Tensor
) -> Problem:
    """The gradient of the first leaf is compared, at some rows."""
    rows, features = shape["rows"], shape["features"]
    picked = some_rows(rows)
    kind = getattr(torch, dtype)
    width = min(rows, gemm.COLUMNS)
    left, right = torch.rand(rows, features).to(kind), torch.rand(rows, width)
    right = right.to(gemm.tile_dtype(left))
    part = torch.rand(width, features).to(kind)

    def compared(grads: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
        return (grads[0][picked].double().numpy(),)

    return Problem(
        spec=Spec(
            shape, dtype, sum(leaf.nbytes for leaf in leaves), "matmul of a tile",
            width / rows / matmuls, matmuls * 2 * rows * rows * features, "GFLOP/s",
            f"{matmuls} matmuls of rows x features x rows, 2 operations each",
        ),
        leaves=tuple(leaf.detach().requires_grad_() for leaf in leaves),
        fixed=(),
        check_fixed=(),
        truth=Truth(loss, (grad.numpy(),)),
        compared=compared,
        yardstick=lambda: gemm.product(right, part, left),
        by_norm=True,
    )  # fmt: skip


def default_backend(shape: Shape, dtype: str) -> str:
    """What runs such a loss."""
    like = torch.empty(shape["rows"], 0, dtype=getattr(torch, dtype))
    return backend_of(gemm.few(like, like, comparison.FEW))
