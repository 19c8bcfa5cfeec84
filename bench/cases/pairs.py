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
SCORE_BYTES = 1 << 28  # of the yardstick's scores at once: all of them may not fit in memory
YARDSTICK = "three matmuls by torch.mm, best round"
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


def three_matmuls(left: Tensor, right: Tensor, scores_again: bool = False) -> Callable[[], object]:
    """What any implementation multiplies, by torch.mm: the scores left @ right^T, or these twice,
    and such a matrix with `right` and, transposed, with `left`."""
    left, right = left.detach(), right.detach()
    height = max(1, SCORE_BYTES // max(1, len(right) * left.itemsize))
    scores = left.new_empty(min(height, len(left)), len(right))
    by_left, by_right = torch.empty_like(left), torch.empty_like(right)

    def multiply() -> None:
        for start in range(0, len(left), height):
            part, out = left[start : start + height], by_left[start : start + height]
            s = scores[: len(part)]
            for _ in range(1 + scores_again):
                torch.mm(part, right.t(), out=s)
            torch.mm(s, right, out=out)
            torch.addmm(by_right, s.t(), part, beta=int(start > 0), out=by_right)

    return multiply


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
    picked = checked_rows(rows, str(leaves[0].device))

    def compared(grads: Grads) -> tuple:
        return (float64_array(grads[0][picked]),)

    return Problem(
        spec=Spec(
            op, shape, dtype, sum(leaf.nbytes for leaf in leaves), YARDSTICK, 1, operations,
            "GFLOP/s", f"{MATMULS} matmuls of rows x features x rows, 2 operations each",
            of_rounds=min,
        ),
        leaves=tuple(leaf.detach().requires_grad_() for leaf in leaves),
        fixed=(),
        check_fixed=(),
        truth=None if truth is None else Truth(truth[0], (float64_array(truth[1]),)),
        compared=compared,
        yardstick=three_matmuls(leaves[0], leaves[1 % len(leaves)]),
        by_norm=True,
    )  # fmt: skip
