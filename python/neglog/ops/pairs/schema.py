"""The ops of pairs.

neglog::pairs            row and column log-sum-exps, and losses of positives
neglog::pairs_backward   gradients of query, key and scale; itself differentiable
neglog::pairs_statistics         of each row, whether its positive scores highest, and the entropy
neglog::pairs_sigmoid            the sum over all pairs of -log sigmoid(+-score), and its gradients
neglog::pairs_sigmoid_backward   those gradients times the upstream; itself differentiable

One tile of similarities, on CUDA alone (csrc/pairs/pairs.cu):

neglog::pairs_tile            merges a tile into the states of its rows and columns
neglog::pairs_tile_backward   writes the gradient of its scores
neglog::pairs_tile_sigmoid    adds to its rows' losses by sigmoids, writes their gradient

    score_ij = scale_i <query_i, key_j> + bias_j, or -inf where the pair is excluded

Shapes: query (N, D), key (M, D); scale () or (N,), bias () or (M,) and everything returned in the
accumulation dtype. positive (N,) int64: the column of each row's positive. excluded (N,) int64: a
column that its row leaves out, -1 for none. query_group (N,), key_group (M,) int64: pairs of one
group are left out, but for the positive. symmetric: key is query and positive its own inverse, so
the tiles on and above the diagonal are enough. workspace: bytes for similarities, which have the
dtype tile_dtype. keep: all similarities are returned for the backward, which then makes none.

Returned, (0,) where not asked for or without a positive: row_loss (N,) = row_lse - positive_score;
column_loss (N,) = column_lse[positive] - positive_score; row_lse (N,), column_lse (M,),
positive_score (N,); then what the backward needs: row_low (N,), column_low (M,), kept (N, M).

pairs_sigmoid has scale and bias () and a positive; it returns the loss () and gradients of query,
key, scale and bias, (0,) where not wanted. Pairs that are left out have no part in its sum. Its
upstream is one number, so a tile's gradient is known as soon as the tile is: 3 matmuls in all. A
graph made without gradients wants none; if they are asked of it later, the backward forms them.

pairs_statistics returns correct, entropy and best (N,): the column with the highest score, or -1
for a positive that is not among the keys.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog.ops.define import Op
from neglog.ops.dtypes import real_dtype
from neglog.ops.memory import contiguous
from neglog.tiles import plan

TILES = "int workspace, ScalarType tile_dtype, str backend"
PAIRS = (
    "Tensor query, Tensor key, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded, "
    f"Tensor? query_group, Tensor? key_group, bool columns, bool symmetric, {TILES}"
)
forward = Op(
    f"pairs({PAIRS}, bool keep) -> (Tensor row_loss, Tensor column_loss, Tensor row_lse, "
    "Tensor column_lse, Tensor positive_score, Tensor row_low, Tensor column_low, Tensor kept)"
)
backward = Op(
    "pairs_backward(Tensor? grad_row_loss, Tensor? grad_column_loss, Tensor? grad_row_lse, "
    f"Tensor? grad_column_lse, Tensor? grad_positive_score, {PAIRS}, Tensor row_lse, "
    "Tensor column_lse, Tensor row_low, Tensor column_low, Tensor kept, int[3] wanted) -> "
    "(Tensor query, Tensor key, Tensor scale)"
)
sigmoid = Op(
    "pairs_sigmoid(Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor positive, "
    f"Tensor? query_group, Tensor? key_group, {TILES}, int[4] wanted) -> (Tensor loss, "
    "Tensor grad_query, Tensor grad_key, Tensor grad_scale, Tensor grad_bias)"
)
sigmoid_backward = Op(
    "pairs_sigmoid_backward(Tensor grad, Tensor query, Tensor key, Tensor scale, Tensor bias, "
    "Tensor positive, Tensor? query_group, Tensor? key_group, Tensor grad_query, Tensor grad_key, "
    f"Tensor grad_scale, Tensor grad_bias, {TILES}, int[4] wanted) -> "
    "(Tensor query, Tensor key, Tensor scale, Tensor bias)"
)
statistics = Op(
    f"pairs_statistics(Tensor positive_score, {PAIRS}) -> "
    "(Tensor correct, Tensor entropy, Tensor best)"
)
# What flows into the backward.
UPSTREAM = (
    "grad_row_loss", "grad_column_loss", "grad_row_lse", "grad_column_lse", "grad_positive_score",
)  # fmt: skip

_TILE = (
    "Tensor similarity, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded, "
    "Tensor? query_group, Tensor? key_group, int first_column"
)
CUDA_TILE = [
    Op(schema, compiled=False)
    for schema in (
        f"pairs_tile({_TILE}, Tensor(a!) row_maximum, Tensor(b!) row_sum, "
        "Tensor(c!)? column_maximum, Tensor(d!)? column_sum, Tensor(e!)? positive_score) -> ()",
        f"pairs_tile_backward({_TILE}, Tensor row_lse, Tensor row_low, "
        "Tensor row_softmax_weight, Tensor? row_target_weight, Tensor? column_lse, "
        "Tensor? column_low, Tensor? column_softmax_weight, Tensor? column_target_weight, "
        "Tensor? grad_positive_score, Tensor(a!) out) -> ()",
        f"pairs_tile_sigmoid({_TILE}, Tensor(a!) loss, Tensor(b!) slopes, Tensor(c!) out) -> ()",
    )
]

# Scores up to this size need no maximum: e^40 and the sum of a billion of them are float32's.
BOUNDED = {torch.float32: 40.0, torch.float64: 300.0}
FEW_PAIRS = 1 << 14


class Pairs(NamedTuple):
    """What is compared, and how: the arguments with which the schemas begin."""

    query: Tensor
    key: Tensor
    scale: Tensor
    bias: Tensor | None
    positive: Tensor | None
    excluded: Tensor | None
    query_group: Tensor | None
    key_group: Tensor | None
    columns: bool
    symmetric: bool
    workspace: int
    tile_dtype: torch.dtype
    backend: str

    @classmethod
    def of(cls, arguments: Any) -> Pairs:
        return cls(*attrgetter(*cls._fields)(arguments))

    @classmethod
    def of_sigmoid(
        cls, query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, positive: Tensor,
        query_group: Tensor | None, key_group: Tensor | None, *tiles: Any,
    ) -> Pairs:  # fmt: skip
        """Of the arguments of pairs_sigmoid; `tiles` may be left out where none are made."""
        tiles = tiles or (0, query.dtype, "")
        return cls(query, key, scale, bias, positive, None, query_group, key_group, False, False,
                   *tiles)  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys. Not len(), which is a function of Python's for a tensor."""
        return self.query.shape[0], self.key.shape[0]

    @property
    def real(self) -> torch.dtype:
        return real_dtype(self.query.dtype)

    def rows(self, part: slice) -> Pairs:
        """Some queries against all keys."""

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[part]

        return self._replace(
            query=self.query[part], scale=self.scale[part] if self.scale.dim() else self.scale,
            positive=of_rows(self.positive), excluded=of_rows(self.excluded),
            query_group=of_rows(self.query_group),
        )  # fmt: skip

    def ready(self) -> Pairs:
        """As the kernels want them: contiguous and aligned, the small ones in the accumulation
        dtype."""
        dtypes = (*(self.query.dtype,) * 2, *(self.real,) * 2, *(torch.int64,) * 4)
        given: Any = zip(self, dtypes, self._fields, strict=False)
        ready: list[Any] = [
            x if x is None else contiguous(x if x.dtype == dtype else x.to(dtype), name)
            for x, dtype, name in given
        ]
        return Pairs(*ready, *self[len(dtypes) :])

    def bounded(self) -> bool:
        """Whether no score can be too large, or too small, for e^score; of few pairs it is not
        asked, which takes longer than their second exp."""
        rows, columns = self.shape
        if rows * columns <= FEW_PAIRS:
            return False
        real = self.real
        of_query, of_key = (x.to(real).norm(dim=1).amax() for x in (self.query, self.key))
        bound = self.scale.abs().amax() * of_query * of_key
        if self.bias is not None:
            bound = bound + self.bias.abs().where(self.bias != -torch.inf, 0).amax()
        return bool(bound <= BOUNDED[real])


