"""What losses return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from neglog.torch_state import under_autocast


class LossStats(NamedTuple):
    """A loss and what its rows said. All but `loss` have the shape of an index target.

    logsumexp: of the transformed logits; differentiable, unless the backward is in place.
    correct: whether the target is the argmax; False where ignored or given as probabilities.
    entropy: of softmax(logits), in nats; detached.
    A position outside a mask, or that linear_cross_entropy ignores, has 0 in all of them. One that
    cross_entropy ignores has the logsumexp and entropy of its logits.
    """

    loss: Tensor
    logsumexp: Tensor
    correct: Tensor
    entropy: Tensor


def without_stats(loss: Tensor) -> LossStats:
    """Within the library alone: statistics that nobody asked for are None."""
    nothing: Any = None
    return LossStats(loss, nothing, nothing, nothing)


def stats_of(rows: Any) -> LossStats:
    """Of the Rows of an op. Detached: an entropy that is logged would keep the graph."""
    if rows.lse is None:
        return without_stats(rows.loss)
    return LossStats(rows.loss, rows.lse, rows.correct, rows.entropy.detach())


def change_rows(result: LossStats, change: Callable[[Tensor], Tensor], reduction: str) -> LossStats:
    """All that has a number for each row, changed: the loss only if it is not reduced."""
    loss = change(result.loss) if reduction == "none" else result.loss
    if result.logsumexp is None:
        return without_stats(loss)
    return LossStats(loss, *(change(x) for x in result[1:]))


def reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def reduce_and_cast(loss: Tensor, reduction: str, like: Tensor) -> Tensor:
    """Reduced, in the dtype of the embeddings, as torch has it; under autocast as it is."""
    value = reduce(loss, reduction)
    return value if under_autocast(like) else value.to(like.dtype)


def public(result: LossStats, return_stats: bool) -> Tensor | LossStats:
    """What the user asked for: the loss, or all."""
    return result if return_stats else result.loss
