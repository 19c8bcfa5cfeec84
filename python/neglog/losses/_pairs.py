"""What contrastive losses share: embeddings made ready, compared, and their numbers reduced.

Up to FEW similarities, on devices without kernels and for tensor subclasses the similarities are
made in memory; otherwise the op pairs makes them a tile at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog import dispatch
from neglog.checks import autocast_dtype, under_autocast
from neglog.losses.cross_entropy import LossStats
from neglog.ops import pairs_composite as composite
from neglog.ops.nll import real_dtype
from neglog.ops.pairs_autograd import log_sum_exps
from neglog.ops.pairs_tile import Pairs
from neglog.tiles import gemm, plan

# Similarities, in numbers, up to which they are made in memory.
FEW = 1 << 18
# 8192 x 8192 in float32. Up to here the similarities are kept for the backward, which saves one
# matmul of four; beyond, no more than a tile of them exists.
DEFAULT_WORKSPACE_MB = 256
# Of scores whose statistics are formed at once; half a dozen temporaries have their size.
STATS_BYTES = 4 << 20


class Compared(NamedTuple):
    """By row, (N,), or column, (M,): what the op gives; see neglog.ops.pairs."""

    row_loss: Tensor
    column_loss: Tensor
    row_lse: Tensor
    column_lse: Tensor
    score: Tensor


class How(NamedTuple):
    """Bytes for similarities, and the backend if one is forced."""

    workspace: int
    backend: str | None


# Preparation


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """Embeddings as they are multiplied: normalised if asked, in autocast's dtype."""
    dtype = autocast_dtype(x)
    if not normalize:
        return x.to(dtype)
    # torch's eps, 1e-12, is 0 in float16, and a norm of 256 overflows when squared.
    return F.normalize(x.to(real_dtype(x.dtype)), dim=-1).to(dtype)


def number(value: float | Tensor, like: Tensor) -> Tensor:
    """() in the accumulation dtype."""
    real = real_dtype(like.dtype)
    if isinstance(value, Tensor):
        value = value.to(like.device, real)
        return value if value.dim() == 0 else value.reshape(())
    return torch.scalar_tensor(value, dtype=real, device=like.device)


def scale_of(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature: () or (N,)."""
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        return temperature.to(like.device, real_dtype(like.dtype)).reciprocal()
    if isinstance(temperature, Tensor):
        return number(temperature, like).reciprocal()
    return number(1 / temperature, like)


def how_to_compare(options: Any, backend: str | None) -> How:
    if options is not None and (not isinstance(options, dict) or set(options) - {"workspace_mb"}):
        raise TypeError(f"options: expected None or {{'workspace_mb': number}}, got {options!r}")
    workspace = plan.workspace_bytes((options or {}).get("workspace_mb"), DEFAULT_WORKSPACE_MB)
    return How(workspace, dispatch.forced(backend))


# Comparison


def plainly_few(x: Any, y: Any, options: Any, backend: str | None) -> bool:
    """Whether two matrices fit each other and torch's own functions at a first look.

    What they then need not pass through costs 30 us: half of a small loss's forward.
    """
    return (
        type(x) is Tensor and type(y) is Tensor
        and x.dtype is y.dtype and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 2 and x.shape == y.shape and x.shape[0] ** 2 < FEW
        and x.is_cpu and y.is_cpu and x.layout is y.layout is torch.strided
        and options is None and backend is None and dispatch.forced() is None
        and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def in_memory(query: Tensor, key: Tensor, forced: str | None) -> bool:
    """Whether the similarities are made in memory, by torch."""
    refusal = dispatch.kernels_refuse(query, backend=forced)
    if key is not query:
        refusal = refusal or dispatch.kernels_refuse(key, backend=forced)
    if forced not in (None, "torch") and refusal:
        raise RuntimeError(f"backend={forced!r} cannot take this call: {refusal}")
    if forced is not None or refusal:
        return bool(refusal) or forced == "torch"
    return not dispatch.kernel_backend(query) or gemm.few(query, key, FEW)


def pairs_of(
    query: Tensor, key: Tensor, scale: Tensor, how: How, *,
    bias: Tensor | None = None, positive: Tensor | None = None, excluded: Tensor | None = None,
    query_group: Tensor | None = None, key_group: Tensor | None = None, columns: bool = False,
    symmetric: bool = False,
) -> Pairs:  # fmt: skip
    workspace, forced = how
    return Pairs(
        query, key, scale, bias, positive, excluded, query_group, key_group, columns, symmetric,
        workspace, forced or "",
    )  # fmt: skip


def compare(pairs: Pairs) -> Compared:
    if in_memory(pairs.query, pairs.key, pairs.backend or None):
        dispatch.ran("pairs", "torch")
        return Compared(*composite.pairs(pairs))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in pairs[:3])
    return Compared(*log_sum_exps(pairs, learns)[: len(Compared._fields)])


def dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the accumulation dtype."""
    real = real_dtype(x.dtype)
    return (x.to(real) * y.to(real)).sum(-1)


# Results


def without_stats(loss: Tensor) -> LossStats:
    return LossStats(loss, loss, loss, loss)


def with_stats(loss: Tensor, pairs: Pairs, lse: Tensor, score: Tensor) -> LossStats:
    """With entropy and correctness of each row, its positive's `score` among the pairs or not.

    Another walk over the similarities, some rows at a time, in torch's own functions.
    """
    budget = min(STATS_BYTES, pairs.workspace)
    height = plan.rows_per_tile(score.shape[0], pairs.key.shape[0] * lse.itemsize, budget)
    found = []
    with torch.no_grad():
        for rows in plan.row_tiles(score.shape[0], height):
            part = pairs.rows(rows)
            plain, z = composite.scores(part)
            if part.positive is None:
                own = score[rows]
                z = torch.cat([own[:, None], z], 1)
            else:  # from this product: another may round differently, and would seem to be beaten
                own = plain.gather(1, part.positive[:, None]).squeeze(1)
            found.append(correct_and_entropy(own, z))
    if not found:
        found = [(score.new_zeros(0, dtype=torch.bool), score.new_zeros(0))]
    correct, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return LossStats(loss, lse, correct, entropy)


def correct_and_entropy(score: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Whether no score is above the positive's, and -sum p log p; (N,), without gradient."""
    log_p = torch.log_softmax(scores.detach(), 1)
    entropy = -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)
    return score.detach() >= scores.detach().amax(1), entropy


def reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def returned(loss: Tensor, reduction: str, like: Tensor) -> Tensor:
    """Reduced, in the dtype of the embeddings, as torch has it; under autocast as it is."""
    value = reduced(loss, reduction)
    return value if under_autocast(like) else value.to(like.dtype)