class Marginal(NamedTuple):
    """What flows in by the log-sum-exps of rows or columns.

    A score's gradient is softmax_weight p, and less target_weight where it is a row's positive.
    """

    lse: Tensor
    low: Tensor
    softmax_weight: Tensor
    target_weight: Tensor | None

    def parts(self, at: slice, rows: slice) -> tuple[Tensor | None, ...]:
        """Of a tile: target_weight is by row for columns too."""
        target_weight = None if self.target_weight is None else self.target_weight[rows]
        return (*(part[at] for part in self[:3]), target_weight)


class Upstream(NamedTuple):
    """The five gradients that flow in, divided by `size`."""

    row: Marginal
    column: Marginal | None
    positive_score: Tensor | None
    size: float | Tensor


# Shapes of results


def by_row_and_column(a: Any) -> tuple[Tensor, ...]:
    """Room for the results of the forward that have a number for each row or column."""
    rows, columns = a.query.shape[0], a.key.shape[0]
    of_positive = rows if a.positive is not None else 0
    of_columns = columns if a.columns else 0
    counts = (
        of_positive, of_positive if a.columns else 0, rows, of_columns, of_positive, rows,
        of_columns,
    )  # fmt: skip
    real = real_dtype(a.query.dtype)
    return tuple(a.query.new_empty(count, dtype=real) for count in counts)


