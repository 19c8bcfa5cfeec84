"""linear_nll on CUDA: the same tiles of logits, each by the ops nll and nll_ of csrc/nll.cu.

The divisor stays on the device. What makes the host wait is the number of rows that count, which
the matmuls must know, and the columns that filter_eps leaves. While a graph is captured the host
cannot wait: all rows are multiplied then, and filter_eps is an error of CUDA's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neglog import dispatch
from neglog.ops.linear_nll import (
    NARROW,
    Gradients,
    Head,
    Tiles,
    contiguous,
    formed_times_upstream,
    nothing_formed,
)
from neglog.ops.nll import MEAN, NONE, Options, divides_late, library, real_dtype

ops = torch.ops.neglog


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _total_weight(target: Tensor, weight: Tensor | None, ignored: int, real: torch.dtype) -> Tensor:
    """The sum of the counted targets' weights."""
    counted = target != ignored
    if weight is None:
        return counted.sum().to(real)
    return torch.where(counted, weight[torch.where(counted, target, 0)], 0).sum()


def forward(
    input, linear_weight, linear_bias, target, weight, num_items, *rest,
    wide: Sequence[bool] = NARROW,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the op on CUDA. wide: which gradients are wanted in the accumulation dtype."""
    *values, stats, wanted, workspace, filter_eps, _ = rest
    options = Options(*values)
    dispatch.ran("linear_nll", "cuda")
    head, weight = contiguous(Head(input, linear_weight, linear_bias), weight)
    real = real_dtype(input.dtype)
    divisor = num_items
    if divisor is None:
        divisor = _total_weight(target, weight, options.ignore_index, real)
    compact = not _capturing(input.device)
    tiles = Tiles(head, target, options.ignore_index, workspace, wanted[1], compact, wide[1])
    gradients = Gradients(tiles, wanted, filter_eps, wide) if any(wanted) else None
    late = divides_late(input)
    largest = 1 / divisor if options.reduction == MEAN and not late else 1.0
    found = []
    for part, everywhere, x, logits in tiles:
        given = (logits, tiles.target[part], weight, divisor, *options, stats, "")
        if gradients is None:
            loss, lse, _, _, correct, entropy = ops.nll(*given)
        else:  # of a mean: of the tile's sum over the divisor of all
            loss, lse, _, correct, entropy = ops.nll_(*given)
            gradients.add(logits, x, head.weight, everywhere, largest)
        found.append((loss.reshape(-1), lse, correct, entropy))
    nothing = input.new_empty(0, dtype=real)
    none = (nothing, nothing, nothing.bool(), nothing)
    loss, lse, correct, entropy = map(torch.cat, zip(*found, strict=True)) if found else none
    if options.reduction == NONE:
        loss = tiles.spread(loss, len(target))
    else:
        loss = loss.sum(dtype=torch.float64).to(real)
        if not found and options.reduction == MEAN:
            loss = loss / divisor
    if stats:
        correct, entropy = (tiles.spread(made, len(target)) for made in (correct, entropy))
    formed = gradients.finished(late) if gradients else nothing_formed(input)
    return loss, tiles.spread(lse, len(target)), divisor.clone(), correct, entropy, *formed


def backward(
    grad_loss, grad_lse, input, linear_weight, linear_bias, target, weight, total_weight,
    grad_input, grad_weight, grad_bias, *rest,
) -> tuple[Tensor, ...]:  # fmt: skip
    *values, wanted, workspace, filter_eps, _ = rest
    options = Options(*values)
    ready = formed_times_upstream(
        grad_loss, grad_lse, (input, linear_weight, input), total_weight,
        (grad_input, grad_weight, grad_bias), options, wanted,
    )  # fmt: skip
    if ready is not None:
        return ready
    dispatch.ran("linear_nll_backward", "cuda")
    head, weight = contiguous(Head(input, linear_weight, linear_bias), weight)
    compact = not _capturing(input.device)
    tiles = Tiles(head, target, options.ignore_index, workspace, wanted[1], compact)
    upstream = grad_loss / total_weight if options.reduction == MEAN else grad_loss
    upstream = upstream.expand(len(target))
    gradients = Gradients(tiles, wanted, filter_eps)
    of_rows = options._replace(reduction=NONE)
    largest = upstream.abs().amax() if len(upstream) else 0.0
    for part, everywhere, x, logits in tiles:
        index = tiles.target[part]
        _, lse, low, total, _, _ = ops.nll(logits, index, weight, None, *of_rows, False, "")
        grads = (None if g is None else g[everywhere] for g in (upstream, grad_lse))
        s = ops.nll_backward(*grads, logits, index, weight, lse, low, total, *of_rows, "")
        gradients.add(s, x, head.weight, everywhere, largest)
    return gradients.finished(False)


library.impl("linear_nll", forward, "CUDA")
library.impl("linear_nll_backward", backward, "CUDA")
