"""Weights of positions, and the mean over sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog import torch_state
from neglog.checks import check_dense, check_mask_shape, check_real_dtype
from neglog.losses._rows import RowOptions, counted_by
from neglog.ops.dtypes import real_dtype
from neglog.ops.nll import formula


def weighted(
    options: RowOptions, token_weight: Any, per_sequence: Any, like: Tensor,
    positions: Sequence[int], labels: Tensor | None, weight: Tensor | None, shift: bool = False,
) -> RowOptions:  # fmt: skip
    """The options with the token_weight (N,) of rows, by which a mean is over what was asked for.

    positions: the shape of N rows. labels: their classes (N,), None for probabilities. shift: as
    the labels are already, row t has the weight and the sequence of position t + 1.
    """
    if token_weight is None and per_sequence is False:
        return options
    real = real_dtype(like.dtype)
    if token_weight is None:
        of_rows = torch.ones(tuple(positions), dtype=real, device=like.device)
    else:
        _check_token_weight(token_weight, like, list(positions))
        of_rows = token_weight.to(real).expand(tuple(positions))
    of_rows = shifted(of_rows).flatten() if shift else of_rows.flatten()
    if per_sequence is False:
        return options._replace(token_weight=of_rows)
    sequence, count = _sequences(per_sequence, like, positions, options.reduction)
    if shift:
        sequence = shifted(sequence.view(tuple(positions))).flatten()
    return _over_sequences(options, of_rows, sequence, count, labels, weight)


def shifted(x: Tensor) -> Tensor:
    """Of each position what the next one has, and 0 of the last."""
    return F.pad(x, (0, 1))[..., 1:]


def _check_token_weight(token_weight: Any, like: Tensor, positions: list[int]) -> None:
    if not isinstance(token_weight, Tensor):
        raise TypeError(
            f"token_weight: expected a Tensor or None, got {type(token_weight).__name__}"
        )
    check_dense("token_weight", token_weight)
    if token_weight.dtype != torch.bool:
        check_real_dtype("token_weight", token_weight)
    if token_weight.device != like.device:
        raise RuntimeError(
            f"token_weight: expected device {like.device}, got {token_weight.device}"
        )
    check_mask_shape(token_weight, positions, "token_weight")


def _sequences(
    per_sequence: Any, like: Tensor, positions: Sequence[int], reduction: str
) -> tuple[Tensor, int]:
    """The sequence of each position, row-major (N,), and how many sequences there are."""
    rows = 1
    for size in positions:
        rows *= size
    every = torch.arange(rows, device=like.device)
    if not isinstance(per_sequence, bool | Tensor):
        raise TypeError(
            f"per_sequence: expected a bool or a Tensor, got {type(per_sequence).__name__}"
        )
    if reduction != "mean":
        raise ValueError(f"per_sequence: expected reduction 'mean', got {reduction!r}")
    if isinstance(per_sequence, bool):
        length = max(1, positions[-1]) if positions else 1
        return every // length, rows // length
    _check_boundaries(per_sequence, like, rows)
    boundaries = per_sequence.contiguous().long()
    return torch.searchsorted(boundaries, every, right=True) - 1, boundaries.shape[0] - 1


def _check_boundaries(boundaries: Tensor, like: Tensor, rows: int) -> None:
    if boundaries.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"per_sequence: expected dtype torch.int32 or torch.int64, got {boundaries.dtype}"
        )
    if boundaries.dim() != 1 or boundaries.shape[0] < 1:
        raise RuntimeError(
            f"per_sequence: expected shape [S + 1] for S sequences, got {list(boundaries.shape)}"
        )
    check_dense("per_sequence", boundaries)
    if boundaries.device != like.device:
        raise RuntimeError(f"per_sequence: expected device {like.device}, got {boundaries.device}")
    if not torch_state.readable(boundaries):
        return
    ends = [0, *boundaries.tolist(), rows]
    if ends[1] != 0 or ends[-2] != rows or sorted(ends) != ends:
        raise ValueError(
            f"per_sequence: expected boundaries that rise from 0 to the {rows} positions, "
            f"got {boundaries.tolist() if len(ends) < 12 else [*ends[1:9], ...]}"
        )


def _over_sequences(
    options: RowOptions, of_rows: Tensor, sequence: Tensor, count: int, labels: Tensor | None,
    weight: Tensor | None,
) -> RowOptions:  # fmt: skip
    """Each row's weight over that of its sequence; the mean is then over the sequences that weigh
    anything, or over num_items."""
    shares = of_rows
    if labels is not None:
        counted = counted_by(options._replace(token_weight=of_rows), labels)
        if weight is not None:  # a label out of range is the kernel's to name
            labels = labels.clamp(0, max(0, weight.shape[0] - 1))
        by_class = formula.row_weights(labels, counted, weight, of_rows.dtype)
        assert counted is not None
        shares = torch.where(counted, of_rows * by_class, 0)
    totals = of_rows.new_zeros(count).index_add(0, sequence, shares)
    of_sequence = totals[sequence]
    weighs = of_sequence != 0
    of_rows = torch.where(weighs, of_rows / torch.where(weighs, of_sequence, 1), 0)
    num_items = options.num_items
    if num_items is None:
        num_items = (totals.detach() != 0).sum().to(of_rows.dtype)
    return options._replace(token_weight=of_rows, num_items=num_items)
