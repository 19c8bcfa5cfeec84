"""The schedule of linear_nll, one for the CPU and CUDA; cpu.py and cuda.py have its steps.

(a) A tile of rows against the whole vocabulary: its logits are made in a workspace, turned into
    their gradient where they lie by the kernel forward_backward, and used for both gradients:
    3 matmuls.
(b) Ignored rows are dropped before the first of them. On CUDA their number is asked of the device;
    while a graph is captured nothing can be asked, and they stay, as zeros.
(c) The gradient of the weight is accumulated over tiles in float32 or wider. One tile is one
    product, which needs no memory for that.
(d) With filter_eps, the columns of a tile whose gradients are all below filter_eps times the
    largest upstream are left out of the last two matmuls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neglog.ops.dtypes import divides_late
from neglog.ops.linear_nll import schema
from neglog.ops.linear_nll.cpu import CpuRows
from neglog.ops.linear_nll.cuda import CudaRows
from neglog.ops.linear_nll.tiles import NARROW, Gradients, Head, Tiles
from neglog.ops.memory import adjacent_columns, aligned, contiguous, new_gradient
from neglog.ops.nll.autograd import late_divisor, scale_in_place
from neglog.ops.nll.schema import MEAN, NONE

ROWS: dict[str, Any] = {"cpu": CpuRows, "cuda": CudaRows}


def _prepare(kind: Any, op: str, a: Any, wide: bool) -> tuple[Tiles, Any]:
    head = Head(a.input, a.linear_weight, a.linear_bias).contiguous()
    ready_target = contiguous if a.target.dim() == 1 else adjacent_columns
    ready: dict[str, Tensor | None] = {"target": ready_target(a.target, "target")}
    for name in ("weight", "token_weight"):
        given = getattr(a, name)
        ready[name] = None if given is None else contiguous(given, name)
    a = a._replace(**ready)
    tiles = Tiles(
        head, a.target, a.token_weight, a.ignore_index, a.workspace, a.tile_dtype, a.wanted[1],
        kind.compacts(a.input.device), wide,
    )  # fmt: skip
    return tiles, kind(op, a, tiles)


def forward(kind: Any, a: Any, wide: Sequence[bool] = NARROW) -> tuple[Tensor, ...]:
    """As the op. wide: which gradients are wanted in the accumulation dtype."""
    tiles, rows = _prepare(kind, "linear_nll", a, wide[1])
    rows.begin()
    gradients = Gradients(tiles, a.wanted, a.filter_eps, wide) if any(a.wanted) else None
    for tile in tiles:
        if gradients is None:
            rows.forward(tile)
        else:
            gradients.add(tile, rows.forward_backward(tile), rows.largest)
    loss, lse, total_weight, *stats = rows.results()
    count = len(a.target)
    if a.reduction == NONE:
        loss = tiles.among_all(loss, count)
    empty = loss.new_empty(0)
    nothing = (empty.bool(), empty, empty.long())
    of_rows = tuple(tiles.among_all(made, count) for made in stats) if a.stats else nothing
    formed = nothing_formed(a.input)
    if gradients is not None:
        formed = gradients.finished(divides_late(a.input.dtype))
    return loss, tiles.among_all(lse, count), total_weight, *of_rows, *formed


def backward(kind: Any, a: Any) -> tuple[Tensor, ...]:
    """As the op: what the forward formed, times the upstream, or formed anew."""
    alone = a.grad_lse is None and a.grad_entropy is None
    formed = times_upstream(a, a.total_weight) if alone else None
    if formed is not None:
        return formed
    tiles, rows = _prepare(kind, "linear_nll_backward", a, False)
    upstream = aligned(a.grad_loss, "grad_loss")
    upstream = upstream / a.total_weight if a.reduction == MEAN else upstream
    upstream = upstream.expand(len(a.target))
    largest = upstream.abs().amax() if len(upstream) else 0.0
    gradients = Gradients(tiles, a.wanted, a.filter_eps)
    for tile in tiles:
        gradients.add(tile, rows.backward(tile, upstream, a.grad_lse, a.grad_entropy), largest)
    return gradients.finished(False)


def times_upstream(a: Any, divisor: Tensor) -> tuple[Tensor, ...] | None:
    """What the forward formed, times the upstream of the loss, in new memory; None where it formed
    nothing. divisor: of the mean."""
    formed = (a.grad_input, a.grad_weight, a.grad_bias)
    if not _was_formed(formed, a.reduction, a.wanted):
        return None
    factor = _factor(a.grad_loss, divisor, a.reduction, a.input.dtype)
    likes = (a.input, a.linear_weight, a.input)
    return tuple(
        _times(kept, factor, like.dtype) if want else like.new_empty(0)
        for want, kept, like in zip(a.wanted, formed, likes, strict=True)
    )


def scaled_in_place(
    grad_loss: Tensor, formed: Sequence[Tensor], total_weight: Tensor, reduction: int,
    wanted: Sequence[bool], dtypes: Sequence[torch.dtype | None], dtype: torch.dtype,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """The gradients that the forward formed in `dtype`, times the upstream, in these dtypes and,
    where that changes nothing, in their own memory, which is left to the caller; None if they were
    not formed."""
    if not _was_formed(formed, reduction, wanted):
        return None
    factor = _factor(grad_loss, total_weight, reduction, dtype)
    for kept, want in zip(formed, wanted, strict=True):
        if want:
            scale_in_place(kept if kept.dim() == 2 else kept[None], factor)
    return tuple(
        kept.to(dtype) if want else None
        for kept, want, dtype in zip(formed, wanted, dtypes, strict=True)
    )


def _was_formed(formed: Sequence[Tensor], reduction: int, wanted: Sequence[bool]) -> bool:
    made = all(not want or kept.numel() for want, kept in zip(wanted, formed, strict=True))
    return made and reduction != NONE


def nothing_formed(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(0), input.new_empty(0), input.new_empty(0)


def _factor(grad_loss: Tensor, total_weight: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    divisor = late_divisor(total_weight, dtype, reduction)
    return grad_loss if divisor is None else grad_loss / divisor


def _times(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In new memory: the graph may be walked again."""
    if kept.dtype != dtype:
        return (kept * factor).to(dtype)
    # In 16 bits the factor itself would be rounded, a third by 0.2%. The CPU takes a number as it
    # is; on CUDA a vector of one makes the product's type that of the wider.
    factor = factor if kept.is_cpu else factor.reshape(1)
    return torch.mul(kept, factor, out=new_gradient(kept.shape, kept, dtype))


for _device, _kind in ROWS.items():
    schema.forward.implement(_device, partial(forward, _kind))
    schema.backward.implement(_device, partial(backward, _kind))
