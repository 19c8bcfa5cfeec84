"""What the cases of contrastive losses share: embeddings, and the truth about a slice of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..contender import Grads, Problem, Spec, Truth, checked_rows, float64_array
from . import Shape

CHUNK = 1024  # rows of the oracle's matrix at once
TILE = 4096  # rows and columns of the yardstick's matmul: all scores may not fit in memory
MATMULS = 3  # the mathematics: scores, and the gradients of both sides


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
    count, like = len(matrix.query), matrix.query
    column_lse = like.new_full((len(matrix.key),), -torch.inf)
    total = 0.0
    for rows in torch.arange(count, device=like.device).split(CHUNK):
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
    gradient.scatter_add_(1, own, like.new_full(own.shape, -float(sides)))
    return total / (sides * count), gradient / (sides * count)


def embeddings(
    count: int, features: int, dtype: str, seed: int, device: str
) -> tuple[Tensor, Tensor]:
    """Two normalised (count, features) whose rows belong together, but so loosely as early in
    training: a loss near 0 would have no digits to check."""
    generator = torch.Generator(device).manual_seed(seed)
    first, noise = (
        torch.randn(count, features, generator=generator, device=device) for _ in range(2)
    )
    second = first + 6 * noise
    kind = getattr(torch, dtype)
    return F.normalize(first, dim=1).to(kind), F.normalize(second, dim=1).to(kind)


def through_normalisation(gradient: Tensor, rows: Tensor) -> Tensor:
    """The gradient by embeddings that are then normalised: nothing passes along the row itself."""
    return gradient - rows * (gradient * rows).sum(1, keepdim=True)


def matmul_of_a_tile(left: Tensor, columns: int) -> tuple[int, Callable[[], object]]:
    """A product of scores and embeddings in the dtype of `left`, and its operations."""
    rows, width, features = min(len(left), TILE), min(columns, TILE), left.shape[1]
    scores, part = (
        left.new_empty(rows, width).uniform_(),
        left.new_empty(width, features).uniform_(),
    )
    out = left.new_empty(rows, features)
    return 2 * rows * width * features, lambda: torch.mm(scores, part, out=out)


def problem_of(
    op: str,
    shape: Shape,
    dtype: str,
    leaves: tuple[Tensor, ...],
    truth: tuple[float, Tensor] | None,
) -> Problem:
    """truth: the loss, and the gradient of the first leaf at the rows that are checked."""
    rows, features = shape["rows"], shape["features"]
    operations = MATMULS * 2 * rows * rows * features
    of_tile, yardstick = matmul_of_a_tile(leaves[0], rows)
    picked = checked_rows(rows, str(leaves[0].device))

    def compared(grads: Grads) -> tuple:
        return (float64_array(grads[0][picked]),)

    return Problem(
        spec=Spec(
            op, shape, dtype, sum(leaf.nbytes for leaf in leaves), "matmul of a tile",
            of_tile / operations, operations, "GFLOP/s",
            f"{MATMULS} matmuls of rows x features x rows, 2 operations each",
        ),
        leaves=tuple(leaf.detach().requires_grad_() for leaf in leaves),
        fixed=(),
        check_fixed=(),
        truth=None if truth is None else Truth(truth[0], (float64_array(truth[1]),)),
        compared=compared,
        yardstick=yardstick,
        by_norm=True,
    )  # fmt: skip