def _forward_shapes(a: Any) -> tuple[Tensor, ...]:
    rows, columns = a.query.shape[0], a.key.shape[0]
    kept = a.query.new_empty(0, dtype=a.tile_dtype)
    if a.keep:
        strides = (plan.row_stride(columns, a.tile_dtype.itemsize), 1)
        kept = a.query.new_empty_strided((rows, columns), strides, dtype=a.tile_dtype)
    return *by_row_and_column(a), kept


def backward_shapes(a: Any) -> tuple[Tensor, ...]:
    likes = (a.query, a.key, a.scale)
    dtypes = (a.query.dtype, a.query.dtype, real_dtype(a.query.dtype))
    return tuple(
        a.query.new_empty(like.shape if want else 0, dtype=dtype)
        for like, want, dtype in zip(likes, a.wanted, dtypes, strict=True)
    )


def _sigmoid_shapes(a: Any) -> tuple[Tensor, ...]:
    new, real = a.query.new_empty, real_dtype(a.query.dtype)
    likes = (a.query, a.key, a.scale, a.bias)
    formed = (
        new(like.shape if want else 0, dtype=real)
        for like, want in zip(likes, a.wanted, strict=True)
    )
    return new((), dtype=real), *formed


def sigmoid_backward_shapes(a: Any) -> tuple[Tensor, ...]:
    likes = (a.query, a.key, a.scale, a.bias)
    return tuple(
        x.new_empty(x.shape if want else 0) for x, want in zip(likes, a.wanted, strict=True)
    )


forward.shapes(_forward_shapes)
backward.shapes(backward_shapes)
sigmoid.shapes(_sigmoid_shapes)
sigmoid_backward.shapes(sigmoid_backward_shapes)
statistics.shapes(
    lambda a: (
        a.positive_score.new_empty(a.query.shape[0], dtype=torch.bool),
        torch.empty_like(a.positive_score),
        a.positive_score.new_empty(a.query.shape[0], dtype=torch.int64),
    )
)
